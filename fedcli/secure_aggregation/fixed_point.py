"""Fixed-point numbers on the ring of 2^64: what is summed there is exact, and a mask hides it perfectly."""

import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ring: TypeAlias = NDArray[np.uint64]
Floats: TypeAlias = NDArray[Any]

FRACTION_BITS = 32
LARGEST = 2.0**20
"""The largest weighted number that a client may send."""
MOST_CLIENTS = 2**10
"""So many of the largest numbers stay below 2^63: MOST_CLIENTS x LARGEST x 2^FRACTION_BITS = 2^62."""
_SCALE = 2.0**FRACTION_BITS
_BLOCK = 2**16


class OutOfRange(ValueError):
    """A number is beyond LARGEST, or none."""

    def __init__(self, value: float) -> None:
        super().__init__(f"{value:.6g} is not between -{LARGEST:,.0f} and {LARGEST:,.0f}")


def to_ring(values: Floats, weight: float = 1.0) -> Ring:
    """Return weight x values, each rounded to the nearest multiple of 2^-32, in two's complement."""
    weighted = np.multiply(values, weight, dtype=np.float64)
    if weighted.size:
        least, most = float(weighted.min()), float(weighted.max())
        if not (least >= -LARGEST and most <= LARGEST):  # NaN is neither
            raise OutOfRange(most if math.isnan(most) or most > -least else least)
    np.multiply(weighted, _SCALE, out=weighted)
    return np.rint(weighted, out=weighted).astype(np.int64).view(np.uint64)


def from_ring(total: Ring) -> NDArray[np.float64]:
    """Return the numbers that ring elements stand for."""
    numbers = total.view(np.int64).astype(np.float64)
    return np.divide(numbers, _SCALE, out=numbers)


def from_ring_in_place(total: Ring) -> NDArray[np.float64]:
    """Return the numbers that ring elements stand for, in the elements' own memory."""
    numbers = total.view(np.float64)
    for begin in range(0, total.size, _BLOCK):
        numbers[begin : begin + _BLOCK] = from_ring(total[begin : begin + _BLOCK])
    return numbers
