"""What is due for clients in the open round; cheap where that is nothing: no numpy, and no torch."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedcli.client.runtimes import Runtimes
from fedcli.errors import ArrivingError, BusyError, ClientFailure, error_of, failure_of
from fedcli.observer import Observer
from fedcli.parties.party import Party, can_train, find_party, is_here
from fedcli.quantities import name_clients
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.idle import note, recall
from fedcli.workspace.layout import MANIFEST, UPDATE_RECORD, Workspace
from fedcli.workspace.locks import hold

if TYPE_CHECKING:
    from fedcli.client.local_round import Training
    from fedcli.client.secure_round import SecureRound
    from fedcli.client.signing import Member

ClientStatus = Literal[
    "not_selected",
    "gone",
    "already_submitted",
    "submitted",
    "finished",
    "due",
    "waiting",
    "too_late",
    "repair_due",
    "answered",
    "already_answered",
]
_TO_DO = ("due", "repair_due")
_IDLE = ("not_selected", "already_submitted", "finished")
"""Of which nothing follows while no round opens."""


@dataclass(frozen=True)
class ClientResult:
    """How a client stands in a round; `training` is there where this call trained."""

    status: ClientStatus
    client: int
    round: int
    training: "Training | None" = None

    @property
    def has_worked(self) -> bool:
        """Whether this call did anything: it trained, or in a masked round sent again, or answered."""
        return self.training is not None or self.status in ("submitted", "answered")


def client_status(federation: FederationState, client: int) -> ClientResult:
    """Return how a client stands in the open round; raise UsageError for an id that no client has."""
    federation.check_clients([client])
    head = federation.head
    status: ClientStatus = "due"
    if head.manifest.state == "finished":
        status = "finished"
    elif client not in head.manifest.cohort:
        status = "not_selected"
    elif federation.identity.signatures is not None and _is_gone(federation, client):
        status = "gone"
    elif head.manifest.secure_aggregation is not None:
        from fedcli.workspace.secure_files import standing  # of no other federation: it loads numpy

        status = standing(head, client)
    elif head.has_update(client):
        status = "already_submitted"
    return ClientResult(status, client, head.number)


def remembered_status(workspace: Workspace, client: int) -> ClientResult | None:
    """Return how a client of a workspace elsewhere stood, where nothing has changed since that gives it work."""
    noted = recall(workspace, str(client))
    if noted is None or noted.get("status") not in _IDLE or not isinstance(noted.get("round"), int):
        return None
    return ClientResult(noted["status"], client, noted["round"])


def remember_status(federation: FederationState, result: ClientResult) -> None:
    """Note a result of which nothing follows until the next round opens, or the client's update is set aside."""
    workspace, head, name = federation.workspace, federation.head, federation.workspace.name
    if not workspace.store.is_remote or result.status not in _IDLE or result.round != head.number:
        return
    following = name(workspace.round(head.number + 1) / MANIFEST)
    beside = {
        "finished": {name(head.folder / MANIFEST): True},
        "already_submitted": {name(workspace.update(head.number, result.client) / UPDATE_RECORD): True},
    }
    names = {following: False, **beside.get(result.status, {name(workspace.identity): True})}
    if head.manifest.secure_aggregation is not None and result.status == "already_submitted":
        names |= {name(workspace.repair_of(head.number)): False}
    note(workspace, str(result.client), {"status": result.status, "round": result.round}, names)


def _is_gone(federation: FederationState, client: int) -> bool:
    """Return whether a client has left, is about to, or was revoked."""
    from fedcli.workspace.enrolment import read_enrolment

    enrolment, workspace = read_enrolment(federation.workspace), federation.workspace
    if client in enrolment.gone or not workspace.store.exists(workspace.name(workspace.leaving(client))):
        return client in enrolment.gone
    from fedcli.parties.membership import has_left

    return has_left(federation, client, enrolment)


