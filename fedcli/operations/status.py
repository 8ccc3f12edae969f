"""Where a federation stands; reads manifests and listings only, so it is quick and disturbs nobody."""

import shlex
from dataclasses import asdict, dataclass
from typing import Any

from fedcli.errors import IntegrityError
from fedcli.operations.secure_status import SecureStatus, secure_status
from fedcli.operations.slurm_state import JobStates, read_job_states
from fedcli.operations.update_figures import UpdateFigures, figures_of
from fedcli.server.late import countable, late_of
from fedcli.server.quorum import deadline_of, needed_answers, seconds_left
from fedcli.workspace.arriving import arriving, missing_of_round
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.file_system_check import describe_clock
from fedcli.workspace.history import Round, is_hidden
from fedcli.workspace.layout import Workspace
from fedcli.workspace.privacy_ledger import Budget, read_budget
from fedcli.workspace.privacy_records import PrivacyRecord
from fedcli.workspace.records import AlgorithmRun, Cost, Manifest
from fedcli.workspace.registrations import foreign_clients, own_homes, read_party, read_registration
from fedcli.workspace.relay_records import RelayRecord
from fedcli.workspace.row_files import has_rows
from fedcli.workspace.scores import Unscored, read_unscored
from fedcli.workspace.window import window_start


@dataclass(frozen=True)
class Status:
    """The open round, who has answered it, and how the round before it was merged."""

    workspace: str
    simulation: bool
    """Whether one machine plays all clients, on rows that were split among them: then there are no parties."""
    round: int
    rounds: int
    state: str
    task: str
    algorithm: dict[str, Any]
    next_algorithm: dict[str, Any]
    """What the next round will carry: fedcli.yaml's as it stands, and a region's as its parent has it."""
    learning_rate: float
    cohort: list[int]
    answered: list[int]
    missing: list[int]
    arriving: list[int]
    """Of the cohort, those whose updates lack a file, as while they are copied: they are waited for as missing ones."""
    not_there: dict[int, str]
    """What is missing of the updates that are arriving."""
    round_lacks: str
    """What is missing of the round itself, as while it is copied; nothing where all is there."""
    hidden: list[int]
    """Of the cohort, those whose inbox this user cannot see into."""
    joined: list[int]
    """Parties whose rows stay where they are."""
    regions: dict[int, str]
    """Of them, those whose rows lie with the parties of another workspace, by its id."""
    relay: RelayRecord | None
    """Of a region, where it stands in its parent's round."""
    unenrolled: dict[int, str]
    """Of the parties that have joined, those that are not enrolled, with their fingerprints."""
    gone: dict[int, str]
    """Who takes part no more, and why: leave or revoke."""
    leaving: list[int]
    """Who has said so, and is taken out when the server next merges."""
    distrust: str | None
    """What is wrong with the enrolment; None where it is right, or signatures are off."""
    needed: int
    num_counted: int
    """How many updates of the round count at most."""
    deadline: float | None
    """In seconds since 1970 by the server's clock; from then on the fewest answers are enough."""
    seconds_left: float | None
    """To the deadline by this machine's clock; negative past it."""
    staleness: int
    """From so many rounds back updates count when the open one is merged."""
    late: dict[int, list[int]]
    """Updates of earlier rounds that may count then: the clients, by round."""
    last_losses: dict[int, float | None]
    """By client, of the updates that went into the open round's adapter."""
    privacy: PrivacyRecord | None
    """What the open round guarantees; None where it asks for nothing."""
    budget: Budget | None
    """How the open round stands to its max_epsilon, for the client that has spent most; None where it has none."""
    is_withheld: bool
    """Whether privacy keeps losses, norms and numbers of rows of the last round to the server."""
    last_updates: list[UpdateFigures]
    """Of the updates that went into the open round's adapter, what tells unusual ones."""
    last_rule: dict[str, Any] | None
    """What took the place of the weighted mean then; None for that itself."""
    clusters: dict[str, list[int]] | None
    """The clients of each of the open round's adapters; by loss those that chose it last; None where there is one."""
    last_refused: dict[int, str]
    last_missing: list[int]
    last_surplus: list[int]
    """Who answered, and was not needed."""
    last_late: list[int]
    """Of the missing, those whose update came after the round was closed."""
    cost: Cost | None
    """None where the round was opened by a version that did not count."""
    history: list[AlgorithmRun]
    """Which algorithm merged which rounds."""
    unscored: list[Unscored]
    """What rounds are still to be scored on, and what failed."""
    secure: SecureStatus | None
    """Of a round of secure aggregation: what it waits for."""
    slurm: JobStates | None
    """None where no jobs were sent for the open round."""
    clock: str | None
    """How this machine's clock, or the server's when it opened the round, differs from the file system's."""
    next_command: str


