"""What tells an unusual update: its norm, its cosine to the mean, its leave-one-out change; marking is not acting.

Plain numbers and no numpy, for `fedcli status` reads them of manifests.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fedcli.algos.arrays import Array

FAR = 5.0
"""Median absolute deviations from the median, beyond which a figure is marked."""
FEWEST = 4
"""Updates of which a median says anything."""


class Diagnosis(NamedTuple):
    """An update's figures.

    `change` is the norm of what the mean changes by where the update is left out, over the mean's own norm.
    """

    norm: float
    cosine: float
    change: float


def diagnose(products: "Array", shares: "Array") -> list[Diagnosis]:
    """Return the figures of each update by the Gram matrix of all and their shares of the mean, which add up to 1.

    Leaving out update i changes the mean z by p_i / (1 - p_i) (z - x_i). A figure that has no meaning is zero.
    """
    import numpy as np

    towards = products @ shares
    mean = float(np.sqrt(max(shares @ towards, 0.0)))
    found = []
    for square, product, share in zip(products.diagonal(), towards, shares, strict=True):
        norm = float(np.sqrt(max(square, 0.0)))
        apart = float(np.sqrt(max(square - 2 * product + mean * mean, 0.0)))
        cosine = max(-1.0, min(1.0, float(product) / (norm * mean))) if norm * mean > 0 else 0.0
        change = float(share) / (1 - float(share)) * apart / mean if mean > 0 and share < 1 else 0.0
        found.append(Diagnosis(norm, cosine, change))
    return found


def outliers(figures: Mapping[str, Sequence[float | None]]) -> list[list[str]]:
    """Return for each update the names of those of its figures that lie over FAR deviations from the median.

    `figures` hold a number for each update, by name; a deviation is the median of the distances to the median.
    """
    marks: list[list[str]] = [[] for _ in max(figures.values(), key=len, default=())]
    for name, values in figures.items():
        known = [value for value in values if value is not None]
        if len(known) < FEWEST:
            continue
        middle = _median(known)
        deviation = _median([abs(value - middle) for value in known])
        limit = max(FAR * deviation, 1e-6 * abs(middle))  # where most are equal, a last digit tells nothing
        for mark, value in zip(marks, values, strict=True):
            if value is not None and abs(value - middle) > limit:
                mark.append(name)
    return marks


def _median(values: Sequence[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2
