"""fedcli server run."""

from fedcli.commands.options import JsonOption, WorkspaceOption
from fedcli.commands.output import describe_milestone, print_hint, print_json


def run(workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Merge every round as soon as it is ready, until the last; clients train elsewhere."""
    from fedcli.scoring.after_rounds import score_milestone
    from fedcli.server.aggregate import aggregate_all
    from fedcli.workspace.layout import find_workspace

    found = find_workspace(workspace)

    def score() -> None:
        milestone = score_milestone(found)
        if milestone is not None and (milestone.error or not json_output):
            print_hint(describe_milestone(milestone))

    def on_round(number: int) -> None:
        if not json_output:
            print_hint(f"round {number} is there")
        score()

    score()
    head = aggregate_all(
        found,
        on_round=on_round,
        on_wait=lambda message: print_hint(message) if not json_output else None,
    )
    if json_output:
        print_json({"round": head.number, "state": head.manifest.state})
    else:
        print(f"the federation has finished at round {head.number}")
