"""fedcli data: how rows look, and how they are split."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from fedcli.commands.options import HomeOption, JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import StepDisplay, at, describe_data, print_hint, print_json, print_result, terminal
from fedcli.errors import missing_package

if TYPE_CHECKING:
    from rich.console import Console

    from fedcli.operations.preview import Preview, ShownRow


MOST_CHARACTERS = 1200
"""Of a piece of text; longer ones lose their middle on the terminal, and are whole under --json."""
MOST_GROUPS = 8
MOST_HEADER = 48
"""Characters of all groups' columns together, beyond which letters stand for them: it fits a terminal of 80."""


def data_preview(
    client: Annotated[
        int | None, Option("--id", metavar="N", help="Look at one client. Default: all simulated ones.")
    ] = None,
    by: Annotated[
        str | None,
        Option(
            metavar="COLUMN", help="Count this column's values for each client. Default: what the rows were split by."
        ),
    ] = None,
    rows: Annotated[int, Option(min=0, metavar="N", help="How many rows to show.")] = 2,
    output: Annotated[
        Path | None,
        Option(
            "--output",
            "-o",
            metavar="FILE.png",
            help="The picture. Default: data/preview.png; a joined party's lies in its home.",
        ),
    ] = None,
    home: HomeOption = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show rows as they are trained on, the supervised part highlighted, token lengths and every client's share.

    It writes a picture of the shares too.
    """
    with StepDisplay(json_output, "rows") as observer:
        result = found_federation(workspace).preview(
            client=client, home=home, by=by, num_rows=rows, output=output, observer=observer
        )
    if json_output:
        print_json(result)
        return
    console = terminal(highlight=False)
    for row in result.rows:
        _print_row(console, row)
    _print_histogram(console, result)
    _print_clients(console, result)
    missing = missing_package("matplotlib")
    print_hint(f"picture: {result.picture or f'none: {missing.message}. {missing.hint}'}")


def _print_row(console: "Console", row: "ShownRow") -> None:
    from rich.text import Text

    console.rule(Text(row.where))
    for name, value in row.fields.items():
        console.print(Text(f"{name}: ", style="bold") + Text(_shortened(str(value))))
    names = ["trained on"] if len(row.texts) < 2 else ["chosen", "rejected"]
    for name, pieces in zip(names, row.texts, strict=False):
        console.print(Text(f"\n{name}, «supervised»:", style="bold"))
        texts = [(_shortened(piece.text), piece.is_supervised) for piece in pieces]
        styled = ((f"«{text}»", "bold green") if supervised else (text, "dim") for text, supervised in texts)
        console.print(Text.assemble(*styled))
    if row.left_out is not None:
        console.print(Text(f"\nnot used: {row.left_out}"))


def _print_histogram(console: "Console", result: "Preview") -> None:
    highest = max(result.histogram)
    num_rows = sum(share.num_rows for share in result.clients)
    console.rule("tokens a row, templated, before any cut")
    if result.num_sampled < num_rows:
        console.print(f"of the first rows of each client: {result.num_sampled} of {num_rows}")
    last_of_each = [*(edge - 1 for edge in result.edges[1:-1]), result.edges[-1]]  # a bin ends before the next one
    for low, high, count in zip(result.edges, last_of_each, result.histogram, strict=False):
        bar = "█" * round(40 * count / highest) if count else ""
        console.print(f"{low:>6} to {high:<6} {bar} {count}")
    num_cut = sum(share.num_cut for share in result.clients)
    if num_cut:
        num_truncated = sum(share.num_truncated for share in result.clients)
        num_too_long = sum(share.num_too_long for share in result.clients)
        longer = f"{num_cut} of {result.num_sampled} rows are longer than train.max_length ({result.max_length})"
        console.print(f"{longer}: {num_truncated} with a response cut to fit, {num_too_long} left out", soft_wrap=True)


def _print_clients(console: "Console", result: "Preview") -> None:
    import yaml
    from rich import box
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    from fedcli.data.row_report import RowReport, describe_rows

    kind = yaml.safe_dump(result.partition, default_flow_style=True).partition("\n")[0] if result.partition else ""
    title = f"clients, partition {kind}" if kind else "clients"
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    groups = sorted(range(len(result.groups)), key=lambda group: -sum(share.groups[group] for share in result.clients))[
        :MOST_GROUPS
    ]
    names = [result.groups[group] for group in groups]
    has_legend = sum(len(name) + 2 for name in names) > MOST_HEADER
    heads = [f"({letter})" for letter in "abcdefgh"[: len(names)]] if has_legend else names
    for column in ("client", "rows", "left out", "tokens", *map(escape, heads)):
        table.add_column(column, justify="right", no_wrap=True)
    for share in result.clients:
        median = sorted(share.num_tokens)[len(share.num_tokens) // 2] if share.num_tokens else 0
        counts = [str(share.groups[group]) for group in groups]
        table.add_row(str(share.client), str(share.num_rows), str(sum(share.left_out.values())), str(median), *counts)
    console.print(table)
    console.print("tokens: the median of its rows")
    report = RowReport()
    for share in result.clients:
        report.include(share)
    guesses = dict.fromkeys(share.guess for share in result.clients if share.guess is not None)
    for line in (*guesses, *describe_rows(report)):
        console.print(line, markup=False, soft_wrap=True)
    for head, name in zip(heads, names, strict=True) if has_legend else ():
        console.print(f"{head} {name}", markup=False)
    if len(result.groups) > len(groups):
        console.print(f"the {len(groups)} largest of {len(result.groups)} groups; --json has all")


def _shortened(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]} […{len(text) - 2 * half} characters…] {text[-half:]}"


def data_partition(
    replace: Annotated[
        bool, Option("--replace", help="Write over an earlier split, as long as no round has been merged.")
    ] = False,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Split data.source among the simulated clients, as data.partition says: data/client-N.jsonl and a data card.

    `fedcli init` does it too. Run again with the same settings it changes nothing.
    """
    federation = found_federation(workspace)
    with StepDisplay(json_output, visible=False) as observer:
        summary = federation.partition(replace=replace, observer=observer)
    where = f"rows: {federation.workspace.data}/client-N.jsonl    data card: {federation.workspace.data_card}"
    text = [describe_data(summary), where]
    print_result(json_output, summary, text, f"next: fedcli data preview{at(workspace)}")
