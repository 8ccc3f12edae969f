"""fedcli eval best."""

from typing import Annotated

from typer import Option

from fedcli.commands.options import JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import print_result
from fedcli.quantities import plural


def best(
    metric: Annotated[str, Option(metavar="NAME", help="A benchmark (its first metric), or BENCHMARK.METRIC.")],
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Name the best of the rounds that have been scored."""
    ranked = found_federation(workspace).best_rounds(metric)
    number, entry = ranked[0]
    rounds = [{"round": found, **score.model_dump()} for found, score in ranked]
    interval = f"[{entry.low:.4f}, {entry.high:.4f}]"
    print_result(
        json_output,
        {"metric": metric, "best": number, "rounds": rounds},
        f"round {number}: {metric} {entry.value:.4f} {interval}, of {plural(len(ranked), 'round')}",
    )
