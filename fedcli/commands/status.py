"""fedcli status."""

from typing import TYPE_CHECKING

from fedcli.commands.options import JsonOption, WorkspaceOption
from fedcli.commands.output import print_hint, print_json

if TYPE_CHECKING:
    from fedcli.rounds.status import Status


def status(workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Show the round, the algorithm, who has answered, the last losses, and what to run next."""
    from fedcli.rounds.status import read_status
    from fedcli.workspace.layout import find_workspace

    result = read_status(find_workspace(workspace))
    print_json(result) if json_output else _print(result)


def _print(result: "Status") -> None:
    print(f"workspace  {result.workspace}")
    print(f"round      {result.round} of {result.rounds}, {result.state}")
    print(f"algorithm  {result.algorithm['name']}, task {result.task}, learning rate {result.learning_rate:.3g}")
    if result.cohort:
        print(f"cohort     {_names(result.cohort)}; {result.needed} must answer")
        print(f"answered   {_names(result.answered)}")
        print(f"missing    {_names(result.missing)}")
    if result.last_losses:
        losses = (f"{client}: {'-' if loss is None else f'{loss:.3f}'}" for client, loss in result.last_losses.items())
        print(f"losses     {', '.join(losses)} (by client, round {result.round - 1})")
    for client, code in result.last_refused.items():
        print(f"refused    client {client} in round {result.round - 1}: {code}")
    print_hint(f"next: {result.next_command}")


def _names(clients: list[int]) -> str:
    return ", ".join(map(str, clients)) or "none"
