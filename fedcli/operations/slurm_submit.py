"""The open round as jobs of SLURM: what it needs, what of that is in the queue already, and sending the rest.

A round is an array job with an element for each client of the cohort, and a server job that starts when the array is
over, whoever failed. The server job merges and calls `submit` again, which sends the next round's jobs, or once more
the elements that ended without an update. A timer is a server job that starts by the clock: at the round's deadline,
and where more clients were drawn than count every so often, so that the slow ones hold nobody up.
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fedcli.errors import BusyError, NotReadyError, WorkspaceError
from fedcli.operations.slurm_state import job_mark, job_name
from fedcli.parties.party import can_train
from fedcli.server.quorum import seconds_left
from fedcli.slurm.queue import Element, cancel, list_elements, send
from fedcli.slurm.scripts import ScriptWriter
from fedcli.workspace.federation_state import POLL_SECONDS, FederationState
from fedcli.workspace.layout import Workspace
from fedcli.workspace.locks import hold
from fedcli.workspace.registrations import require_own
from fedcli.workspace.slurm_jobs import KINDS, Job, JobKind, read_jobs, save_jobs, save_script

LOCK_PATIENCE = 120.0
"""Seconds to wait for another `submit`: a server job that gave up would leave the next round without jobs."""


@dataclass(frozen=True)
class Request:
    """A job that has still to be sent; it starts `delay` seconds from now, or once the jobs `after` are over."""

    kind: JobKind
    clients: tuple[int, ...] = ()
    attempt: int = 1
    delay: float | None = None
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Submission:
    """What `submit` found and did: what it sent and cancelled, all jobs of the round, and who is trained elsewhere.

    `requests` and `scripts` are what a dry run would send.
    """

    status: Literal["submitted", "in_place", "finished", "dry_run"]
    round: int
    sent: list[Job] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    elsewhere: list[int] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    scripts: dict[JobKind, str] = field(default_factory=dict)


def submit(federation: FederationState, *, dry_run: bool = False) -> Submission:
    """Send the jobs that the open round needs and the queue does not hold; cancel those of rounds that are closed.

    It may be called at any time, twice, and by jobs themselves. Raises RequirementError where SLURM does not answer,
    NotReadyError where a job of the round calls and every attempt is used up.
    """
    workspace = federation.workspace
    _check_path(workspace)
    _check_own(workspace)
    end = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            with hold(workspace.slurm_lock, "sending jobs", folder_mode=None):  # the folder is for all to see
                federation.refresh()
                return _submit(federation, dry_run)
        except BusyError:
            if time.monotonic() + POLL_SECONDS > end:
                raise
        time.sleep(POLL_SECONDS)


def _check_own(workspace: Workspace) -> None:
    instead = "Send a job script of your own, which runs `fedcli client train --id N`."
    require_own(workspace, "its slurm section (setup, command, options)", instead)


def write_scripts(federation: FederationState) -> dict[JobKind, Path]:
    """Write the batch scripts of the open round and send nothing; return them, none where the federation has finished.

    The array is of the clients that have not answered; there is none where all have.
    """
    workspace, head = federation.workspace, federation.head
    _check_path(workspace)
    _check_own(workspace)
    if head.manifest.state == "finished":
        return {}
    clients = tuple(client for client in head.missing_clients() if can_train(federation, client))
    requests = [Request("clients", clients), Request("server")] if clients else [Request("server")]
    return {
        request.kind: save_script(workspace, head.number, request.kind, _script(federation, request))
        for request in requests
    }


def _submit(federation: FederationState, dry_run: bool) -> Submission:
    workspace, head = federation.workspace, federation.head
    caller = os.environ.get("SLURM_JOB_ID")  # which ends when this is done, and so is none that is in place
    kinds = {job_name(head, kind): kind for kind in KINDS}
    ours = [entry for entry in list_elements() if entry.name.endswith(job_mark(head))]
    live = [entry for entry in ours if entry.is_live and str(entry.job) != caller]
    stale = sorted(
        {
            entry.job
            for entry in live
            # A server job of a closed round that runs has merged it, and makes its scores.
            if entry.name not in kinds and (entry.index is not None or entry.is_waiting)
        }
    )
    if stale and not dry_run:
        cancel(stale)
    if head.manifest.state == "finished":
        return Submission("finished", head.number, cancelled=stale)
    if head.manifest.waits_for_parent:
        raise NotReadyError(
            f"round {head.number} waits for its parent: it has no jobs",
            hint="Run `fedcli relay --id N -w PARENT --from REGION`, and submit the round that it opens.",
        )
    workspace.store.sweep(workspace.name(workspace.jobs(head.number).parent))
    recorded = read_jobs(workspace, head.number)
    found = _unrecorded(recorded, ours, kinds)
    jobs = [*recorded, *found]
    if found and not dry_run:
        save_jobs(workspace, head.number, jobs)
    missing = head.missing_clients()
    elsewhere = [client for client in missing if not can_train(federation, client)]
    requests = _Standing(
        federation=federation,
        jobs=jobs,
        live={kind: [entry for entry in live if entry.name == name] for name, kind in kinds.items()},
        due=[client for client in missing if client not in elsewhere],
        elsewhere=elsewhere,
        own=next((job for job in jobs if str(job.id) == caller), None),
        seconds_left=seconds_left(federation) or 0.0,
    ).requests()
    scripts = {request.kind: _script(federation, request) for request in requests}
    if dry_run:
        return Submission("dry_run", head.number, [], stale, jobs, elsewhere, requests, scripts)
    sent: list[Job] = []
    for request in requests:
        script = save_script(workspace, head.number, request.kind, scripts[request.kind])
        job = send(script, _options(request, [job.id for job in sent]))
        sent.append(Job(id=job, kind=request.kind, attempt=request.attempt, clients=list(request.clients)))
        save_jobs(workspace, head.number, [*jobs, *sent])
    return Submission("submitted" if sent else "in_place", head.number, sent, stale, [*jobs, *sent], elsewhere)


def _unrecorded(jobs: list[Job], ours: list[Element], kinds: dict[str, JobKind]) -> list[Job]:
    """Return the round's jobs that a `submit` sent and did not live to write down."""
    known = {job.id for job in jobs}
    return [
        Job(id=id_, kind=kind, clients=sorted(e.index for e in ours if e.job == id_ and e.index is not None))
        for name, kind in kinds.items()
        for id_ in sorted({entry.job for entry in ours if entry.name == name} - known)
    ]


