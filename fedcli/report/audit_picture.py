"""A picture of an audit: how exposed canaries are, and the lower bounds on epsilon beside what is promised."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

from fedcli.report.drawing import DPI, GREY, SOFT, STYLE
from fedcli.report.rows_picture import PALETTE


@dataclass(frozen=True)
class Panel:
    """One model: by the copies that canaries have, figures; None where there is none."""

    name: str
    repeats: list[int]
    medians: list[float | None]
    highest: list[float | None]
    bounds: list[float | None]
    promised: list[float | None]


def draw_audit(models: Sequence[Panel], num_fillings: int) -> bytes:
    """Return a PNG: exposures by copies, and epsilon from below and above."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        repeats = models[0].repeats
        places = range(len(repeats))
        width = 0.8 / len(models)
        for number, (model, colour) in enumerate(zip(models, (GREY, *PALETTE), strict=False)):
            shifted = [place + (number - (len(models) - 1) / 2) * width for place in places]
            left.bar(shifted, _plain(model.medians), width * 0.9, color=colour, label=model.name)
            left.scatter(shifted, _plain(model.highest), marker="_", s=120, color=colour)
            if any(bound is not None for bound in model.bounds):
                right.bar(shifted, _plain(model.bounds), width * 0.9, color=colour, label=f"{model.name}, at least")
            right.scatter(shifted, _plain(model.promised), marker="v", color=colour, zorder=3)
        left.axhline(math.log2(num_fillings), color=SOFT, linestyle="--", label="the likeliest of all")
        left.set(title="Exposure of the canaries that were in", ylabel="bits: bar the median, dash the highest")
        title = "Epsilon: at least (95 %), and promised at most (triangles)"
        right.set(title=title, ylabel="epsilon for so many rows")
        for axes in (left, right):
            axes.set_xticks(list(places), [str(repeat) for repeat in repeats])
            axes.set_xlabel("copies of a canary")
        left.legend(loc="upper left")
        left.margins(y=0.45)
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _plain(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
