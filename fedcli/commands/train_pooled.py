"""fedcli train-pooled."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fedcli.commands.options import JsonOption, ThreadsOption, WorkspaceOption, found_federation
from fedcli.commands.output import Silent, print_json, progress_display
from fedcli.observer import Observer

if TYPE_CHECKING:
    from rich.progress import Progress

    from fedcli.operations.baseline import BaselineResult
    from fedcli.training.reports import StepReport

POOLED = "all rows pooled"


def train_pooled(
    threads: ThreadsOption = None, workspace: WorkspaceOption = None, json_output: JsonOption = False
) -> None:
    """Train on all clients' rows together, with the federation's steps and schedule (in a simulation only)."""
    federation = found_federation(workspace, threads)
    with baseline_display(POOLED, json_output) as observer:
        result = federation.train_pooled(observer=observer)
    print_baseline(POOLED, result, workspace, json_output)


@contextmanager
def baseline_display(title: str, json_output: bool) -> Iterator[Observer]:
    """Show how far a baseline is."""
    with progress_display(json_output, "loss {task.fields[loss]:.3f}") as progress:
        yield _Display(progress, title)


def print_baseline(title: str, result: "BaselineResult", workspace: Path | None, json_output: bool) -> None:
    """Print what became of a baseline."""
    if json_output:
        print_json(result)
        return
    done = "nothing to do, trained already" if result.status == "exists" else "trained"
    where = found_federation(workspace).workspace.baseline(result.name)
    print(f"{title}: {done}; loss {result.last_loss:.3f} in the last round; {where}")


class _Display(Observer):
    """One bar over all rounds of a baseline."""

    def __init__(self, progress: "Progress | Silent", title: str) -> None:
        self._progress = progress
        self._title = title
        self._task = progress.add_task(f"{title}: loading", total=None, loss=float("nan"))
        self._steps_before = 0

    def baseline_round(self, number: int, rounds: int, steps: int) -> None:
        self._steps_before = number * steps
        self._progress.update(self._task, description=f"{self._title}, round {number}/{rounds}", total=rounds * steps)

    def step_done(self, client: int | None, report: "StepReport") -> None:
        self._progress.update(self._task, completed=self._steps_before + report.step, loss=report.loss)
