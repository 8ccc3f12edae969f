"""fedcli server aggregate."""

from typing import TYPE_CHECKING, Annotated

import typer

from fedcli.commands.options import JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import describe_milestone, print_hint, print_json, step_display

if TYPE_CHECKING:
    from fedcli.scoring.after_rounds import Milestone
    from fedcli.server.aggregate import AggregationResult


def aggregate(
    algorithm: Annotated[
        str | None,
        typer.Option("--algo", metavar="NAME", help="Merge with this algorithm, this time only.", show_default=False),
    ] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Go ahead with one valid update or more.")] = False,
    wait: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Wait so long for missing updates.")] = 0.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and check all updates; publish nothing.")] = False,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Merge the open round's updates and publish the next round.

    Exits with 6, naming the missing clients, while too few of the cohort have answered.
    """
    from fedcli.scoring.after_rounds import score_milestone

    federation = found_federation(workspace)
    scored: list[Milestone] = []

    def score() -> None:
        """Score the latest round where that is due: before the merge, one whose scoring was interrupted."""
        milestone = None if dry_run else score_milestone(federation.state)
        if milestone is not None:
            print_hint(describe_milestone(milestone))
            scored.append(milestone)

    score()
    with step_display(json_output, "updates") as observer:
        result = federation.server.aggregate(
            algorithm=algorithm, partial=partial, dry_run=dry_run, wait=wait, observer=observer
        )
    if not json_output:
        _print(result)
    score()
    if json_output:
        print_json(_document(result) | ({"scored": scored} if scored else {}))


def _document(result: "AggregationResult") -> dict[str, object]:
    return {
        "status": result.status,
        "round": result.round,
        "state": result.state,
        "aggregation": result.aggregation,
    }


def _print(result: "AggregationResult") -> None:
    if result.aggregation is None:
        print(f"nothing to do: the federation has finished at round {result.round}")
        return
    done = result.aggregation
    clients = ", ".join(str(entry.client) for entry in done.counted)
    verb = {"published": "merged", "overtaken": "another server merged", "dry_run": "would merge"}[result.status]
    print(f"{verb} {len(done.counted)} updates (clients {clients})")
    for entry in done.refused:
        print(f"refused client {entry.client}: {entry.code}: {entry.reason}")
    if done.missing:
        print(f"missing: {', '.join(map(str, done.missing))}")
    if done.surplus:
        print(f"not needed: {', '.join(map(str, done.surplus))}")
    if result.status != "dry_run":
        print(f"round {result.round} is {result.state}")
    elif done.refused:
        print_hint(f"next: fedcli server discard --id {done.refused[0].client} lets that client send again")
