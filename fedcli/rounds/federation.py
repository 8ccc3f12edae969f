"""The whole federation on one machine: clients take turns in one process, with the base model loaded once."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fedcli.errors import BusyError, NotReadyError
from fedcli.rounds.aggregation import AggregationResult, aggregate
from fedcli.rounds.client import ClientResult, train_client
from fedcli.rounds.runtime import Runtime
from fedcli.rounds.settings import read_running_config
from fedcli.training.reports import StepReport
from fedcli.workspace.history import Round, is_submitted, missing_clients, read_head
from fedcli.workspace.layout import Workspace

POLL_SECONDS = 0.5


class FederationObserver(Protocol):
    """Hears what happens in a federation, to show it."""

    def round_started(self, head: Round) -> None:
        """A round is open."""

    def client_started(self, client: int) -> None:
        """A client begins to train."""

    def step_done(self, report: StepReport) -> None:
        """The client made an optimiser step."""

    def client_done(self, result: ClientResult) -> None:
        """The client has dropped its update, or another process had done so."""

    def round_done(self, result: AggregationResult) -> None:
        """The round's updates were merged."""


@dataclass(frozen=True)
class FederationResult:
    """How far the federation came: its round now, and how many this call merged."""

    round: int
    state: str
    num_merged: int


def run_federation(
    workspace: Workspace, observer: FederationObserver, *, rounds: int | None = None, threads: int | None = None
) -> FederationResult:
    """Train and merge until the last round, or for `rounds` rounds; goes on where an interrupted call stopped.

    Each step is the one that `client train` and `server aggregate` make, on a model that stays loaded: with the same
    number of threads the results are the same, bit for bit.
    """
    runtime: Runtime | None = None

    def load_runtime(head: Round) -> Runtime:
        nonlocal runtime
        runtime = runtime or Runtime(workspace, read_running_config(workspace), head, threads=threads)
        return runtime

    num_merged = 0
    head = read_head(workspace)
    while head.manifest.state == "open" and (rounds is None or num_merged < rounds):
        observer.round_started(head)
        for client in head.manifest.cohort:
            if not is_submitted(workspace, head.number, client):
                _train_in_turn(workspace, client, load_runtime, observer)
        num_merged += _merge(workspace, head, observer)
        head = read_head(workspace)
    return FederationResult(head.number, head.manifest.state, num_merged)


def _train_in_turn(
    workspace: Workspace, client: int, load_runtime: Callable[[Round], Runtime], observer: FederationObserver
) -> None:
    """Train one client, unless another process is doing so."""
    observer.client_started(client)
    try:
        result = train_client(workspace, client, load_runtime=load_runtime, on_step=observer.step_done)
    except BusyError:
        return
    observer.client_done(result)


def _merge(workspace: Workspace, head: Round, observer: FederationObserver) -> bool:
    """Merge the round as soon as the clients that other processes train have answered; return whether we did."""
    while True:
        try:
            result = aggregate(workspace)
        except BusyError:
            time.sleep(POLL_SECONDS)
        except NotReadyError:
            if not missing_clients(workspace, head):
                raise  # no valid update: waiting would not help
            time.sleep(POLL_SECONDS)
        else:
            observer.round_done(result)
            return result.published
        if read_head(workspace).number > head.number:
            return False
