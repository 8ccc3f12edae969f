"""fedcli data partition."""

from typing import Annotated

import typer

from fedcli.commands.options import JsonOption, WorkspaceOption
from fedcli.commands.output import at, describe_data, print_hint, print_json, rows_display


def partition(
    replace: Annotated[
        bool, typer.Option("--replace", help="Write over an earlier split, as long as no round has been merged.")
    ] = False,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Split data.source among the simulated clients, as data.partition says: data/client-N.jsonl and a data card.

    `fedcli init` does it too. Run again with the same settings it changes nothing.
    """
    from fedcli.parties.simulate import partition_data
    from fedcli.workspace.layout import find_workspace

    found = find_workspace(workspace)
    with rows_display(json_output) as on_rows:
        summary = partition_data(found, replace=replace, on_rows=on_rows)
    if json_output:
        print_json(summary)
        return
    print(describe_data(summary))
    print(f"rows: {found.data}/client-N.jsonl    data card: {found.data_card}")
    print_hint(f"next: fedcli data preview{at(workspace)}")
