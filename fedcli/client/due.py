"""What is due for clients in the open round; cheap where that is nothing: no numpy, and no torch."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedcli.errors import BusyError, FedError
from fedcli.parties.party import Party, can_train, find_party
from fedcli.training.reports import StepReport
from fedcli.workspace.history import Round, is_submitted, missing_clients, read_head
from fedcli.workspace.layout import Workspace
from fedcli.workspace.locks import hold
from fedcli.workspace.publish import remove_temporaries
from fedcli.workspace.settings import POLL_SECONDS, check_client, read_running_config

if TYPE_CHECKING:
    from fedcli.client.runtime import Runtime

ClientStatus = Literal["not_selected", "already_submitted", "submitted", "finished", "due"]


@dataclass(frozen=True)
class Training:
    """What a client did in a round that it trained in."""

    num_samples: int
    num_truncated: int
    left_out: dict[str, int]
    """Rows that were not used, by reason."""
    losses: list[float]
    seconds: float
    num_tokens: int

    @property
    def num_unusable(self) -> int:
        """All rows that were not used."""
        return sum(self.left_out.values())

    @property
    def mean_loss(self) -> float:
        """The mean loss over the steps."""
        return math.fsum(self.losses) / len(self.losses)


@dataclass(frozen=True)
class ClientResult:
    """How a client stands in a round; `training` is there where this call trained."""

    status: ClientStatus
    client: int
    round: int
    training: Training | None = None


def client_status(workspace: Workspace, client: int, head: Round | None = None) -> ClientResult:
    """Return how a client stands in the open round; raise UsageError for an id that no client has."""
    config = read_running_config(workspace)
    check_client(client, config)
    head = head or read_head(workspace)
    status: ClientStatus = "due"
    if head.manifest.state == "finished":
        status = "finished"
    elif client not in head.manifest.cohort:
        status = "not_selected"
    elif is_submitted(workspace, head.number, client):
        status = "already_submitted"
    return ClientResult(status, client, head.number)


def train_client(
    workspace: Workspace,
    client: int,
    *,
    home: Path | None = None,
    wait: float = 0.0,
    load_runtime: "Callable[[Round, Party], Runtime]",
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> ClientResult:
    """Do what is due for a client: train on the open round's adapter and drop the update.

    Nothing is due where the client is not in the cohort, has sent its update, or the federation has finished; then the
    call looks again for `wait` seconds. `load_runtime` is called only when there is work; `home` is a joined party's,
    where it is not the default. Raises BusyError while another process trains this client.
    """
    deadline = time.monotonic() + wait
    while True:
        result = client_status(workspace, client)
        if result.status == "due":
            party = find_party(workspace, read_running_config(workspace), client, home)
            try:
                with hold(party.home.lock, f"client {client}"):
                    head = read_head(workspace)
                    result = client_status(workspace, client, head)
                    if result.status != "due":  # another process did it while this one came to the lock
                        return result
                    return _train(workspace, head, party, load_runtime, on_step)
            except BusyError:
                if time.monotonic() + POLL_SECONDS > deadline:
                    raise
        elif result.status == "finished" or time.monotonic() + POLL_SECONDS > deadline:
            return result
        time.sleep(POLL_SECONDS)


def train_clients(
    workspace: Workspace,
    clients: Sequence[int] | None,
    *,
    wait: float = 0.0,
    load_runtime: "Callable[[Round, Party], Runtime]",
    on_client: Callable[[int], None] = lambda client: None,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> list[ClientResult]:
    """Do what is due for several clients, one after another; return how each of them stands.

    For None these are all clients of the open round that are missing, are here, and that nobody else trains now; what
    is returned is then about those that this call trained. Where nothing is due for any the call looks again for `wait`
    seconds. An error of one client does not keep the others from their turn; the first one is raised in the end.
    """
    config = read_running_config(workspace)
    for client in clients or ():
        check_client(client, config)
    deadline = time.monotonic() + wait
    while True:
        head = read_head(workspace)
        results: list[ClientResult] = []
        errors: list[FedError] = []
        for client in _claimable(workspace, head) if clients is None else clients:
            on_client(client)
            try:
                results.append(train_client(workspace, client, load_runtime=load_runtime, on_step=on_step))
            except FedError as error:
                if clients is not None or not isinstance(error, BusyError):
                    errors.append(error)
        if errors:
            raise errors[0]
        has_trained = any(result.training for result in results)
        if has_trained or head.manifest.state == "finished" or time.monotonic() + POLL_SECONDS > deadline:
            return results if clients is not None else [result for result in results if result.training]
        time.sleep(POLL_SECONDS)


def _claimable(workspace: Workspace, head: Round) -> Iterator[int]:
    """Yield the clients of a round whose updates are missing and whose rows are here, in the order of the draw."""
    missing = set(missing_clients(workspace, head))
    return (client for client in head.draw_order if client in missing and can_train(workspace, client))


def _train(
    workspace: Workspace,
    head: Round,
    party: Party,
    load_runtime: "Callable[[Round, Party], Runtime]",
    on_step: Callable[[StepReport], None],
) -> ClientResult:
    """Train and drop, under the client's lock."""
    from fedcli.client.local_round import contribute

    remove_temporaries(workspace.client_inbox(party.client))
    training, is_first = contribute(workspace, head, party, load_runtime, on_step)
    return ClientResult("submitted" if is_first else "already_submitted", party.client, head.number, training)