def train_client(
    federation: FederationState,
    client: int,
    runtimes: Runtimes,
    *,
    home: Path | None = None,
    wait: float = 0.0,
    observer: Observer,
) -> ClientResult:
    """Do what is due for a client: train on the open round's adapter and drop the update.

    Nothing is due where the client is not in the cohort, has sent its update, or the federation has finished; then the
    call looks again for `wait` seconds. A model is loaded only when there is work; `home` is a joined party's, where it
    is not the default. Raises BusyError while another process trains this client.
    """
    deadline = time.monotonic() + wait
    while True:
        result = client_status(federation, client)
        if result.status in _TO_DO:
            party = find_party(federation, client, home)
            try:
                with hold(party.home.lock, f"client {client}"):
                    federation.refresh()
                    result = client_status(federation, client)
                    if result.status not in _TO_DO:  # another process did it while this one came to the lock
                        return result
                    _check_arrived(federation)
                    if federation.head.manifest.secure_aggregation is not None:
                        return _train_masked(federation, party, result.status, runtimes, observer)
                    return _train(federation, party, runtimes, observer)
            except BusyError:
                if time.monotonic() + federation.poll_seconds > deadline:
                    raise
        elif result.status == "finished" or time.monotonic() + federation.poll_seconds > deadline:
            return result
        time.sleep(federation.poll_seconds)
        federation.refresh()


def try_client(
    federation: FederationState, client: int, runtimes: Runtimes, *, refresh: bool = False, observer: Observer
) -> ClientResult | ClientFailure:
    """Do what is due for one of several clients; return what went wrong, a bug too, so that the others have their turn.

    With `refresh` a party's changed rows are registered anew before. The observer hears how it ended. Raises BusyError
    while another process trains this client.
    """
    done: ClientResult | ClientFailure
    try:
        if refresh:
            refresh_rows(federation, client, observer=observer)
        done = train_client(federation, client, runtimes, observer=observer)
    except BusyError:
        raise
    except Exception as error:
        import traceback  # whoever has nothing to do would pay for it, and for logging

        log_failure(client, traceback.format_exc())
        done = failure_of(client, federation.head.number, error)
    tell(done, observer)
    return done


def refresh_rows(
    federation: FederationState, client: int, home: Path | None = None, *, observer: Observer
) -> tuple[int, int] | None:
    """Register a party's rows anew where they have changed, and say so; return how many there were and are.

    While a masked update waits for the others it holds that the party has registered as many rows as went into it.
    """
    if federation.head.manifest.secure_aggregation is not None and federation.head.has_update(client):
        return None
    from fedcli.parties.join import refresh_registration

    changed = refresh_registration(federation, client, home, observer=observer)
    if changed is not None:
        observer.noted(f"client {client}: registered anew with {changed[1]} rows, before {changed[0]}")
    return changed


def tell(done: ClientResult | ClientFailure, observer: Observer) -> None:
    """Tell an observer how a client's turn ended."""
    if isinstance(done, ClientFailure):
        observer.client_failed(done)
    elif done.training is not None:
        observer.client_done(done)


def log_failure(client: int, trace: str) -> None:
    """Keep the traceback of a client's error for --debug."""
    import logging

    logging.getLogger(__name__).debug("client %d failed\n%s", client, trace)


def train_clients(
    federation: FederationState,
    clients: Sequence[int] | None,
    runtimes: Runtimes,
    *,
    wait: float = 0.0,
    refresh: bool = False,
    observer: Observer,
) -> list[ClientResult]:
    """Do what is due for several clients, one after another; return how each of them stands.

    For None these are all clients of the open round that are missing, are here, and that nobody else trains now; what
    is returned is then about those that this call trained. `refresh` is as in `try_client`. Where nothing is due for
    any the call looks again for `wait` seconds. A client that fails does not keep the others from their turn: the error
    that is raised in the end is of the first one's kind, with all of them in `failed` and the results of the others in
    `done`.
    """
    federation.check_clients(clients or ())
    deadline = time.monotonic() + wait
    while True:
        results: list[ClientResult] = []
        failed: list[ClientFailure] = []
        for client in _claimable(federation) if clients is None else clients:
            observer.client_started(client)
            try:
                done = try_client(federation, client, runtimes, refresh=refresh, observer=observer)
            except BusyError as error:
                if clients is None:
                    continue
                done = failure_of(client, federation.head.number, error)
                observer.client_failed(done)
            if isinstance(done, ClientFailure):
                failed.append(done)
            else:
                results.append(done)
        told = results if clients is not None else [result for result in results if result.has_worked]
        if failed:
            raised = error_of(f"{name_clients([failure.client for failure in failed])} could not be trained", failed)
            raised.done = told
            raise raised
        has_trained = any(result.has_worked for result in results)
        is_finished = federation.head.manifest.state == "finished"
        if has_trained or is_finished or time.monotonic() + federation.poll_seconds > deadline:
            return told
        time.sleep(federation.poll_seconds)
        federation.refresh()