def read_status(federation: FederationState) -> Status:
    """Return where the federation stands."""
    workspace, config, head = federation.workspace, federation.config, federation.head
    manifest = head.manifest
    awaited = head.awaited_clients()
    silent = {*head.missing_clients()}
    hidden = [client for client in awaited if is_hidden(workspace, client)]
    foreign = foreign_clients(workspace, sorted({*awaited} - silent))
    missing = sorted((silent | {*foreign}) - {*hidden})
    half = arriving(head, sorted({*awaited} - {*missing} - {*hidden}), is_quick=True)
    answered = sorted({*awaited} - {*missing} - {*hidden} - {*half})
    needed = needed_answers(federation)
    last = manifest.aggregation
    last_missing = last.missing if last else []
    slurm = read_job_states(head, missing)
    membership, joined = _membership(federation), federation.joined()
    unenrolled = [client for client in answered if client in membership["unenrolled"]]
    num_ready = len(answered) - len(unenrolled)
    secure = secure_status(head) if manifest.secure_aggregation is not None else None
    needed = needed if secure is None else max(needed, secure.fewest)
    late = _late(federation)
    num_ready += sum(map(len, late.values()))
    next_command = _next_command(head, slurm, missing, num_ready >= needed)
    budget = _budget(federation)
    if budget is not None and not budget.is_enough:
        next_command = "fedcli privacy"
    if unenrolled and num_ready < needed:
        next_command = f"fedcli server enrol --id {unenrolled[0]}"
    elif secure is not None and secure.next_command is not None:
        next_command = secure.next_command
    elif manifest.waits_for_parent:
        next_command = _next_of_region(federation)
    elif len(membership["gone"]) == config.federation.clients and manifest.round + 1 < config.federation.rounds:
        next_command = "fedcli server enrol --id N"
    return Status(
        workspace=workspace.address,
        simulation=federation.is_simulation,
        round=head.number,
        rounds=manifest.rounds,
        state=manifest.state,
        task=manifest.task,
        algorithm=manifest.algorithm,
        next_algorithm=asdict(config.algorithm) if manifest.relay is None else manifest.algorithm,
        learning_rate=manifest.train.learning_rate,
        cohort=manifest.cohort,
        answered=answered,
        missing=missing,
        arriving=[*half],
        not_there=half,
        round_lacks=missing_of_round(head),
        hidden=hidden,
        joined=[*joined],
        regions={client: each.data.region for client, each in joined.items() if each.data.region is not None},
        relay=manifest.relay,
        needed=needed,
        num_counted=head.num_counted,
        staleness=manifest.staleness or 0,
        late=late,
        deadline=deadline_of(federation),
        seconds_left=seconds_left(federation),
        last_losses={entry.client: entry.train_loss for entry in last.counted} if last else {},
        privacy=manifest.privacy,
        budget=budget,
        is_withheld=last is not None and any(entry.num_samples is None for entry in last.counted),
        last_updates=figures_of(last.counted) if last else [],
        last_rule=last.rule if last else None,
        clusters=_clusters(manifest),
        last_refused={entry.client: entry.code for entry in last.refused} if last else {},
        last_missing=last_missing,
        last_surplus=last.surplus if last else [],
        last_late=_too_late(federation, last_missing),
        cost=manifest.cost,
        history=manifest.history,
        unscored=read_unscored(workspace),
        secure=secure,
        slurm=slurm,
        clock=describe_clock(head),
        next_command=next_command,
        **membership,
    )


def _clusters(manifest: Manifest) -> dict[str, list[int]] | None:
    clusters, merge = manifest.clusters, manifest.aggregation
    if clusters is None:
        return None
    names = clusters.names or [str(cluster) for cluster in range(clusters.count)]
    if clusters.of is not None:
        of = {int(client): cluster for client, cluster in clusters.of.items()}
    else:  # each chose anew in the last round
        of = {entry.client: entry.cluster or 0 for entry in (merge.counted if merge else [])}
    return {name: [client for client in of if of[client] == cluster] for cluster, name in enumerate(names)}


