"""A picture of a split: every client's rows by group, as numbers and as shares, and how long rows are."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np

NUM_COLOURED = 20
"""Groups that get a colour of their own."""
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7F7F", "#1A1A1A")
"""Colours that the colour-blind tell apart (Okabe and Ito 2008), grey in place of yellow, which is lost on white."""
_OTHERS = "#DDDDDD"


@dataclass(frozen=True)
class Bar:
    """One client's rows, in all and by group (no groups where the split went by none)."""

    client: int
    num_rows: int
    groups: list[int]


def draw(bars: Sequence[Bar], groups: Sequence[str], lengths: Sequence[int], max_length: int) -> bytes:
    """Return a PNG: a bar of rows a client, coloured by group, the same as shares, and a histogram of tokens a row."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):  # a group's name may hold a $
        return _draw(bars, groups, lengths, max_length)


def _draw(bars: Sequence[Bar], groups: Sequence[str], lengths: Sequence[int], max_length: int) -> bytes:
    from matplotlib.figure import Figure

    positions = np.arange(len(bars))
    if groups and all(bar.groups for bar in bars):
        counts = np.array([bar.groups for bar in bars])
        heaviest = np.argsort(-counts.sum(axis=0), kind="stable")
        named, rest = np.sort(heaviest[:NUM_COLOURED]), heaviest[NUM_COLOURED:]
        layers = [(_shortened(groups[group]), counts[:, group]) for group in named]
        if len(rest):
            layers.append((f"{len(rest)} others", counts[:, rest].sum(axis=1)))
    else:
        layers = [("", np.array([bar.num_rows for bar in bars]))]
    colours = [*_colours(min(len(layers), NUM_COLOURED)), _OTHERS]
    totals = np.maximum(sum(heights for _, heights in layers), 1)
    kinds = [("Rows of each client", "rows", np.ones(len(bars)))]
    if len(layers) > 1:
        kinds.append(("What they are, client by client", "share of its rows", 1 / totals))
    figure = Figure(figsize=(6 * (len(kinds) + 1), 5), layout="constrained")
    *stacks, right = figure.subplots(1, len(kinds) + 1)
    for axes, (title, label, scale) in zip(stacks, kinds, strict=True):
        bottom = np.zeros(len(bars))
        for (name, heights), colour in zip(layers, colours, strict=False):
            axes.bar(positions, heights * scale, 0.8, bottom, label=name, color=colour)
            bottom += heights * scale
        if len(bars) <= 40:
            axes.set_xticks(positions, [str(bar.client) for bar in bars])
        axes.set(title=title, xlabel="client", ylabel=label)
    if len(layers) > 1:
        stacks[-1].legend(fontsize="small", frameon=False, reverse=True, loc="center left", bbox_to_anchor=(1.0, 0.5))
    right.hist(lengths, bins=min(40, max(1, len(set(lengths)))), color=colours[0])
    if max(lengths) > max_length / 2:
        right.axvline(max_length, color="black", linestyle="--", label=f"max_length {max_length}")
        right.legend(fontsize="small", frameon=False)
        right.margins(y=0.15)  # room for the legend
    right.set(title="Tokens of a row, templated, before any cut", xlabel="tokens", ylabel="rows")
    for axes in (*stacks, right):
        axes.spines[["top", "right"]].set_visible(False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _colours(count: int) -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if count <= len(PALETTE):
        return list(PALETTE[:count])
    return [to_hex(colormaps["tab20"](position)) for position in range(count)]


def _shortened(name: str, limit: int = 40) -> str:
    """Return a name that has lost its middle where it is long: names of a kind differ at their ends."""
    return name if len(name) <= limit else f"{name[: limit - 13]}…{name[-12:]}"
