"""fedcli train-pooled."""

from pathlib import Path
from typing import TYPE_CHECKING

from fedcli.commands.options import JsonOption, ThreadsOption, WorkspaceOption
from fedcli.commands.output import print_json, progress_display

if TYPE_CHECKING:
    from fedcli.training.reports import StepReport


def train_pooled(
    threads: ThreadsOption = None, workspace: WorkspaceOption = None, json_output: JsonOption = False
) -> None:
    """Train on all clients' rows together, with the federation's steps and schedule (in a simulation only)."""
    train_and_print(None, threads, workspace, json_output)


def train_and_print(
    client: int | None, threads: int | None, workspace: Path | None, json_output: bool, home: Path | None = None
) -> None:
    """Train a client's baseline, or the pooled one for None."""
    from fedcli.operations import baseline
    from fedcli.workspace.layout import find_workspace

    found = find_workspace(workspace)
    title = "all rows pooled" if client is None else f"client {client} alone"
    with progress_display(json_output, "loss {task.fields[loss]:.3f}") as progress:
        task = progress.add_task(f"{title}: loading", total=None, loss=float("nan"))

        def show(round_number: int, rounds: int, steps: int, report: "StepReport") -> None:
            progress.update(
                task,
                description=f"{title}, round {round_number}/{rounds}",
                total=rounds * steps,
                completed=round_number * steps + report.step,
                loss=report.loss,
            )

        result = baseline.train_baseline(found, client, home=home, threads=threads, on_step=show)
    if json_output:
        print_json(result)
    else:
        done = "nothing to do, trained already" if result.status == "exists" else "trained"
        print(f"{title}: {done}; loss {result.last_loss:.3f} in the last round; {found.baseline(result.name)}")
