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
_BLOCK = 2**15
"""Numbers that are added at once: a quarter of a megabyte in float64."""


def difference(minuend: Arrays, subtrahend: Arrays) -> "dict[str, Array]":
    """Return minuend - subtrahend in float64."""
    return {name: array.astype("float64") - subtrahend[name] for name, array in minuend.items()}


def apply(
    function: "Callable[..., Array]", first: Arrays, *others: Arrays, dtype: str = "float64"
) -> "dict[str, Array]":
    """Apply a function, name by name, to the arrays of some mappings in float64; return the results as `dtype`."""
    return {
        name: function(array.astype("float64"), *(other[name].astype("float64") for other in others)).astype(
            dtype, copy=False
        )
        for name, array in first.items()
    }


def to_float32(arrays: Arrays) -> "dict[str, Array]":
    """Return the arrays as they are stored, in float32."""
    return {name: array.astype("float32") for name, array in arrays.items()}


class WeightedSum:
    """A weighted sum of named arrays that come one at a time; memory does not grow with their number."""

    def __init__(self) -> None:
        self._sums: dict[str, Array] = {}
        self.total_weight = 0.0

    def add(self, arrays: Arrays, weight: float, *, origin: "Arrays | None" = None) -> float:
        """Add weight (>= 0) times the difference of a member and `origin` (zero for None); return that one's norm.

        Float64, and block by block: what is computed on the way stays in the processor's cache, and the result does
        not depend on the number of threads.
        """
        squares = []
        for name, array in arrays.items():
            is_first = name not in self._sums
            if is_first:
                self._sums[name] = array.astype("float64", order="C")
            total, values = self._sums[name].reshape(-1), array.reshape(-1)
            start = None if origin is None else origin[name].reshape(-1)
            for begin in range(0, values.size, _BLOCK):
                block = slice(begin, begin + _BLOCK)
                member = values[block].astype("float64")
                if start is not None:
                    member -= start[block].astype("float64")
                squares.append(float((member * member).sum()))
                member *= weight
                if is_first:
                    total[block] = member
                else:
                    total[block] += member
        self.total_weight += weight
        return math.sqrt(math.fsum(squares))

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
