"""Arithmetic on named arrays: mappings from a tensor's name to a numpy array.

Only operators and methods of the arrays are used, so that commands that just read an algorithm's name need no numpy.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[Any]"
Arrays: TypeAlias = "Mapping[str, Array]"
"""Named arrays of any float type; the functions of algos/ leave their inputs untouched."""


def difference(minuend: Arrays, subtrahend: Arrays) -> "dict[str, Array]":
    """Return minuend - subtrahend in float64."""
    return {name: array.astype("float64") - subtrahend[name] for name, array in minuend.items()}


def apply(function: "Callable[..., Array]", first: Arrays, *others: Arrays) -> "dict[str, Array]":
    """Apply a function, name by name, to the arrays of some mappings in float64."""
    return {
        name: function(array.astype("float64"), *(other[name].astype("float64") for other in others))
        for name, array in first.items()
    }


def to_float32(arrays: Arrays) -> "dict[str, Array]":
    """Return the arrays as they are stored, in float32."""
    return {name: array.astype("float32") for name, array in arrays.items()}


def norm(arrays: Arrays) -> float:
    """Return the Euclidean norm over all arrays together, in float64."""
    return math.sqrt(math.fsum(float((array * array).sum(dtype="float64")) for array in arrays.values()))


class WeightedSum:
    """A weighted sum of named arrays that come one at a time; memory does not grow with their number."""

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

    def over(self, divisor: float) -> "dict[str, Array]":
        """Return the sum over a divisor in float64, and forget it; raise ZeroDivisionError where the divisor is zero.

        Over `total_weight` it is the weighted mean.
        """
        if divisor == 0.0:
            raise ZeroDivisionError("the weights of all updates add up to zero")
        sums, self._sums = self._sums, {}
        for total in sums.values():
            total /= divisor  # in place: the sums are as large as two adapters
        return sums
