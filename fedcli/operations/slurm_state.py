"""How the jobs of the open round stand in SLURM's queue."""

import hashlib
from dataclasses import dataclass

from fedcli.errors import RequirementError
from fedcli.slurm.queue import Element, list_elements
from fedcli.workspace.history import Round
from fedcli.workspace.layout import round_name
from fedcli.workspace.slurm_jobs import KINDS, Job, JobKind, read_jobs

STATUS_PATIENCE = 3.0
"""Seconds that `status` waits for SLURM."""
UNKNOWN = "ENDED"
"""The state of what the queue does not know any more: it ended some time ago, or was cancelled before it began."""


@dataclass(frozen=True)
class JobStates:
    """A round's jobs: which clients' elements are queued (by client, why), run, or have failed (by client, how).

    An element has failed when it is over and its client has sent no update. `servers` are the jobs that will merge, by
    id, or the last one where none will. Where SLURM did not answer, `error` says so and no state is known.
    """

    jobs: list[Job]
    queued: dict[int, str]
    running: list[int]
    failed: dict[int, str]
    servers: dict[int, str]
    will_merge: bool
    error: str | None = None


def read_job_states(head: Round, missing: list[int]) -> JobStates | None:
    """Return how the jobs of a round stand; None, without asking SLURM, where none were sent.

    `missing` are the clients of its cohort that have sent no update.
    """
    jobs = read_jobs(head.workspace, head.number)
    if not jobs:
        return None
    names = [job_name(head, kind) for kind in KINDS]  # one may be there that is not written down
    try:
        found = list_elements(names, patience=STATUS_PATIENCE)
    except RequirementError as error:
        return JobStates(jobs, {}, [], {}, {}, False, error.message)
    shown = {(element.job, element.index): element for element in found}
    latest = {client: shown.get((job.id, client)) for job in jobs for client in job.clients}
    waiting = {client: element.reason for client, element in latest.items() if element and element.is_waiting}
    over = {client for client, element in latest.items() if element is None or element.is_over}
    lost = {client for client in over & set(missing) if not head.has_update(client)}  # by now
    live = {element.job for element in found if element.is_live and element.index is None}
    servers = {job.id: _state(shown.get((job.id, None))) for job in jobs if job.kind != "clients"}
    return JobStates(
        jobs=jobs,
        queued=waiting,
        running=sorted(latest.keys() - waiting.keys() - over),
        failed={client: _state(latest[client]) for client in sorted(lost)},
        servers={job: servers[job] for job in servers if job in live} or dict([*servers.items()][-1:]),
        will_merge=bool(live),
    )


def job_name(head: Round, kind: JobKind) -> str:
    """Return the name that tells a job from those of other rounds and workspaces, copies of this one among them."""
    return f"r{round_name(head.number)}-{kind}{job_mark(head)}"


def job_mark(head: Round) -> str:
    """Return the end that the names of a workspace's jobs have."""
    where = f"{head.manifest.workspace} {head.workspace.root.resolve()}"
    return f"-fedcli-{hashlib.sha256(where.encode()).hexdigest()[:12]}"


def _state(element: Element | None) -> str:
    return UNKNOWN if element is None else element.state
