"""fedcli status."""

from itertools import zip_longest
from typing import TYPE_CHECKING

from fedcli.commands.options import JsonOption, WorkspaceOption
from fedcli.commands.output import at, print_hint, print_json

if TYPE_CHECKING:
    from fedcli.rounds.status import Status


def status(workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Show the round, the algorithm, who has answered, the last losses, and what to run next."""
    from fedcli.rounds.status import read_status
    from fedcli.workspace.layout import find_workspace

    result = read_status(find_workspace(workspace))
    if json_output:
        print_json(result)
        return
    _print(result)
    print_hint(f"next: {result.next_command}{at(workspace)}")


def _print(result: "Status") -> None:
    print(f"workspace  {result.workspace}")
    print(f"round      {result.round} of {result.rounds}, {result.state}")
    print(f"algorithm  {_describe(result.algorithm)}, task {result.task}, learning rate {result.learning_rate:.3g}")
    if result.next_algorithm != result.algorithm and result.state == "open":
        print(f"next       {_describe(result.next_algorithm)}, from round {result.round + 1} on, as fedcli.yaml has it")
    if result.cohort:
        print(f"cohort     {_names(result.cohort)}; {result.needed} must answer")
        print(f"answered   {_names(result.answered)}")
        print(f"missing    {_names(result.missing)}")
    if result.hidden:
        print(f"hidden     {_names(result.hidden)}: only they and the server see whether they have answered")
    if result.joined:
        print(f"joined     {_names(result.joined)}: parties that keep their rows")
    if result.last_losses:
        losses = (f"{client}: {'-' if loss is None else f'{loss:.3f}'}" for client, loss in result.last_losses.items())
        print(f"losses     {', '.join(losses)} (by client, round {result.round - 1})")
    for client, code in result.last_refused.items():
        print(f"refused    client {client} in round {result.round - 1}: {code}")
    for run, following in zip_longest(result.history, result.history[1:]):
        last = following.round - 1 if following else result.round - 1
        rounds = f"round {last}" if last == run.round else f"rounds {run.round} to {last}"
        print(f"merged     {rounds} with {_describe(run.algorithm)}")
    if result.cost is not None:
        cost = result.cost
        print(
            f"cost       {_count(cost.base_parameters)} parameters in the base, {_count(cost.trainable_parameters)} "
            f"trainable, {_count(cost.communicated_parameters)} sent by a client in a round"
        )
        print(
            f"transfer   {_count(cost.client_bytes_down)} bytes down and {_count(cost.client_bytes_up)} up "
            f"a client and round; {_count(cost.total_bytes_down)} down and {_count(cost.total_bytes_up)} up so far"
        )


def _describe(algorithm: dict[str, object]) -> str:
    rest = ", ".join(f"{key} {value}" for key, value in algorithm.items() if key != "name")
    return f"{algorithm['name']} ({rest})" if rest else str(algorithm["name"])


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _names(clients: list[int]) -> str:
    return ", ".join(map(str, clients)) or "none"
