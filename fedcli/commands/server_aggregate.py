"""fedcli server aggregate."""

from typing import TYPE_CHECKING, Annotated

from typer import Option

from fedcli.commands.options import JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import StepDisplay, at, print_hint, print_json
from fedcli.commands.server_score import score_and_tell
from fedcli.quantities import plural

if TYPE_CHECKING:
    from fedcli.server.aggregate import AggregationResult


def aggregate(
    algorithm: Annotated[
        str | None, Option("--algo", metavar="NAME", help="Merge with this algorithm, this time only.")
    ] = None,
    partial: Annotated[bool, Option("--partial", help="Go ahead with one valid update or more.")] = False,
    wait: Annotated[float, Option(min=0, metavar="SECONDS", help="Wait so long for missing updates.")] = 0.0,
    dry_run: Annotated[bool, Option("--dry-run", help="Read and check all updates; publish nothing.")] = False,
    no_score: Annotated[
        bool, Option("--no-score", help="Leave the scores of eval.every to `fedcli server score`.")
    ] = False,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Merge the open round's updates and publish the next round.

    Exits with 6, naming the missing clients, while too few of the cohort have answered. Then makes the scores that are
    due, as eval.every asks.
    """
    from fedcli.errors import NotReadyError

    federation = found_federation(workspace)
    scores = not (dry_run or no_score)
    try:
        with StepDisplay(json_output, "updates") as observer:
            result = federation.server.aggregate(
                algorithm=algorithm, partial=partial, dry_run=dry_run, wait=wait, observer=observer
            )
    except NotReadyError:
        if scores:
            score_and_tell(federation)
        raise
    if not json_output:
        _print(result, at(workspace))
    scored = score_and_tell(federation) if scores else []
    if json_output:
        document = {name: getattr(result, name) for name in ("status", "round", "state", "aggregation")}
        print_json(document | ({"scored": scored} if scored else {}))


def _print(result: "AggregationResult", here: str) -> None:
    if result.aggregation is None:
        print(f"nothing to do: the federation has finished at round {result.round}")
        return
    done = result.aggregation
    clients = ", ".join(str(entry.client) for entry in done.counted)
    verb = {"published": "merged", "overtaken": "another server merged", "dry_run": "would merge"}[result.status]
    who = "client" if len(done.counted) == 1 else "clients"
    print(f"{verb} {plural(len(done.counted), 'update')} ({who} {clients})")
    for entry in done.refused:
        print(f"refused client {entry.client}: {entry.code}: {entry.reason}")
    if done.missing:
        print(f"missing: {', '.join(map(str, done.missing))}")
    if done.surplus:
        print(f"not needed: {', '.join(map(str, done.surplus))}")
    if result.status != "dry_run":
        print(f"round {result.round} is {result.state}")
    elif done.refused:
        print_hint(f"next: fedcli server discard --id {done.refused[0].client}{here} lets that client send again")
