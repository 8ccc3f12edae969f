"""A study's pictures: scores over rounds with bands over seeds, and what the scores cost in bytes and seconds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

from fedcli.errors import NotReadyError
from fedcli.federation import Federation
from fedcli.quantities import byte_unit
from fedcli.report.drawing import DPI, SOFT, STYLE, WIDE, Sheet, panels
from fedcli.report.rows_picture import PALETTE
from fedcli.study.columns import Column
from fedcli.study.folder import StudyFolder
from fedcli.study.plan import Cell, cells_of
from fedcli.study.results import Block, StudyTable, make_table
from fedcli.study.run_cell import is_made
from fedcli.study.scored import Scored
from fedcli.workspace.publish import make_folder, publish_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PictureFormat = Literal["png", "pdf", "svg"]
MOST_PANELS = 12
COST_PANELS = 3
"""Columns that are drawn over rounds, and against costs: the first ones."""
_MARKS = "osD^vP*X"
_LEVEL_STYLES: Any = ("--", ":", "-.", (0, (6, 1)), (0, (1, 4)))
"""Of the baselines' level lines."""


@dataclass(frozen=True)
class Point:
    """A value's mean over seeds, and its sample deviation: 0 for one seed."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Point":
        """Return the point of some seeds' values."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else 0.0)


@dataclass(frozen=True)
class Plot:
    """A picture of one preset: `draw` makes it for a sheet. `num_rounds` are those that its curves go through."""

    kind: Literal["rounds", "cost"]
    block: Block
    num_rounds: int
    draw: "Callable[[Sheet], Figure]"

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.kind}-{self.block.preset}"


def plot_study(folder: StudyFolder, *, like: str | None = None, form: PictureFormat = "png") -> list[Path]:
    """Draw a study's curves and costs into its tables/, two files for each preset; return their paths.

    Raises as `make_table` does, NotReadyError where no round of a federation has been scored.
    """
    from matplotlib import rc_context

    make_folder(folder.tables())
    paths = []
    with rc_context({**STYLE, "svg.hashsalt": "fedcli", "pdf.fonttype": 42}):
        for plot in plots_of(folder, make_table(folder, like=like)):
            path = folder.tables() / f"{plot.name}.{form}"
            publish_file(path, _file(plot.draw(WIDE), form))
            paths.append(path)
    if not paths:
        raise NotReadyError("no round of the study has scores yet", hint="`fedcli study run` makes them.")
    return paths


def plots_of(folder: StudyFolder, table: StudyTable) -> list[Plot]:
    """Return two pictures for each preset of which rounds have been scored: its curves, and its costs."""
    scored, plots = Scored(folder), []
    for block in table.blocks:
        cells = [
            cell
            for cell in cells_of(folder.study)
            if cell.setting.name == block.preset and cell.algorithm is not None and is_made(folder, cell)
        ]
        curves = {column.shown: curves_of(scored, cells, column) for column in block.columns}
        shown = [column for column in block.columns if curves[column.shown]][:MOST_PANELS]
        if not shown:
            continue
        num_rounds = max(len(rounds) for column in shown for rounds in curves[column.shown].values())
        draw_curves = partial(_draw_curves, block, shown, curves)
        draw_costs = partial(_draw_costs, block, shown, costs_of(folder, cells))
        plots += [Plot("rounds", block, num_rounds, draw_curves), Plot("cost", block, num_rounds, draw_costs)]
    return plots


def curves_of(scored: Scored, cells: Sequence[Cell], column: Column) -> dict[str, dict[int, Point]]:
    """Return each algorithm's scores in a column by round, of the rounds that all of its seeds have scored."""
    found: dict[str, dict[int, list[float]]] = {}
    num_seeds: dict[str, int] = {}
    for cell in cells:
        rounds = scored.rounds(cell, column)
        num_seeds[cell.label] = num_seeds.get(cell.label, 0) + bool(rounds)
        for number, value in rounds.items():
            found.setdefault(cell.label, {}).setdefault(number, []).append(value)
    return {
        label: {
            number: Point.of(values) for number, values in sorted(rounds.items()) if len(values) == num_seeds[label]
        }
        for label, rounds in found.items()
    }


