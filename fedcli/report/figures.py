"""A report's pictures: readable for 2 to 200 rounds and 2 to 100 clients, by the colour-blind, and on paper."""

import math
import textwrap
from collections.abc import Callable
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from fedcli.quantities import byte_unit, describe_seconds
from fedcli.report import drawing
from fedcli.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    MOST_LINES,
    NARROW,
    ORANGE,
    SOFT,
    STYLE,
    WIDE,
    Drawing,
    Picture,
    Sheet,
    whole_rounds,
)
from fedcli.report.remarks import has_absences, has_uneven_bytes, has_uneven_times
from fedcli.report.series import MergedRound, MetricScores, Report, Similarity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_METRICS = 24
MOST_CLIENTS = 100
"""Clients that a chart with a row for each shows."""
NAMES = ("loss", "loss-map", "scores", "norms", "cosine", "transfer", "timings", "cohorts")
"""Of all pictures that a report may have, in its order."""


def draw(report: Report) -> list[Picture]:
    """Return the pictures that there is something to show in."""
    from matplotlib import rc_context

    drawings = (_losses, _loss_map, _scores, _norms, _cosines, _transfer, _timings, _cohorts)
    with rc_context(STYLE):
        return [picture for draw_one in drawings if (picture := _picture(draw_one, report)) is not None]


def _picture(draw_one: "Callable[[Report, Sheet], Drawing | None]", report: Report) -> Picture | None:
    wide, narrow = (draw_one(report, sheet) for sheet in (WIDE, NARROW))
    if wide is None or narrow is None:
        return None
    png = drawing.png_of(wide.figure)
    svgs = (drawing.svg_of(wide.figure, f"{wide.name}-wide"), drawing.svg_of(narrow.figure, f"{wide.name}-narrow"))
    return Picture(wide.name, wide.title, wide.caption, *svgs, png)


def shown_clients(report: Report) -> list[int]:
    """Return the clients that a chart with a row for each shows: the first that were ever drawn."""
    return sorted({client for merged in report.merged for client in merged.cohort})[:MOST_CLIENTS]


def _losses(report: Report, sheet: Sheet) -> Drawing | None:
    means = [(merged.number, merged.mean_loss) for merged in report.merged if merged.mean_loss is not None]
    if not means:
        return None
    figure, (axes,) = drawing.panels(4.2, sheet=sheet)
    legend_note = drawing.by_client(axes, sheet, report.merged, lambda merged: merged.losses)
    axes.set(ylabel="training loss", xlabel="round")
    (first, start), (last, end) = means[0], means[-1]
    caption = f"The mean training loss of the counted updates is {start:.3f} in round {first}"
    caption += f" and {end:.3f} in round {last}." if last > first else "."
    return Drawing("loss", "Training loss by client and round", caption + legend_note, figure)


def _loss_map(report: Report, sheet: Sheet) -> Drawing | None:
    clients = shown_clients(report)
    if len(clients) <= MOST_LINES or not any(merged.mean_loss is not None for merged in report.merged):
        return None
    grid = np.array([[merged.losses.get(client) for merged in report.merged] for client in clients], float)
    figure, (axes,) = drawing.panels(drawing.height_of(clients), sheet=sheet)
    low, high = np.nanpercentile(grid, [1, 99])
    image = drawing.client_map(axes, sheet, grid, report.merged, clients, cmap="viridis_r", vmin=low, vmax=high)
    figure.colorbar(image, ax=axes, label="training loss", pad=0.01, extend="both", extendfrac=0.02)
    caption = "Dark: a high loss; empty: not counted in that round. A row that stays dark is a client that the others"
    return Drawing("loss-map", "Training loss, client by client", f"{caption} do not help.", figure)


def _scores(report: Report, sheet: Sheet) -> Drawing | None:
    metrics = [metric for metric in report.scores if metric.rounds][:MOST_METRICS]
    if not metrics:
        return None
    num_columns = 1 if sheet.is_narrow else min(3, len(metrics))
    num_rows = math.ceil(len(metrics) / num_columns)
    figure, grid = drawing.panels(
        4.2 if num_rows == num_columns == 1 else 3.4 * num_rows, num_rows, num_columns, sheet=sheet
    )
    for axes, metric in zip(grid, metrics, strict=False):
        _score_panel(axes, metric, is_narrow=sheet.is_narrow or num_columns > 1)
    for axes in grid[len(metrics) :]:
        axes.set_axis_off()
    labels = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if sheet.is_narrow or num_columns > 1:
        figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=2 if sheet.is_narrow else 4)
    else:
        drawing.outside_legend(grid[0], sheet)
    left_out = len([metric for metric in report.scores if metric.rounds]) - len(metrics)
    caption = "Scores of the global adapter, with 95 % bootstrap intervals; the level lines are the base model, the "
    caption += "best client alone and all rows pooled, as far as they were scored."
    caption += f" {left_out} more metrics are in the table below." if left_out else ""
    return Drawing("scores", "Scores by round", caption, figure)


