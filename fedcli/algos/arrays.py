"""Arithmetic on named arrays: mappings from a tensor's name to a numpy array.

Only operators and methods of the arrays are used, so that commands that just read an algorithm's name need no numpy.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[Any]"
Arrays: TypeAlias = "Mapping[str, Array]"
"""Named arrays of any float type; the functions of algos/ leave their inputs untouched."""
_BLOCK = 2**13
"""Numbers that are computed at once."""


def apply(
    function: "Callable[..., Array]", first: Arrays, *others: Arrays, dtype: str = "float64"
) -> "dict[str, Array]":
    """Apply a function of numbers, name by name, to the arrays of some mappings in float64; the results are `dtype`.

    It goes block by block: what is computed on the way stays in the processor's cache.
    """
    import numpy as np

    results = {name: np.empty(array.shape, dtype) for name, array in first.items()}
    for name, result in results.items():
        inputs = [arrays[name].reshape(-1) for arrays in (first, *others)]
        flat = result.reshape(-1)
        for begin in range(0, flat.size, _BLOCK):
            block = slice(begin, begin + _BLOCK)
            flat[block] = function(*(values[block].astype("float64") for values in inputs))
    return results


def to_float32(arrays: Arrays) -> "dict[str, Array]":
    """Return the arrays as they are stored, in float32."""
    return {name: array.astype("float32") for name, array in arrays.items()}
