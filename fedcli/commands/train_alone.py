"""fedcli train-alone."""

from typing import TYPE_CHECKING

from fedcli.commands.options import ClientOption, JsonOption, ThreadsOption, WorkspaceOption
from fedcli.commands.output import print_json, progress_display

if TYPE_CHECKING:
    from fedcli.training.reports import StepReport


def train_alone(
    client: ClientOption,
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Train one client alone, with the federation's steps and schedule: the baseline that federation must beat."""
    from fedcli.rounds import baseline
    from fedcli.workspace.layout import find_workspace

    found = find_workspace(workspace)
    with progress_display(json_output, "loss {task.fields[loss]:.3f}") as progress:
        task = progress.add_task(f"client {client} alone: loading", total=None, loss=float("nan"))

        def show(round_number: int, rounds: int, steps: int, report: "StepReport") -> None:
            progress.update(
                task,
                description=f"client {client} alone, round {round_number}/{rounds}",
                total=rounds * steps,
                completed=round_number * steps + report.step,
                loss=report.loss,
            )

        result = baseline.train_alone(found, client, threads=threads, on_step=show)
    if json_output:
        print_json(result)
    else:
        done = "nothing to do, trained already" if result.status == "exists" else "trained"
        print(
            f"client {client} alone: {done}; loss {result.last_loss:.3f} in the last round; "
            f"{found.baseline(result.name)}"
        )