def _score_panel(axes: "Axes", metric: MetricScores, *, is_narrow: bool) -> None:
    rounds = sorted(metric.rounds)
    values = [metric.rounds[number].value for number in rounds]
    lows, highs = ([getattr(metric.rounds[number], end) for number in rounds] for end in ("low", "high"))
    if drawing.marker_of(rounds):
        errors = np.subtract([values, highs], [lows, values]).clip(0)
        axes.errorbar(
            rounds, values, errors, color=BLUE, marker="o", markersize=4, capsize=2, label="federated", zorder=3
        )
    else:
        axes.fill_between(rounds, lows, highs, color=BLUE, alpha=0.18, linewidth=0)
        axes.plot(rounds, values, color=BLUE, label="federated", zorder=3)
    styles = {"base": (GREY, ":"), "pooled": (GREEN, "-."), "best alone": (ORANGE, "--")}
    for label, point in metric.lines().items():
        kind = label.partition(" (")[0]
        colour, style = styles[kind]
        axes.axhline(point.value, color=colour, linestyle=style, linewidth=1.8, label=kind if is_narrow else label)
    ends = [*lows, *highs, *(point.value for point in metric.lines().values())]
    room = 0.08 * (max(ends) - min(ends)) or 0.05
    axes.set_ylim(min(ends) - room, max(ends) + room)
    arrow = "" if metric.higher_is_better else " (lower is better)"
    axes.set_title("\n".join(textwrap.wrap(metric.title + arrow, 27 if is_narrow else 80)))
    axes.set(xlabel="round", ylabel=metric.unit)
    if len(rounds) == 1:
        axes.set_xlim(rounds[0] - 1, rounds[0] + 1)
    step = math.ceil(len(rounds) / (6 if is_narrow else 16))
    axes.set_xticks(rounds[::-1][::step])  # where rounds were scored, the last one among them


def _norms(report: Report, sheet: Sheet) -> Drawing | None:
    if not any(merged.norms for merged in report.merged):
        return None
    figure, (axes,) = drawing.panels(4.2, sheet=sheet)
    legend_note = drawing.by_client(axes, sheet, report.merged, lambda merged: merged.norms)
    axes.set(ylabel="norm of the update", xlabel="round")
    values = [norm for merged in report.merged for norm in merged.norms.values() if norm > 0]
    if values and max(values) > 30 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    caption = "How far each client moved the adapter (Euclidean norm over all its numbers). One far above the others "
    return Drawing("norms", "Update norms", caption + "pulls the mean its way." + legend_note, figure)


def _cosines(report: Report, sheet: Sheet) -> Drawing | None:
    found = [similarity for similarity in report.similarities if len(similarity.clients) > 1]
    if not found:
        return None
    last = found[-1]
    if sheet.is_narrow:
        figure, (left, right) = drawing.panels(8.2, 2, 1, sheet=sheet)
    else:
        figure, (left, right) = drawing.panels(4.6, 1, 2, width_ratios=(1.0, 1.15), sheet=sheet)
    rounds = [similarity.round for similarity in found]
    means, lows, highs = (
        [float(reduce(similarity.pairs())) for similarity in found] for reduce in (np.mean, np.min, np.max)
    )
    left.fill_between(rounds, lows, highs, color=BLUE, alpha=0.15, linewidth=0, label="lowest pair to highest")
    left.plot(rounds, means, color=BLUE, marker=drawing.marker_of(rounds), markersize=4, label="mean over pairs")
    left.axhline(0, color=SOFT, linewidth=0.8)
    left.set(title="over the rounds", xlabel="round", ylabel="cosine")
    whole_rounds(left, 7)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    _cosine_map(figure, right, sheet, last)
    caption = "1: all clients pull the same way; 0: they have nothing in common; below 0: they undo each other's work."
    pairs, names = last.pairs(), list(combinations(last.clients, 2))
    (one, other), cosine = names[int(pairs.argmax())], pairs.max()
    caption += f" Closest in round {last.round}: clients {one} and {other} ({cosine:.2f})"
    if len(pairs) > 1:
        (one, other), cosine = names[int(pairs.argmin())], pairs.min()
        caption += f"; farthest apart: {one} and {other} ({cosine:.2f})"
    return Drawing("cosine", "Cosine similarity between the clients' updates", f"{caption}.", figure)


