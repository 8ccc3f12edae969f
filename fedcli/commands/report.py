"""fedcli report."""

from pathlib import Path
from typing import Annotated

from typer import Option

from fedcli.commands.options import JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import StepDisplay, print_result
from fedcli.quantities import plural


def report(
    output: Annotated[
        Path | None,
        Option(
            "--output",
            "-o",
            metavar="DIR",
            help="A folder for report.html and its pictures. Default: report/ of the workspace.",
        ),
    ] = None,
    tensorboard: Annotated[
        Path | None, Option(metavar="DIR", help="Write the same series as TensorBoard's event files, too.")
    ] = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Write a page that shows the federation: losses, scores, updates, bytes, time, who took part, and how it was set.

    One HTML file that needs no network, and each of its pictures as a PNG beside it.
    """
    with StepDisplay(json_output, "reading") as observer:
        result = found_federation(workspace).report(output=output, tensorboard=tensorboard, observer=observer)
    text = [f"report: {result.page}", f"pictures: {len(result.pictures)} PNGs beside it"]
    if result.tensorboard is not None:
        text.append(f"event files: {plural(result.num_values, 'value')} in {result.tensorboard}")
    print_result(json_output, result, text, hint="\n".join(f"note: {note}" for note in result.notes))
