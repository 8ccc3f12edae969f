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
    from rich.markup import escape
    from rich.table import Table

    from fedcli.scoring.table import show_difference, show_score

    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)
    show_leads = any(cell.difference for cell in made.cells.values())
    grid = Table(title=f"scores [95 % interval]{f', and difference to {made.against}' if show_leads else ''}")

    def shown(target: str, column: "Column") -> str:
        cell = made.cells.get((target, column))
        if cell is None:
            return ""
        style = {1: "bold", 2: "underline"}.get(cell.rank)
        text = f"[{style}]{escape(show_score(cell))}[/]" if style else escape(show_score(cell))
        return f"{text}\n{escape(show_difference(cell))}" if cell.difference else text

    rows = [["metric", *made.targets]]
    rows += [[column.title, *(shown(target, column) for target in made.targets)] for column in made.columns]
    if made.average_rank:
        rows.append(["average rank", *(f"{made.average_rank[target]:.2f}" for target in made.targets)])
    if len(made.targets) >= len(made.columns):
        rows = [list(row) for row in zip(*rows, strict=True)]
        rows[0][0] = ""
    for position, title in enumerate(rows[0]):
        grid.add_column(title, justify="right" if position else "left")
    for row in rows[1:]:
        grid.add_row(*row)
    console.print(grid)
    for note in made.notes:
        print_hint(note)
