"""What a report's pictures have in common: their style, lines and dots by client, maps of clients x rounds."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from fedcli.report.rows_picture import PALETTE
from fedcli.report.series import MergedRound

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY = PALETTE[0], PALETTE[1], PALETTE[2], PALETTE[5], PALETTE[6]
MOST_LINES = len(PALETTE)
"""Clients that get a line of their own; more are dots around their mean."""
DPI = 150
MOST_SHAPES = 2000
"""Dots that a picture draws one by one; more are a raster in it."""
INK, SOFT, GRID, PAGE = "#1c2430", "#5b6675", "#e4e4e4", "#fefefe"
"""Of text and axes, of what stands back, of grids, of what separates cells."""
DOTS = "#808893"
"""Of single updates, which a raster may hold: the same on light and dark."""
_NAMED = {INK: "ink", SOFT: "soft", GRID: "grid", PAGE: "page"} | {
    colour.lower(): f"series-{number}" for number, colour in enumerate(PALETTE)
}
"""Colours that the page gives anew in the dark: its style names them."""
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "legend.frameon": False,
    "text.parse_math": False,  # names come from files, and may hold a $
    "legend.fontsize": 10,
}


@dataclass(frozen=True)
class Sheet:
    """How wide a picture is, in inches, and whether its panels and legends stand below each other."""

    width: float
    is_narrow: bool


WIDE, NARROW = Sheet(10.0, False), Sheet(4.8, True)
"""For a page and for a phone, whose 390 pixels show a narrow one's letters at their size."""


@dataclass(frozen=True)
class Drawing:
    """A figure with its name, its title, and a sentence of what there is to see."""

    name: str
    title: str
    caption: str
    figure: "Figure"


@dataclass(frozen=True)
class Picture:
    """A picture for a page and for a phone, as SVG elements without a namespace."""

    name: str
    title: str
    caption: str
    wide_svg: str
    narrow_svg: str
    png: bytes = b""
    """The wide form, where it is to be a file."""


def by_client(
    axes: "Axes",
    sheet: Sheet,
    merged_rounds: Sequence[MergedRound],
    of: Callable[[MergedRound], Mapping[int, float | None]],
) -> str:
    """Draw a line a client, or for many dots around the mean and the middle 80 %; return what the caption adds."""
    points: dict[int, list[tuple[int, float]]] = {}
    for merged in merged_rounds:
        for client, value in of(merged).items():
            if value is not None:
                points.setdefault(client, []).append((merged.number, value))
    rounds = [merged.number for merged in merged_rounds]
    drawn = sorted({client for merged in merged_rounds for client in merged.losses})
    if len(drawn) <= MOST_LINES:
        for colour, shape, client in zip(PALETTE, "os^DvPX*", drawn, strict=False):
            marker = shape if marker_of(rounds) else ""
            if client in points:
                label = f"client {client}"
                axes.plot(*np.transpose(points[client]), color=colour, marker=marker, markersize=4, label=label)
    else:
        everything = [point for found in points.values() for point in found]
        numbers, values = np.transpose(everything)
        is_many = len(everything) > MOST_SHAPES
        dots: dict[str, Any] = {"s": 7, "color": DOTS, "alpha": 0.45, "linewidth": 0, "rasterized": is_many}
        axes.scatter(numbers, values, label="one client", **dots)
        by_round: dict[int, list[float]] = {}
        for number, value in everything:
            by_round.setdefault(number, []).append(value)
        known = sorted(by_round)
        low, high = zip(*(np.percentile(by_round[number], [10, 90]) for number in known), strict=True)
        axes.fill_between(known, low, high, color=BLUE, alpha=0.18, linewidth=0, label="middle 80 %")
        axes.plot(known, [np.mean(by_round[number]) for number in known], color=BLUE, linewidth=2, label="mean")
    whole_rounds(axes, 6 if sheet.is_narrow else 12)
    outside_legend(axes, sheet)
    return "" if len(drawn) <= MOST_LINES else " A dot is a client's update; the band holds the middle 80 % of them."


def client_map(
    axes: "Axes", sheet: Sheet, grid: Any, merged_rounds: Sequence[MergedRound], clients: Sequence[int], **options: Any
) -> Any:
    """Draw a grid of clients x rounds."""
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", **options)
    axes.grid(visible=False)
    column_step = max(1, math.ceil(len(merged_rounds) / (8 if sheet.is_narrow else 20)))
    columns = range(0, len(merged_rounds), column_step)
    axes.set_xticks(columns, [str(merged_rounds[column].number) for column in columns])
    row_step = max(1, math.ceil(len(clients) / 26))
    rows = range(0, len(clients), row_step)
    axes.set_yticks(rows, [str(clients[row]) for row in rows])
    axes.set(xlabel="round", ylabel="client")
    if len(clients) <= 40 and len(merged_rounds) <= 60:
        axes.set_xticks(np.arange(-0.5, len(merged_rounds)), minor=True)
        axes.set_yticks(np.arange(-0.5, len(clients)), minor=True)
        axes.grid(visible=True, which="minor", color=PAGE, linewidth=1.2)
        axes.tick_params(which="minor", length=0)
    return image


def height_of(clients: Sequence[int]) -> float:
    """Return the inches that a row for each client takes."""
    return min(7.5, max(2.2, 1.3 + 0.2 * len(clients)))


def marker_of(rounds: Sequence[int]) -> str:
    """Return how points are marked: not at all where there are many."""
    return "o" if len(rounds) <= 40 else ""


def whole_rounds(axes: "Axes", most: int = 12) -> None:
    """Label whole rounds only, with at most about `most` labels."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=most, integer=True, min_n_ticks=1))


def outside_legend(axes: "Axes", sheet: Sheet) -> None:
    """Put the legend where it hides nothing: to the right of the panel, or below it on a narrow sheet."""
    if sheet.is_narrow:
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    else:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, markerscale=1.5)


def panels(
    height: float, num_rows: int = 1, num_columns: int = 1, *, sheet: Sheet = WIDE, **ratios: Any
) -> "tuple[Figure, list[Axes]]":
    """Return a figure of some inches' height with rows of panels, listed row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(sheet.width, height), layout="constrained")
    return figure, list(figure.subplots(num_rows, num_columns, squeeze=False, **ratios).flat)


def png_of(figure: "Figure") -> bytes:
    """Return the figure on white."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def svg_of(figure: "Figure", name: str) -> str:
    """Return the figure as an SVG element on nothing, whose colours are the page's; `name` keeps its ids apart."""
    from matplotlib import rc_context

    buffer = BytesIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", dpi=DPI, transparent=True, metadata=metadata)
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = (
        re.sub(r' (?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", text[: text.index(">")])
        + text[text.index(">") :]
    )
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL).replace("xlink:href", "href")
    text = re.sub(r'((?:id="|href="#|url\(#))', rf"\g<1>{name}-", text)
    text = re.sub(r"font-family: [^;\"]*(?:; )?", "", text)  # the page's own
    return re.sub("|".join(_NAMED), lambda found: f"var(--{_NAMED[found[0]]})", text)
