"""Arithmetic on named arrays: mappings from a tensor's name to a numpy array.

Only operators and methods of the arrays are used, so that commands that just read an algorithm's name need no numpy.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[Any]"
Arrays: TypeAlias = "Mapping[str, Array]"
"""Named arrays of any float type; the functions of algos/ leave their inputs untouched."""


def difference(minuend: Arrays, subtrahend: Arrays) -> "dict[str, Array]":
    """Return minuend - subtrahend in float64."""
    return {name: array.astype("float64") - subtrahend[name] for name, array in minuend.items()}


def norm(arrays: Arrays) -> float:
    """Return the Euclidean norm over all arrays together, in float64."""
    return math.sqrt(math.fsum(float((array * array).sum(dtype="float64")) for array in arrays.values()))


class RunningMean:
    """A weighted mean of named arrays that come one at a time; memory does not grow with their number."""

    def __init__(self) -> None:
        self._sums: dict[str, Array] = {}
        self.total_weight = 0.0

    def add(self, arrays: Arrays, weight: float) -> None:
        """Add one member with its weight (>= 0)."""
        for name, array in arrays.items():
            weighted = weight * array.astype("float64")
            if name in self._sums:
                self._sums[name] += weighted
            else:
                self._sums[name] = weighted
        self.total_weight += weight

    def mean(self) -> "dict[str, Array]":
        """Return the mean in float64, and forget it; raise ZeroDivisionError where the total weight is zero."""
        if self.total_weight == 0.0:
            raise ZeroDivisionError("the weights of all updates add up to zero")
        mean, self._sums = self._sums, {}
        for total in mean.values():
            total /= self.total_weight  # in place: the sums are as large as two adapters
        return mean
