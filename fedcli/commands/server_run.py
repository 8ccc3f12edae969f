"""fedcli server run."""

from fedcli.commands.options import JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import describe_milestone, print_hint, print_json
from fedcli.observer import Observer


def run(workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Merge every round as soon as it is ready, until the last; clients train elsewhere."""
    from fedcli.scoring.after_rounds import score_milestone
    from fedcli.server.aggregate import aggregate_all

    state = found_federation(workspace).state

    def score() -> None:
        milestone = score_milestone(state)
        if milestone is not None and (milestone.error or not json_output):
            print_hint(describe_milestone(milestone))

    def on_round(number: int) -> None:
        if not json_output:
            print_hint(f"round {number} is there")
        score()

    score()
    aggregate_all(state, on_round=on_round, observer=Observer() if json_output else _Display())
    if json_output:
        print_json({"round": state.head.number, "state": state.head.manifest.state})
    else:
        print(f"the federation has finished at round {state.head.number}")


class _Display(Observer):
    """Says what is waited for."""

    def waiting(self, message: str) -> None:
        print_hint(message)
