"""fedcli train-pooled."""

from pathlib import Path
from typing import TYPE_CHECKING, Self

from fedcli.commands.options import JsonOption, ThreadsOption, WorkspaceOption, found_federation
from fedcli.commands.output import TrainingDisplay, print_result

if TYPE_CHECKING:
    from fedcli.operations.baseline import BaselineResult

POOLED = "all rows pooled"


def train_pooled(
    threads: ThreadsOption = None, workspace: WorkspaceOption = None, json_output: JsonOption = False
) -> None:
    """Train on all clients' rows together, with the federation's steps and schedule (in a simulation only)."""
    federation = found_federation(workspace, threads)
    with BaselineDisplay(json_output, POOLED) as observer:
        result = federation.train_pooled(observer=observer)
    print_baseline(POOLED, result, workspace, json_output)


def print_baseline(title: str, result: "BaselineResult", workspace: Path | None, json_output: bool) -> None:
    """Print what became of a baseline."""
    done = "nothing to do, trained already" if result.status == "exists" else "trained"
    where = found_federation(workspace).workspace.baseline(result.name)
    text = f"{title}: {done}; loss {result.last_loss:.3f} in the last round; {where}"
    print_result(json_output, result, text)


class BaselineDisplay(TrainingDisplay):
    """One bar over all rounds of a baseline."""

    columns = TrainingDisplay.columns[:1]  # the loss

    def __enter__(self) -> Self:
        self.show(description=f"{self.title}: loading")
        return super().__enter__()

    def baseline_round(self, number: int, rounds: int, steps: int) -> None:
        self.begin(number * steps)
        self.show(description=f"{self.title}, round {number}/{rounds}", total=rounds * steps)
