"""fedcli data partition."""

from typing import Annotated

from typer import Option

from fedcli.commands.options import JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import StepDisplay, at, describe_data, print_result


def partition(
    replace: Annotated[
        bool, Option("--replace", help="Write over an earlier split, as long as no round has been merged.")
    ] = False,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Split data.source among the simulated clients, as data.partition says: data/client-N.jsonl and a data card.

    `fedcli init` does it too. Run again with the same settings it changes nothing.
    """
    federation = found_federation(workspace)
    with StepDisplay(json_output, visible=False) as observer:
        summary = federation.partition(replace=replace, observer=observer)
    where = f"rows: {federation.workspace.data}/client-N.jsonl    data card: {federation.workspace.data_card}"
    text = [describe_data(summary), where]
    print_result(json_output, summary, text, f"next: fedcli data preview{at(workspace)}")
