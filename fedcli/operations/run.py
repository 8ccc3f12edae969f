"""The whole federation on one machine: clients take turns in one process, or in a few that stay warm."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedcli.client.due import ClientResult, train_client
from fedcli.client.runtimes import Runtimes
from fedcli.errors import BusyError, NotReadyError
from fedcli.observer import Observer
from fedcli.operations.workers import Workers
from fedcli.parties.party import is_here
from fedcli.scoring.after_rounds import note_due, score_due
from fedcli.server.aggregate import AggregationResult, aggregate
from fedcli.workspace.federation_state import POLL_SECONDS, FederationState
from fedcli.workspace.history import Round
from fedcli.workspace.inbox import arriving_clients


@dataclass(frozen=True)
class FederationResult:
    """How far the federation came: its round now, and how many this call merged.

    `left_out` counts rows of the clients that this call trained which they could not use, by reason.
    """

    round: int
    state: str
    num_merged: int
    left_out: dict[str, int]


def run_federation(
    federation: FederationState,
    *,
    runtimes: Runtimes,
    rounds: int | None = None,
    workers: int = 1,
    threads: int | None = None,
    observer: Observer,
) -> FederationResult:
    """Train and merge until the last round, or for `rounds` rounds; goes on where an interrupted call stopped.

    Each step is the one that `client train` and `server aggregate` make, on a model that stays loaded: in this process,
    or with more than one of `workers` in as many others. With the same number of threads each the results are the same,
    bit for bit.
    """
    note_due(federation)

    def score() -> None:
        """Score what is due, with the model that clients train on, where they train in this process."""
        for milestone in score_due(federation, runtimes):
            observer.round_scored(milestone)

    num_merged = 0
    left_out: dict[int, dict[str, int]] = {}
    shown = told = -1
    with Workers(federation.workspace, workers, threads=threads) as pool:
        while federation.head.manifest.state == "open" and (rounds is None or num_merged < rounds):
            head = federation.head
            if head.number != shown:
                observer.round_started(head)
                shown = head.number
            due = _due_clients(federation)
            results = pool.train(due, observer) if workers > 1 else _train_in_turn(federation, due, runtimes, observer)
            for result in results:
                if result.training is not None:
                    left_out[result.client] = result.training.left_out
                if result.round != head.number:  # another process merged the round meanwhile
                    break
            merged = _merge(federation, head, observer)
            if merged is None:
                elsewhere = [client for client in head.missing_clients() if not is_here(federation, client)]
                elsewhere += arriving_clients(head, head.manifest.cohort)
                if elsewhere and told != head.number:
                    names = ", ".join(map(str, elsewhere))
                    observer.waiting(f"round {head.number} waits for parties that are not here: {names}")
                    told = head.number
                    score()
                time.sleep(POLL_SECONDS)
                federation.refresh()
            else:
                observer.round_done(merged)
                num_merged += merged.published
                score()
        score()
    total = sum(map(Counter, left_out.values()), Counter())
    return FederationResult(federation.head.number, federation.head.manifest.state, num_merged, dict(total))


def _due_clients(federation: FederationState) -> list[int]:
    """Return the clients to train now: all that are missing and here, unless fewer are to count than were drawn."""
    head = federation.head
    missing = set(head.missing_clients())
    due = [client for client in head.draw_order if client in missing and is_here(federation, client)]
    num_answered = len(head.manifest.cohort) - len(missing)
    return due[: max(1, head.num_counted - num_answered)]


def _train_in_turn(
    federation: FederationState, clients: Sequence[int], runtimes: Runtimes, observer: Observer
) -> Iterator[ClientResult]:
    """Train clients in this process, one after another; one that another process trains is passed over."""
    for client in clients:
        observer.client_started(client)
        try:
            yield train_client(federation, client, runtimes, observer=observer)
        except BusyError:  # that process may finish, or die and leave it to the next turn
            continue


def _merge(federation: FederationState, head: Round, observer: Observer) -> AggregationResult | None:
    """Merge the round, or return None where that must wait for other processes."""
    try:
        return aggregate(federation, observer=observer)
    except BusyError:
        return None
    except NotReadyError:
        is_complete = not head.missing_clients() and not arriving_clients(head, head.manifest.cohort)
        if is_complete and federation.head.number == head.number:
            raise  # no valid update: waiting would not help
        return None