def costs_of(folder: StudyFolder, cells: Sequence[Cell]) -> dict[str, tuple[float, float]]:
    """Return each algorithm's mean bytes that all clients sent and fetched, and its cell's mean seconds."""
    found: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        cost = Federation.open(folder.workspace(cell)).state.head.manifest.cost
        record = folder.read(cell)
        if cost is not None and record is not None:
            num_bytes = float(cost.total_bytes_up + cost.total_bytes_down)
            found.setdefault(cell.label, []).append((num_bytes, record.seconds))
    return {label: (fmean(b for b, _ in pairs), fmean(s for _, s in pairs)) for label, pairs in found.items()}


def _draw_curves(
    block: Block, columns: Sequence[Column], curves: Mapping[str, Mapping[str, Mapping[int, Point]]], sheet: Sheet
) -> "Figure":
    figure, grid = _grid(len(columns), sheet)
    for axes, column in zip(grid, columns, strict=False):
        for place, label in enumerate(_algorithms(block, curves)):
            rounds = curves[column.shown].get(label, {})
            means = [point.mean for point in rounds.values()]
            colour = PALETTE[place % len(PALETTE)]
            axes.plot(list(rounds), means, color=colour, marker=_MARKS[place % len(_MARKS)], markersize=4, label=label)
            low, high = ([point.mean + sign * point.deviation for point in rounds.values()] for sign in (-1, 1))
            axes.fill_between(list(rounds), low, high, color=colour, alpha=0.15, linewidth=0)
        levels = [
            (block.rows[label], score.mean)
            for label in block.rows
            if label not in _labels(curves)
            if (score := block.scores.get((label, column.shown))) is not None and score.by_seed
        ]
        for (title, mean), style in zip(levels, _LEVEL_STYLES, strict=False):
            axes.axhline(mean, color=SOFT, linestyle=style, linewidth=1.4, label=title)
        axes.set(title=column.shown, xlabel="round")
        scored = sorted({number for rounds in curves[column.shown].values() for number in rounds})
        most = 6 if sheet.is_narrow or len(columns) > 1 else 16
        axes.set_xticks(scored[::-1][:: math.ceil(len(scored) / most)])  # where rounds were scored, the last among them
    _legend(figure, grid, sheet)
    return figure


def _draw_costs(
    block: Block, columns: Sequence[Column], costs: Mapping[str, tuple[float, float]], sheet: Sheet
) -> "Figure":
    """Draw the first columns against bytes, and below against seconds."""
    columns = columns[:COST_PANELS]
    count = 2 * len(columns)
    figure, grid = panels(3.0 * count, count, 1, sheet=sheet) if sheet.is_narrow else panels(6.4, 2, len(columns))
    unit, size = byte_unit(max((num_bytes for num_bytes, _ in costs.values()), default=1.0))
    for position, axes in enumerate(grid):
        column = columns[position % len(columns)]
        by_bytes = position < len(columns)
        for place, (label, (num_bytes, seconds)) in enumerate(costs.items()):
            score = block.scores.get((label, column.shown))
            if score is not None and score.by_seed:
                x = num_bytes / size if by_bytes else seconds
                mark, colour = _MARKS[place % len(_MARKS)], PALETTE[place % len(PALETTE)]
                axes.errorbar(x, score.mean, yerr=score.deviation or 0.0, fmt=mark, color=colour, label=label)
        axes.set(title=column.shown, xlabel=f"{unit} sent and fetched" if by_bytes else "seconds, with scoring")
        axes.set_xlim(0, 1.05 * max(axes.dataLim.x1, 0) or 1)  # the mark that lies farthest is whole
    _legend(figure, grid, sheet)
    return figure


def _labels(curves: Mapping[str, Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(label for of_column in curves.values() for label in of_column))


def _algorithms(block: Block, curves: Mapping[str, Mapping[str, object]]) -> list[str]:
    known = _labels(curves)
    return [label for label in block.rows if label in known]


def _grid(count: int, sheet: Sheet) -> "tuple[Figure, list[Axes]]":
    num_columns = 1 if sheet.is_narrow else min(3, count)
    num_rows = math.ceil(count / num_columns)
    figure, grid = panels(4.6 if num_rows == 1 else 3.2 * num_rows + 0.6, num_rows, num_columns, sheet=sheet)
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid[:count]


def _legend(figure: "Figure", grid: "Sequence[Axes]", sheet: Sheet) -> None:
    labels = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=2 if sheet.is_narrow else 4)


def _file(figure: "Figure", form: PictureFormat) -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    figure.savefig(buffer, format=form, dpi=DPI)
    return buffer.getvalue()
