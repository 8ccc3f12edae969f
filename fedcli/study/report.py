"""A study's report: one HTML file with its tables, curves, costs and cells."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedcli.operations.report import versions_here
from fedcli.quantities import describe_seconds, plural
from fedcli.report.drawing import NARROW, STYLE, WIDE, Picture, svg_of
from fedcli.report.page import Table, TableCell, is_ours, render_page, show_number
from fedcli.study.folder import StudyFolder
from fedcli.study.plot import COST_PANELS, MOST_PANELS, Plot, plots_of
from fedcli.study.render import columns_beside, difference_rows, legend, score_rows
from fedcli.study.results import Block, StudyTable, make_table
from fedcli.study.status import CellStatus, StudyStatus, read_status
from fedcli.workspace.publish import explained
from fedcli.workspace.report_folder import publish_report

GENERATOR = "fedcli study report"
LEAST_ROUNDS = 2
"""Scored rounds without which there is no curve."""


@dataclass(frozen=True)
class WrittenStudyReport:
    """Where the page is, and what it leaves out."""

    page: Path
    notes: list[str]


@dataclass(frozen=True)
class _Section:
    """What the page shows of one preset."""

    name: str
    title: str
    scores: Table
    differences: Table
    against: str
    pictures: Sequence[Picture]


def write_study_report(
    folder: StudyFolder, *, like: str | None = None, against: str | None = None, output: Path | None = None
) -> WrittenStudyReport:
    """Write report.html into `output` (default: report/ of the study) in place of an earlier one.

    Raises as `make_table` does, WorkspaceError for a folder with other things in it.
    """
    table, status = make_table(folder, like=like, against=against), read_status(folder)
    plots = plots_of(folder, table)
    notes = [*_missing(status, plots), *table.notes]
    with explained(folder.file):
        config = folder.file.read_text(encoding="utf-8")
    page = render_page(
        "study.html.j2",
        generator=GENERATOR,
        title=f"{table.title or folder.name}: study report",
        heading=table.title or folder.name,
        study=folder.study,
        tiles=_tiles(folder, table, status),
        notes=notes,
        sections=_sections(table, plots),
        legend=legend(StudyTable(table.title, table.blocks, table.num_seeds, table.source), marks=False),
        num_done=status.num_done,
        num_cells=len(status.cells),
        failed=_failed(status.cells),
        cells=_cells(status.cells),
        config=config,
        versions=versions_here(),
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    path = folder.report() if output is None else output
    return WrittenStudyReport(publish_report(path, page.encode(), {}, (), lambda old: is_ours(old, GENERATOR)), notes)


def _missing(status: StudyStatus, plots: Sequence[Plot]) -> list[str]:
    notes = []
    if missing := len(status.cells) - status.num_done:
        failed = f", {status.num_failed} of them because they failed" if status.num_failed else ""
        notes.append(
            f"{missing} of {plural(len(status.cells), 'cell')} are not done{failed}: `fedcli study run` goes on"
        )
    if any(plot.num_rounds < LEAST_ROUNDS for plot in plots):
        notes.append("scores over rounds are not drawn: eval.every in study.yaml asks for scores of rounds on the way")
    return notes


def _sections(table: StudyTable, plots: Sequence[Plot]) -> list[_Section]:
    from matplotlib import rc_context

    several = len(table.blocks) > 1
    sections = []
    for block in table.blocks:
        heads = ["", *(column.shown for column in block.columns)]
        scores = score_rows(block, table.source, lambda text, rank: TableCell(text, rank == 1, rank == 2))
        differences = [list(map(TableCell, row)) for row in difference_rows(block)]
        with rc_context(STYLE):
            pictures = [
                _picture(plot, table, f": {block.title}" if several else "")
                for plot in plots
                if plot.block is block and (plot.kind == "cost" or plot.num_rounds >= LEAST_ROUNDS)
            ]
        sections.append(
            _Section(
                block.preset,
                f"Scores: {block.title}" if several else "Scores",
                Table.of([*heads, *(title for title, _ in columns_beside(block))], scores, texts=("",)),
                Table.of(heads, differences, texts=("",)),
                block.rows[block.against],
                pictures,
            )
        )
    return sections


def _picture(plot: Plot, table: StudyTable, of: str) -> Picture:
    spread = "one seed" if table.num_seeds == 1 else f"mean over {table.num_seeds} seeds"
    if plot.kind == "rounds":
        title, most = "Scores over rounds", MOST_PANELS
        band = "" if table.num_seeds == 1 else "; a band is one sample deviation to each side"
        caption = f"The global adapter's scores, {spread}{band}. Level lines are the baselines."
    else:
        title, most = "Cost against score", COST_PANELS
        bar = "" if table.num_seeds == 1 else "; a bar is one sample deviation to each side"
        caption = (
            f"The last round's scores, {spread}{bar}. Bytes are of all clients together; seconds are a cell's, with "
            "its scoring, on the machines that it ran on."
        )
    if len(plot.block.columns) > most:
        caption += f" The first {most} columns are drawn."
    wide, narrow = (
        svg_of(plot.draw(sheet), f"{plot.name}-{kind}") for sheet, kind in ((WIDE, "wide"), (NARROW, "narrow"))
    )
    return Picture(plot.name, title + of, caption, wide, narrow)


def _tiles(folder: StudyFolder, table: StudyTable, status: StudyStatus) -> list[tuple[str, str, str]]:
    """Return the key figures: a label, a value and a note each."""
    seeds = ", ".join(map(str, folder.study.seeds))
    spent = sum(cell.seconds for cell in status.cells)
    tiles = [
        ("cells done", f"{status.num_done} of {len(status.cells)}", f"{status.num_failed} failed"),
        ("seeds", str(table.num_seeds), seeds),
        ("time of all cells", describe_seconds(spent), "with scoring"),
    ]
    labels = [entry.label for entry in folder.study.algorithms]
    for block in table.blocks:
        of = f", {block.title}" if len(table.blocks) > 1 else ""
        if (leader := _leader(block, labels)) is None:
            continue
        if block.average_rank:
            rank = f"average rank {block.average_rank[leader]:.2f} of {len(block.average_rank)} rows"
            tiles.append((f"best algorithm{of}", block.rows[leader], rank))
        column = block.columns[0].shown
        score = block.scores.get((leader, column))
        if score is not None and score.difference is not None:
            lead = score.difference
            interval = f"[{show_number(lead.low)}, {show_number(lead.high)}] in {column}"
            title = f"{block.rows[leader]} over {block.rows[block.against]}{of}"
            tiles.append((title, f"{lead.value:+.3f}", interval))
    return tiles


def _leader(block: Block, labels: Sequence[str]) -> str | None:
    """Return the algorithm with the best average rank, the first of equal ones; None where none has a rank."""
    ranked = [label for label in labels if label in block.average_rank]
    return min(ranked, key=lambda label: block.average_rank[label], default=None)


def _failed(cells: Sequence[CellStatus]) -> Table:
    rows = [
        [TableCell(text) for text in (cell.id, cell.progress, cell.error.message, cell.error.hint)]
        for cell in cells
        if cell.error is not None
    ]
    heads = ("failed cell", "came to", "why", "what to do")
    return Table.of(heads, rows, texts=heads)


def _cells(cells: Sequence[CellStatus]) -> Table:
    rows = [
        [
            TableCell(text)
            for text in (cell.id, cell.status, cell.progress, describe_seconds(cell.seconds) if cell.seconds else "")
        ]
        for cell in cells
    ]
    return Table.of(("cell", "status", "came to", "time"), rows, texts=("cell", "status", "came to"))
