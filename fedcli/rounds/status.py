"""Where a federation stands; reads manifests and listings only, so it is quick and disturbs nobody."""

from dataclasses import asdict, dataclass
from typing import Any

from fedcli.rounds.settings import read_running_config
from fedcli.workspace.history import is_hidden, missing_clients, read_head
from fedcli.workspace.layout import Workspace
from fedcli.workspace.records import AlgorithmRun, Cost
from fedcli.workspace.registry import joined_clients


@dataclass(frozen=True)
class Status:
    """The open round, who has answered it, and how the round before it was merged."""

    workspace: str
    round: int
    rounds: int
    state: str
    task: str
    algorithm: dict[str, Any]
    next_algorithm: dict[str, Any]
    """What the next round will carry: fedcli.yaml's as it stands."""
    learning_rate: float
    cohort: list[int]
    answered: list[int]
    missing: list[int]
    hidden: list[int]
    """Of the cohort, those whose inbox this user cannot see into."""
    joined: list[int]
    """Parties whose rows stay where they are."""
    needed: int
    last_losses: dict[int, float | None]
    """By client, of the updates that went into the open round's adapter."""
    last_refused: dict[int, str]
    last_missing: list[int]
    cost: Cost | None
    """None where the round was opened by a version that did not count."""
    history: list[AlgorithmRun]
    """Which algorithm merged which rounds."""
    next_command: str


def read_status(workspace: Workspace) -> Status:
    """Return where the federation stands."""
    config = read_running_config(workspace)
    head = read_head(workspace)
    manifest = head.manifest
    hidden = [client for client in manifest.cohort if is_hidden(workspace, client)]
    missing = [client for client in missing_clients(workspace, head) if client not in hidden]
    answered = [client for client in manifest.cohort if client not in missing and client not in hidden]
    needed = config.federation.needed_answers(len(manifest.cohort))
    last = manifest.aggregation
    return Status(
        workspace=str(workspace.root),
        round=head.number,
        rounds=manifest.rounds,
        state=manifest.state,
        task=manifest.task,
        algorithm=manifest.algorithm,
        next_algorithm=asdict(config.algorithm),
        learning_rate=manifest.train.learning_rate,
        cohort=manifest.cohort,
        answered=answered,
        missing=missing,
        hidden=hidden,
        joined=joined_clients(workspace, config.federation.clients),
        needed=needed,
        last_losses={entry.client: entry.train_loss for entry in last.counted} if last else {},
        last_refused={entry.client: entry.code for entry in last.refused} if last else {},
        last_missing=last.missing if last else [],
        cost=manifest.cost,
        history=manifest.history,
        next_command=_next_command(workspace, manifest.state, missing, len(answered) >= needed),
    )


def _next_command(workspace: Workspace, state: str, missing: list[int], is_ready: bool) -> str:
    if state == "finished":
        return "fedcli verify"
    if is_ready:
        return "fedcli server aggregate"
    return next_of_client(workspace, missing[0]) if missing else "fedcli client status --id N"


def next_of_client(workspace: Workspace, client: int) -> str:
    """Return what a client whose update is missing has to run: join, where it has no rows yet, or train."""
    if workspace.registration(client).exists() or workspace.client_rows(client).exists():
        return f"fedcli client train --id {client}"
    return f"fedcli client join --id {client} --data SOURCE"