def _cosine_map(figure: "Figure", axes: "Axes", sheet: Sheet, last: Similarity) -> None:
    num_clients = len(last.clients)
    image = axes.imshow(last.cosines, cmap="RdBu_r", vmin=-1, vmax=1)
    axes.grid(visible=False)
    ticks = range(0, num_clients, math.ceil(num_clients / (10 if sheet.is_narrow else 20)))
    names = [str(last.clients[tick]) for tick in ticks]
    axes.set_xticks(ticks, names, rotation=90 if num_clients > 10 else 0, fontsize=9)
    axes.set_yticks(ticks, names, fontsize=9)
    axes.set(title=f"round {last.round}, client by client", xlabel="client", ylabel="client")
    if num_clients <= 8:
        for row, column in np.ndindex(num_clients, num_clients):
            cosine = last.cosines[row, column]
            colour = "white" if abs(cosine) > 0.65 else "black"
            axes.text(column, row, f"{cosine:.2f}", ha="center", va="center", color=colour, fontsize=9)
    place: dict[str, Any] = (
        {"location": "bottom", "ticks": [-1, -0.5, 0, 0.5, 1]} if sheet.is_narrow else {"shrink": 0.85}
    )
    figure.colorbar(image, ax=axes, label="cosine", **place)


def _transfer(report: Report, sheet: Sheet) -> Drawing | None:
    down = {merged.number: merged.total_bytes_down for merged in report.merged if merged.total_bytes_down is not None}
    up = {merged.number: merged.total_bytes_up for merged in report.merged if merged.total_bytes_up is not None}
    most = max([0, *down.values(), *up.values()])
    if not most or not has_uneven_bytes(report):
        return None
    unit, size = byte_unit(most)
    figure, (axes,) = drawing.panels(3.2, sheet=sheet)
    dot = "o" if len(report.merged) == 1 else ""
    lines = ((down, ORANGE, "--", 4.0, "received by clients"), (up, BLUE, "-", 1.8, "sent by clients"))
    for totals, colour, style, width, label in lines:  # the wide one is seen beside the other where both are the same
        values = [total / size for total in totals.values()]
        axes.plot(list(totals), values, color=colour, linestyle=style, linewidth=width, marker=dot, label=label)
    axes.set(xlabel="round", ylabel=f"{unit}, from the start", ylim=(0, None))
    whole_rounds(axes, 6 if sheet.is_narrow else 12)
    axes.legend(loc="upper left")
    caption = "Adapters and control variates, of all clients together; manifests and update.json are a few kB each."
    return Drawing("transfer", "Bytes", caption, figure)


def _timings(report: Report, sheet: Sheet) -> Drawing | None:
    if not has_uneven_times(report):
        return None
    seconds = [merged.seconds for merged in report.merged]
    units = (("hours", 3600), ("minutes", 60))
    unit, size = next((found for found in units if max(seconds) >= 2 * found[1]), ("seconds", 1))
    figure, (axes,) = drawing.panels(3.2, sheet=sheet)
    axes.bar([merged.number for merged in report.merged], [value / size for value in seconds], 0.8, color=BLUE)
    axes.set(xlabel="round", ylabel=unit)
    axes.grid(visible=False, axis="x")
    whole_rounds(axes, 6 if sheet.is_narrow else 12)
    median = describe_seconds(sorted(seconds)[len(seconds) // 2])
    caption = f"From a round's publication to the next one's, by the disk's clock; half of them took at most {median}."
    return Drawing("timings", "Time of each round", caption, figure)


def _cohorts(report: Report, sheet: Sheet) -> Drawing | None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    clients = shown_clients(report)
    if not has_absences(report):
        return None
    names = ("not drawn", "counted", "missing", "refused", "not needed")
    colours = ("#7F7F7F30", "#0B78B8", "#EBA31A", "#D8611A", "#5BB7EB")  # a map's are the same on light and dark
    grid = np.array([[_fate(merged, client) for merged in report.merged] for client in clients])
    figure, (axes,) = drawing.panels(drawing.height_of(clients), sheet=sheet)
    drawing.client_map(axes, sheet, grid, report.merged, clients, cmap=ListedColormap(colours), vmin=-0.5, vmax=4.5)
    if grid.size <= 4000:
        refused = np.argwhere(grid == 3)  # told apart without colour, too
        axes.scatter(refused[:, 1], refused[:, 0], marker="x", s=18, color="white", linewidth=1.2)
    seen = [Patch(color=colours[code], label=names[code]) for code in range(5) if (grid == code).any()]
    figure.legend(handles=seen, loc="outside upper left", ncols=3 if sheet.is_narrow else len(seen))
    counted = sum(len(merged.losses) for merged in report.merged)
    drawn = sum(len(merged.cohort) for merged in report.merged)
    caption = f"{counted:,} of the {drawn:,} updates that were asked for were counted."
    return Drawing("cohorts", "Who took part", caption, figure)


def _fate(merged: MergedRound, client: int) -> int:
    if client not in merged.cohort:
        return 0
    if client in merged.losses:
        return 1
    if client in merged.missing:
        return 2
    return 3 if client in merged.refused else 4
