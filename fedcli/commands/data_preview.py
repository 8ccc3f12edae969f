"""fedcli data preview."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcli.commands.options import HomeOption, JsonOption, WorkspaceOption
from fedcli.commands.output import print_hint, print_json, progress_display

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from fedcli.rounds.preview import Piece, Preview, ShownRow

MOST_CHARACTERS = 1200
"""Of a piece of text; longer ones lose their middle on the terminal, and are whole under --json."""
MOST_GROUPS = 8


def preview(
    client: Annotated[
        int | None,
        typer.Option("--id", metavar="N", help="Look at one client. Default: all simulated ones.", show_default=False),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            metavar="COLUMN",
            help="Count this column's values for each client. Default: what the rows were split by.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=0, metavar="N", help="How many rows to show.")] = 2,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE.png", help="The picture. Default: data/preview.png.", show_default=False
        ),
    ] = None,
    home: HomeOption = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show rows as they are trained on, the supervised part highlighted, token lengths and every client's share.

    It writes a picture of the shares too.
    """
    from fedcli.rounds import preview as previewing
    from fedcli.workspace.layout import find_workspace

    found = find_workspace(workspace)
    with progress_display(json_output) as progress:
        task = progress.add_task("rows", total=None)
        result = previewing.preview(
            found,
            client=client,
            home=home,
            by=by,
            num_rows=rows,
            output=output,
            on_client=lambda number: progress.update(task, description=f"client {number}"),
        )
    if json_output:
        print_json(result)
        return
    from rich.console import Console

    console = Console(highlight=False)
    for row in result.rows:
        _print_row(console, row)
    _print_histogram(console, result)
    _print_clients(console, result)
    print_hint(f"picture: {result.picture}")


def _print_row(console: "Console", row: "ShownRow") -> None:
    from rich.text import Text

    console.rule(Text(row.where))
    for name, value in row.fields.items():
        console.print(Text(f"{name}: ", style="bold") + Text(_shortened(str(value))))
    names = ["trained on"] if len(row.texts) < 2 else ["chosen", "rejected"]
    for name, pieces in zip(names, row.texts, strict=False):
        console.print(Text(f"\n{name}, «supervised»:", style="bold"))
        console.print(_highlighted(pieces))
    if not row.texts:
        console.print("\nnot used: too long, or with nothing to learn")


def _highlighted(pieces: "list[Piece]") -> "Text":
    from rich.text import Text

    text = Text()
    for piece in pieces:
        if piece.is_supervised:
            text.append(f"«{_shortened(piece.text)}»", style="bold green")
        else:
            text.append(_shortened(piece.text), style="dim")
    return text


def _print_histogram(console: "Console", result: "Preview") -> None:
    highest = max(result.histogram)
    console.rule("tokens a row, templated, before any cut")
    for low, high, count in zip(result.edges, result.edges[1:], result.histogram, strict=False):
        bar = "█" * round(40 * count / highest) if count else ""
        console.print(f"{low:>6} to {high:<6} {bar} {count}")
    num_cut = sum(share.num_cut for share in result.clients)
    if num_cut:
        console.print(f"{num_cut} rows are longer than train.max_length ({result.max_length}) and are cut, or left out")


def _print_clients(console: "Console", result: "Preview") -> None:
    from rich.table import Table

    table = Table(title="clients" + (f", split by {result.partition}" if result.partition else ""))
    groups = sorted(range(len(result.groups)), key=lambda group: -sum(share.groups[group] for share in result.clients))[
        :MOST_GROUPS
    ]
    for column in ("client", "rows", "left out", "tokens (median)", *(result.groups[group] for group in groups)):
        table.add_column(column, justify="right")
    for share in result.clients:
        median = sorted(share.num_tokens)[len(share.num_tokens) // 2] if share.num_tokens else 0
        counts = [str(share.groups[group]) for group in groups]
        table.add_row(str(share.client), str(share.num_rows), str(sum(share.left_out.values())), str(median), *counts)
    console.print(table)
    if len(result.groups) > len(groups):
        console.print(f"the {len(groups)} largest of {len(result.groups)} groups; --json has all")


def _shortened(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]} […{len(text) - 2 * half} characters…] {text[-half:]}"