def _claimable(federation: FederationState) -> Iterator[int]:
    """Yield the clients of the open round whose updates are missing and that are here, in the draw's order.

    One of a simulation whose file of rows is gone is among them: it fails, and is not passed over for ever.
    """
    head = federation.head
    missing = set(head.missing_clients())
    if head.manifest.secure_aggregation is not None:
        missing = {client for client in head.awaited_clients() if client_status(federation, client).status in _TO_DO}
    here = is_here if federation.identity.simulation else can_train
    return (client for client in federation.head.draw_order if client in missing and here(federation, client))


def _check_arrived(federation: FederationState) -> None:
    """Raise ArrivingError where the open round is not all there yet."""
    from fedcli.workspace.arriving import missing_of_round

    if missing := missing_of_round(federation.head):
        raise ArrivingError(
            f"round {federation.head.number} is arriving: {missing}",
            hint=f"Wait until it is copied; where nothing copies it, {federation.head.folder} is damaged.",
        )


def _train(federation: FederationState, party: Party, runtimes: Runtimes, observer: Observer) -> ClientResult:
    from fedcli.client.local_round import train_and_drop
    from fedcli.workspace.inbox import clear_discarded

    workspace = federation.workspace
    workspace.store.sweep(workspace.name(workspace.client_inbox(party.client)))
    clear_discarded(federation.head, party.client)
    training, is_first = train_and_drop(federation, party, runtimes, observer)
    status: ClientStatus = "submitted" if is_first else "already_submitted"
    return ClientResult(status, party.client, federation.head.number, training)


def _train_masked(
    federation: FederationState, party: Party, due: ClientStatus, runtimes: Runtimes, observer: Observer
) -> ClientResult:
    def work(entered: "SecureRound") -> "tuple[Training | None, bool]":
        from fedcli.client.local_round import train_and_drop

        return train_and_drop(federation, party, runtimes, observer, entered)

    return take_part_masked(federation, party, due, work, observer)


def take_part_masked(
    federation: FederationState,
    party: "Member",
    due: ClientStatus,
    work: "Callable[[SecureRound], tuple[Training | None, bool]]",
    observer: Observer,
) -> ClientResult:
    """Do what is due in a round of secure aggregation: `work` and drop, drop again what was masked, or answer.

    Whoever calls this holds the client's lock.
    """
    from fedcli.client.secure_round import answer_repair, drop_again, enter, withdraw
    from fedcli.workspace.secure_files import remove_update

    workspace, head, client = federation.workspace, federation.head, party.client
    workspace.store.sweep(workspace.name(workspace.client_inbox(client)))
    if workspace.is_discarded(head.number, client):
        remove_update(head, client)
    entered = enter(federation, party, observer)
    if due == "repair_due":
        if withdraw(entered, observer):
            return ClientResult("too_late", client, head.number)
        is_first = answer_repair(entered)
        return ClientResult("answered" if is_first else "already_answered", client, head.number)
    training = None
    if entered.journal is not None:
        is_first = drop_again(entered, observer)
    else:
        training, is_first = work(entered)
    status: ClientStatus = "submitted" if is_first else client_status(federation, client).status
    return ClientResult(status, client, head.number, training)
