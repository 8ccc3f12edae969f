"""fedcli server run."""

from fedcli.commands.options import JsonOption, WorkspaceOption
from fedcli.commands.output import print_hint, print_json


def run(workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Merge every round as soon as it is ready, until the last; clients train elsewhere."""
    from fedcli.rounds.aggregation import aggregate_all
    from fedcli.workspace.layout import find_workspace

    head = aggregate_all(
        find_workspace(workspace),
        on_round=lambda number: print_hint(f"round {number} is there") if not json_output else None,
        on_wait=lambda message: print_hint(message) if not json_output else None,
    )
    if json_output:
        print_json({"round": head.number, "state": head.manifest.state})
    else:
        print(f"the federation has finished at round {head.number}")
