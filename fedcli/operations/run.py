"""The whole federation on one machine: clients take turns in one process, or in a few that stay warm."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from fedcli.client.due import ClientResult, train_client
from fedcli.client.runtime import Runtimes
from fedcli.errors import BusyError, NotReadyError
from fedcli.operations.workers import WorkerObserver, Workers
from fedcli.parties.party import is_here
from fedcli.scoring.after_rounds import Milestone, check_milestones, score_milestone
from fedcli.server.aggregate import AggregationResult, aggregate
from fedcli.workspace.history import Round, missing_clients, read_head
from fedcli.workspace.layout import Workspace
from fedcli.workspace.settings import POLL_SECONDS, read_running_config


class FederationObserver(WorkerObserver, Protocol):
    """Hears what happens in a federation, to show it."""

    def round_started(self, head: Round) -> None:
        """A round is open."""

    def waiting(self, round_number: int, clients: list[int]) -> None:
        """Only parties that train elsewhere are missing now."""

    def round_done(self, result: AggregationResult) -> None:
        """The round's updates were merged."""

    def round_scored(self, milestone: Milestone) -> None:
        """The new round was scored, as fedcli.yaml asks, or could not be."""


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
    workspace: Workspace,
    observer: FederationObserver,
    *,
    rounds: int | None = None,
    workers: int = 1,
    threads: int | None = None,
) -> FederationResult:
    """Train and merge until the last round, or for `rounds` rounds; goes on where an interrupted call stopped.

    Each step is the one that `client train` and `server aggregate` make, on a model that stays loaded: in this process,
    or with more than one of `workers` in as many others. With the same number of threads each the results are the same,
    bit for bit.
    """
    check_milestones(read_running_config(workspace))
    runtimes = Runtimes(workspace, threads=threads)

    def score() -> None:
        """Score the latest round where that is due, with a model that is loaded, if one is."""
        milestone = score_milestone(workspace, runtime=runtimes.shared)
        if milestone is not None:
            observer.round_scored(milestone)

    num_merged = 0
    left_out: dict[int, dict[str, int]] = {}
    shown = told = -1
    with Workers(workspace, workers, threads=threads) as pool:
        score()
        while (head := read_head(workspace)).manifest.state == "open" and (rounds is None or num_merged < rounds):
            if head.number != shown:
                observer.round_started(head)
                shown = head.number
            due = _due_clients(workspace, head)
            results = pool.train(due, observer) if workers > 1 else _train_in_turn(workspace, due, runtimes, observer)
            for result in results:
                if result.training is not None:
                    left_out[result.client] = result.training.left_out
                if result.round != head.number:  # another process merged the round meanwhile
                    break
            merged = _merge(workspace, head)
            if merged is None:
                elsewhere = [client for client in missing_clients(workspace, head) if not is_here(workspace, client)]
                if elsewhere and told != head.number:
                    observer.waiting(head.number, elsewhere)
                    told = head.number
                time.sleep(POLL_SECONDS)
            else:
                observer.round_done(merged)
                num_merged += merged.published
                score()
    total = sum(map(Counter, left_out.values()), Counter())
    return FederationResult(head.number, head.manifest.state, num_merged, dict(total))


def _due_clients(workspace: Workspace, head: Round) -> list[int]:
    """Return the clients to train now: all that are missing and here, unless fewer are to count than were drawn."""
    missing = set(missing_clients(workspace, head))
    due = [client for client in head.draw_order if client in missing and is_here(workspace, client)]
    num_answered = len(head.manifest.cohort) - len(missing)
    return due[: max(1, head.num_counted - num_answered)]


def _train_in_turn(
    workspace: Workspace, clients: Sequence[int], runtimes: Runtimes, observer: FederationObserver
) -> Iterator[ClientResult]:
    """Train clients in this process, one after another; one that another process trains is passed over."""
    for client in clients:
        observer.client_started(client)
        try:
            yield train_client(
                workspace, client, load_runtime=runtimes.load, on_step=partial(observer.step_done, client)
            )
        except BusyError:  # that process may finish, or die and leave it to the next turn
            continue


def _merge(workspace: Workspace, head: Round) -> AggregationResult | None:
    """Merge the round, or return None where that must wait for other processes."""
    try:
        return aggregate(workspace)
    except BusyError:
        return None
    except NotReadyError:
        if not missing_clients(workspace, head) and read_head(workspace).number == head.number:
            raise  # no valid update: waiting would not help
        return None