@dataclass(frozen=True)
class _Standing:
    """How the open round stands: its jobs, the clients that have not answered, the job that asks (if one does)."""

    federation: FederationState
    jobs: list[Job]
    live: dict[JobKind, list[Element]]
    due: list[int]
    elsewhere: list[int]
    own: Job | None
    seconds_left: float

    def requests(self) -> list[Request]:
        """Return what is to be sent."""
        # While a server job is in the queue it sees to the rest itself, failed elements among it.
        requests = [] if self.live["server"] else self._chain()
        is_training = self.live["clients"] or any(request.clients for request in requests)
        delays = [self.seconds_left] if self.seconds_left > 0 else []
        if is_training and self.federation.head.manifest.selection is not None:
            delays.append(self.federation.config.slurm.retry)
        if delays and not self.live["timer"]:
            requests.append(Request("timer", delay=min(delays)))  # looks whether the round can be merged already
        return requests

    def _chain(self) -> list[Request]:
        """Return an array of the clients that are due and have no element, and the server job that comes after."""
        own, settings = self.own, self.federation.config.slurm
        in_queue = {entry.index for entry in self.live["clients"]}
        arrays = tuple(sorted({entry.job for entry in self.live["clients"]}))
        idle = tuple(client for client in self.due if client not in in_queue)
        last = next((job.attempt for job in reversed(self.jobs) if job.kind == "clients"), 0)
        attempt = 1 if own is None else last + 1  # a person who asks again has seen to the cause
        if idle and attempt <= settings.attempts:
            return [Request("clients", idle, attempt), Request("server", after=arrays)]
        if arrays or own is None:
            return [Request("server", after=arrays)]
        if self.elsewhere:
            return [Request("server", delay=settings.retry)]
        if not idle and own.attempt < settings.attempts:  # all have answered, and yet this job could not merge
            return [Request("server", attempt=own.attempt + 1, delay=settings.retry)]
        if self.seconds_left > 0:
            return []
        lack = f"no update of clients {', '.join(map(str, idle))}" if idle else "nothing that can be merged"
        raise NotReadyError(
            f"round {self.federation.head.number}: {lack} after {settings.attempts} attempts; no more jobs are sent",
            hint="See logs/ for the cause. Then `fedcli slurm submit` begins anew; or go on without them: "
            "`fedcli server aggregate --partial`, then `fedcli slurm submit`.",
        )


def _check_path(workspace: Workspace) -> None:
    """Raise WorkspaceError for a path that SLURM would read otherwise: it takes a backslash for a quote."""
    if "\\" in str(workspace.root.resolve()):
        raise WorkspaceError(
            f"SLURM cannot write its logs to {workspace.root}: there is a backslash in the path",
            hint="Move the workspace to a path without one.",
        )


def _script(federation: FederationState, request: Request) -> str:
    workspace, head = federation.workspace, federation.head
    root = workspace.root.resolve()
    address = workspace.address if workspace.store.is_remote else None
    writer = ScriptWriter(root, federation.config.slurm, address)
    logs = root / workspace.name(workspace.job_logs(head.number))
    name = job_name(head, request.kind)
    return writer.clients(name, request.clients, logs) if request.kind == "clients" else writer.server(name, logs)


def _options(request: Request, sent: list[int]) -> list[str]:
    """Return the options of sbatch that hold for this moment only; a server job follows what was `sent` before it."""
    if request.delay is not None:
        return [f"--begin=now+{int(request.delay) + 1}"]
    after = [*request.after, *sent] if request.kind == "server" else []
    return [f"--dependency=afterany:{':'.join(map(str, after))}"] if after else []
