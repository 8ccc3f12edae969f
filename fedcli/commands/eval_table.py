"""fedcli eval table."""

from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from fedcli.commands.options import JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import print_hint, print_json

if TYPE_CHECKING:
    from fedcli.scoring.table import Column, ScoreTable


FILE_WIDTH = 240
"""Characters, where no terminal says how many it has."""


def table(
    names: Annotated[list[str] | None, Argument(metavar="[NAME...]", help="Benchmarks; all by default.")] = None,
    group: Annotated[str | None, Option(metavar="NAME", help="One group.")] = None,
    against: Annotated[
        str, Option(metavar="TARGET", help="Show differences to this one: a target, or best-alone.")
    ] = "base",
    details: Annotated[bool, Option("--details", help="Subjects and categories too.")] = False,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show scores side by side, and write them to eval/ as markdown, csv and json."""
    from fedcli.errors import WorkspaceError
    from fedcli.scoring.table import as_rows, save_table

    federation = found_federation(workspace)
    made = federation.scores(*(names or ()), group=group, against=against, details=details)
    parts = ["table", *(names or []), *(["group", group] if group else [])]
    try:
        paths = save_table(federation.workspace, made, "-".join(parts))
    except WorkspaceError as error:  # a reader of somebody else's workspace
        paths = []
        print_hint(f"the table is not written: {error.message}")
    if json_output:
        document = {"against": made.against, "average_rank": made.average_rank, "scores": as_rows(made)}
        print_json({**document, "notes": made.notes, "files": paths})
        return
    print_table(made)
    if paths:
        print_hint("written to " + ", ".join(paths))


def print_table(made: "ScoreTable") -> None:
    """Print a table, the shorter side across: best bold, second best underlined, differences below."""
    from rich.console import Console
    from rich.table import Table

    from fedcli.scoring.table import show_difference, show_score

    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)
    show_leads = any(cell.difference for cell in made.cells.values())
    transposed = len(made.targets) < len(made.columns)
    grid = Table(title=f"scores [95 % interval]{f', and difference to {made.against}' if show_leads else ''}")
    grid.add_column("" if not transposed else "metric")
    for title in made.targets if transposed else [column.title for column in made.columns]:
        grid.add_column(title, justify="right")
    if made.average_rank and not transposed:
        grid.add_column("average rank", justify="right")

    def shown(target: str, column: "Column") -> str:
        cell = made.cells.get((target, column))
        if cell is None:
            return ""
        style = {1: "bold", 2: "underline"}.get(cell.rank)
        text = f"[{style}]{_plain(show_score(cell))}[/]" if style else _plain(show_score(cell))
        return f"{text}\n{_plain(show_difference(cell))}" if cell.difference else text

    if transposed:
        for column in made.columns:
            grid.add_row(column.title, *(shown(target, column) for target in made.targets))
        if made.average_rank:
            grid.add_row("average rank", *(f"{made.average_rank[target]:.2f}" for target in made.targets))
    else:
        for target in made.targets:
            rank = [f"{made.average_rank[target]:.2f}"] if made.average_rank else []
            grid.add_row(target, *(shown(target, column) for column in made.columns), *rank)
    console.print(grid)
    for note in made.notes:
        print_hint(note)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
