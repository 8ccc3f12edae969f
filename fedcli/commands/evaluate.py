"""fedcli eval."""

from typing import TYPE_CHECKING, Annotated

import typer

from fedcli.commands.options import JsonOption, ThreadsOption, WorkspaceOption
from fedcli.commands.output import print_json, progress_display

if TYPE_CHECKING:
    from fedcli.rounds.evaluation import Score


def evaluate(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The benchmark: demo, the built-in held-out rows.")],
    round_name: Annotated[
        str | None, typer.Option("--round", metavar="N|latest", help="Score a round's adapter.", show_default=False)
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Score the base model.")] = False,
    alone: Annotated[
        list[int] | None, typer.Option("--alone", metavar="N", help="Score client N trained alone; may be repeated.")
    ] = None,
    pooled: Annotated[bool, typer.Option("--pooled", help="Score the baseline of all rows together.")] = False,
    split: Annotated[str, typer.Option(help="The held-out rows: test, or tuning for choosing settings.")] = "test",
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Score the base, the baselines and a round side by side; with no target named, all that there are."""
    from fedcli.errors import UsageError, did_you_mean
    from fedcli.rounds import evaluation
    from fedcli.workspace.layout import find_workspace

    if name != evaluation.BENCHMARK:
        raise UsageError(f"unknown benchmark {name!r}", hint=did_you_mean(name, [evaluation.BENCHMARK]))
    if split not in evaluation.SPLITS:
        raise UsageError(f"unknown split {split!r}", hint=did_you_mean(split, evaluation.SPLITS))
    if round_name is not None and round_name != "latest" and not (round_name.isascii() and round_name.isdigit()):
        raise UsageError(f"--round {round_name}: no such round", hint="Give a round's number, or latest.")
    found = find_workspace(workspace)
    with progress_display(json_output) as progress:
        task = progress.add_task("loading", total=None)
        scores = evaluation.evaluate(
            found,
            base=base,
            alone=alone or [],
            pooled=pooled,
            round_name=round_name,
            split=split,
            threads=threads,
            on_answers=lambda target, total, done: progress.update(
                task, description=target, completed=done, total=total
            ),
        )
    if json_output:
        print_json({"benchmark": name, "split": split, "scores": scores})
    else:
        _print_table(scores, split)


def _print_table(scores: "list[Score]", split: str) -> None:
    from rich.console import Console
    from rich.table import Table

    metric = scores[0].metric.replace("_", " ")
    table = Table(title=f"{metric} on {scores[0].num_rows} held-out rows ({split} split)")
    margins = ("margin",) if scores[0].margin is not None else ()
    for column in ("adapter", "score", "std. error", *margins, "ahead of the best alone"):
        table.add_column(column, justify="left" if column == "adapter" else "right")
    for score in scores:
        lead = "" if score.lead is None else f"{score.lead:+.3f} ± {score.lead_error:.3f}"
        margin = (f"{score.margin:+.2f}",) if score.margin is not None else ()
        table.add_row(score.target, f"{score.accuracy:.3f}", f"{score.standard_error:.3f}", *margin, lead)
    Console().print(table)