def _late(federation: FederationState) -> dict[int, list[int]]:
    """Return the clients whose updates of earlier rounds may count when the open round is merged, by round."""
    found: dict[int, list[int]] = {}
    if federation.head.manifest.staleness is not None:
        sent, most = late_of(federation)
        for base, client in countable(sent, most):
            found.setdefault(base.number, []).append(client)
    return found


def _too_late(federation: FederationState, missing: list[int]) -> list[int]:
    """Return those of the last round's missing clients whose updates came later, and count no more."""
    head = federation.head
    if not missing or window_start(head) < head.number:
        return []
    return sorted(federation.workspace.sent_updates(head.number - 1, missing))


def _budget(federation: FederationState) -> Budget | None:
    """Return how the open round stands to its budget; the past is read only where it has one."""
    manifest = federation.head.manifest
    if manifest.privacy is None or manifest.privacy.max_epsilon is None or manifest.state != "open":
        return None
    return read_budget([*federation.past(), federation.head], manifest.cohort)


def _membership(federation: FederationState) -> dict[str, Any]:
    """Return who is not enrolled, who is gone, and what is wrong with the enrolment."""
    found: dict[str, Any] = {"unenrolled": {}, "gone": {}, "leaving": [], "distrust": None}
    if federation.identity.signatures is None:
        return found
    from fedcli.operations.keys import leaving, read_keys  # where nothing is signed nobody needs cryptography

    try:
        clients = read_keys(federation).clients
    except IntegrityError as error:
        return found | {"distrust": error.message}
    return found | {
        "leaving": leaving(federation),
        "unenrolled": {client: owner.fingerprint for client, owner in clients.items() if owner.state == "joined"},
        "gone": {client: owner.state for client, owner in clients.items() if owner.state in ("leave", "revoke")},
    }


def describe_algorithm(algorithm: dict[str, object]) -> str:
    """Return an algorithm's name with its hyperparameters."""
    rest = ", ".join(f"{key} {value}" for key, value in algorithm.items() if key != "name")
    return f"{algorithm['name']} ({rest})" if rest else str(algorithm["name"])


def describe_rule(rule: dict[str, Any]) -> str:
    """Return a rule with the settings that it uses."""
    settings = [f"tolerate {rule['tolerate']}"] if rule["rule"] not in ("mean", "norm_clip") else []
    settings += ["nearest_mixing"] * bool(rule["nearest_mixing"])
    settings += [f"weight_cap {rule['weight_cap']:g}"] if rule["weight_cap"] is not None else []
    return f"{rule['rule']} ({', '.join(settings)})" if settings else str(rule["rule"])


def describe_history(manifest: Manifest, separator: str) -> str:
    """Return which algorithm merged from which round on."""
    return separator.join(f"{describe_algorithm(run.algorithm)} from round {run.round}" for run in manifest.history)


def _next_of_region(federation: FederationState) -> str:
    """Return what brings the sum of a region up, or its next round down; as it was relayed from here, if it was."""
    workspace, relay = federation.workspace, federation.head.manifest.relay
    origin = None if relay is None else relay.parent
    home = None if origin is None else own_homes(origin.workspace).get(origin.client)
    record = None if home is None else read_party(home)
    parent = "PARENT" if record is None or record.region is None else shlex.quote(record.region.parent)
    client = "N" if origin is None else origin.client
    return f"fedcli relay --id {client} -w {parent} --from {shlex.quote(workspace.address)}"


def _next_command(head: Round, slurm: JobStates | None, missing: list[int], is_ready: bool) -> str:
    if slurm is not None:
        return "fedcli status" if slurm.will_merge or slurm.error else "fedcli slurm submit"
    if head.manifest.state == "finished":
        return "fedcli verify"
    if is_ready:
        return "fedcli server aggregate"
    return next_of_client(head.workspace, missing[0]) if missing else "fedcli client status --id N"


def next_of_client(workspace: Workspace, client: int) -> str:
    """Return what a client whose update is missing has to run: join, where it has no rows yet, train, or relay."""
    if (registration := read_registration(workspace, client)) is not None and registration.data.region is not None:
        return f"fedcli relay --id {client} --from REGION"
    if workspace.has_joined(client) or has_rows(workspace, client):
        return f"fedcli client train --id {client}"
    return f"fedcli client join --id {client} --data SOURCE"
