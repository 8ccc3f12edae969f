"""fedcli train-alone and train-pooled: the baselines."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from fedcli.commands.options import (
    ClientOption,
    HomeOption,
    JsonOption,
    ThreadsOption,
    WorkspaceOption,
    found_federation,
)
from fedcli.commands.output import TrainingDisplay, print_result
from fedcli.federation import Federation

if TYPE_CHECKING:
    from fedcli.operations.baseline import BaselineResult


def train_alone(
    client: ClientOption,
    home: HomeOption = None,
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Train one client alone, with the federation's steps and schedule: the baseline that federation must beat."""
    federation = found_federation(workspace, threads)
    alone = federation.client(client, home=home)
    _train(federation, alone.train_alone, f"client {client} alone", json_output)


def train_pooled(
    threads: ThreadsOption = None, workspace: WorkspaceOption = None, json_output: JsonOption = False
) -> None:
    """Train on all clients' rows together, with the federation's steps and schedule (in a simulation only)."""
    federation = found_federation(workspace, threads)
    _train(federation, federation.train_pooled, "all rows pooled", json_output)


def _train(federation: Federation, train: "Callable[..., BaselineResult]", title: str, json_output: bool) -> None:
    with _Display(json_output, title) as observer:
        result = train(observer=observer)
    done = "nothing to do, trained already" if result.status == "exists" else "trained"
    where = federation.workspace.baseline(result.name)
    print_result(json_output, result, f"{title}: {done}; loss {result.last_loss:.3f} in the last round; {where}")


class _Display(TrainingDisplay):
    """One bar over all rounds of a baseline."""

    columns = TrainingDisplay.columns[:1]  # the loss

    def __enter__(self) -> Self:
        self.show(description=f"{self.title}: loading")
        return super().__enter__()

    def baseline_round(self, number: int, rounds: int, steps: int) -> None:
        self.begin(number * steps)
        self.show(description=f"{self.title}, round {number}/{rounds}", total=rounds * steps)
