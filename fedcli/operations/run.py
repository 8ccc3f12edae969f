"""The whole federation on one machine: clients take turns in one process, or in a few that stay warm."""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from fedcli.client.due import ClientResult, try_client
from fedcli.client.local_round import Training
from fedcli.client.runtimes import Runtimes
from fedcli.data.row_report import RowReport
from fedcli.errors import BusyError, ClientFailure, FedError, NotReadyError, error_of
from fedcli.observer import Observer
from fedcli.operations.workers import Workers
from fedcli.parties.party import is_here
from fedcli.quantities import name_clients
from fedcli.scoring.after_rounds import note_due, score_due
from fedcli.server.aggregate import AggregationResult, aggregate
from fedcli.server.quorum import needed_answers, seconds_left
from fedcli.workspace.arriving import arriving
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.history import Round
from fedcli.workspace.locks import hold
from fedcli.workspace.privacy_ledger import check_any_budget


@dataclass(frozen=True)
class FederationResult:
    """How far the federation came: its round now, and how many this call merged.

    `left_out` counts rows of the clients that this call trained which they could not use, by reason; `failed` are the
    clients that could not be trained, once for each reason.
    """

    round: int
    state: str
    num_merged: int
    left_out: dict[str, int]
    notes: dict[str, int]
    """Rows of these clients of which not all is used, by what is not."""
    first_cases: dict[str, str]
    """The first row left out for each reason: where it is, and what was found."""
    unused: dict[str, int]
    """Rows that have a column, or a key inside one, which is not used."""
    failed: list[ClientFailure]


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

    A client that fails is left out of the round, which goes on with the others, and is tried again in the next one.
    Where too few are left for the quorum, all others are trained, and then the first failure's kind of error is raised,
    with all of the call's in its `failed`.
    """
    with suppress(BusyError), hold(federation.workspace.server_lock, "the server's work"):
        pass  # a workspace that cannot be written is no fault of the first client's
    note_due(federation)

    def score() -> None:
        """Score what is due, with the model that clients train on, where they train in this process."""
        for milestone in score_due(federation, runtimes, observer):
            observer.round_scored(milestone)

    num_merged = 0
    trained: dict[int, Training] = {}
    failed: list[ClientFailure] = []
    shown = told = -1
    with Workers(federation.workspace, workers, threads=threads) as pool:
        while federation.head.manifest.state == "open" and (rounds is None or num_merged < rounds):
            head = federation.head
            if head.number != shown:
                if head.manifest.privacy is not None:
                    check_any_budget([*federation.past(), head], head.awaited_clients())
                observer.round_started(head)
                shown = head.number
            due = _due_clients(federation, failed)
            if workers > 1:
                results = pool.train(due, head.number, observer)
            else:
                results = _train_in_turn(federation, due, runtimes, observer)
            has_failed = False
            for result in results:
                if isinstance(result, ClientFailure):
                    failed.append(result)
                    has_failed = True
                    continue
                if result.training is not None:
                    trained[result.client] = result.training
                if result.round != head.number:  # another process merged the round meanwhile
                    break
            if has_failed and _due_clients(federation, failed):
                continue  # another one of the cohort may take its place
            merged = _merge(federation, head, failed, observer)
            if merged is None:
                _check_failures(federation, head, failed)
                elsewhere = [client for client in head.missing_clients() if not is_here(federation, client)]
                elsewhere += arriving(head, head.manifest.cohort, is_quick=True)
                if elsewhere and told != head.number:
                    names = ", ".join(map(str, elsewhere))
                    who = "clients" if federation.is_simulation else "parties"
                    observer.waiting(f"round {head.number} waits for {who} that are not here: {names}")
                    told = head.number
                    score()
                time.sleep(federation.poll_seconds)
                federation.refresh()
            else:
                observer.round_done(merged)
                num_merged += merged.published
                score()
        score()
    report, head = RowReport(), federation.head
    for training in trained.values():
        report.include(training)
    return FederationResult(
        round=head.number,
        state=head.manifest.state,
        num_merged=num_merged,
        failed=_once_each(failed),
        **report.counts(),
    )


def _once_each(failed: Sequence[ClientFailure]) -> list[ClientFailure]:
    """Return the first failure of each client for each reason."""
    return list({(each.client, each.message): each for each in reversed(failed)}.values())[::-1]


def _failed_in(head: Round, failed: Sequence[ClientFailure]) -> list[ClientFailure]:
    """Return the failures in a round of clients that have not answered it since, in the order of the draw."""
    of_round = {each.client: each for each in failed if each.round == head.number and not head.has_update(each.client)}
    return [of_round[client] for client in head.draw_order if client in of_round]


def _due_clients(federation: FederationState, failed: Sequence[ClientFailure]) -> list[int]:
    """Return the clients to train now: all that are missing, here and have not failed, or as many as are to count."""
    head = federation.head
    missing = set(head.missing_clients())
    passed_over = {failure.client for failure in _failed_in(head, failed)}
    due = [client for client in head.draw_order if client in missing - passed_over and is_here(federation, client)]
    num_answered = len(head.awaited_clients()) - len(missing)
    return due[: max(1, head.num_counted - num_answered)]


def _check_failures(federation: FederationState, head: Round, failed: Sequence[ClientFailure]) -> None:
    """Raise the first failure's kind of error where the round cannot close: too few of its clients may still answer."""
    if not (of_round := _failed_in(head, failed)) or federation.head.number != head.number:
        return
    cohort, missing = head.awaited_clients(), head.missing_clients()
    num_answered, num_waiting = len(cohort) - len(missing), len(missing) - len(of_round)
    waits_for_deadline = seconds_left(federation) is not None and num_answered + num_waiting > 0
    if num_answered + num_waiting >= needed_answers(federation) or waits_for_deadline:
        return
    names = name_clients([failure.client for failure in of_round])
    error: FedError = error_of(
        f"round {head.number} cannot close: {needed_answers(federation)} of its {len(cohort)} clients must answer, "
        f"{num_answered} have, and {names} failed",
        of_round,
    )
    error.failed = _once_each(failed)
    raise error


def _train_in_turn(
    federation: FederationState, clients: Sequence[int], runtimes: Runtimes, observer: Observer
) -> Iterator[ClientResult | ClientFailure]:
    """Train clients in this process, one after another; one that another process trains is passed over."""
    for client in clients:
        observer.client_started(client)
        try:
            yield try_client(federation, client, runtimes, observer=observer)
        except BusyError:  # that process may finish, or die and leave it to the next turn
            continue


def _merge(
    federation: FederationState, head: Round, failed: Sequence[ClientFailure], observer: Observer
) -> AggregationResult | None:
    """Merge the round, or return None where that must wait for other processes."""
    try:
        return aggregate(federation, observer=observer)
    except BusyError:
        return None
    except NotReadyError:
        missing, have_failed = {*head.missing_clients()}, {each.client for each in _failed_in(head, failed)}
        may_answer = missing if seconds_left(federation) is not None else missing - have_failed
        is_complete = not may_answer and not arriving(head, head.manifest.cohort, is_quick=True)
        if is_complete and federation.head.number == head.number:
            _check_failures(federation, head, failed)
            raise  # no valid update: waiting would not help
        return None
