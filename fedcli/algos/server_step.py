"""The server's step: from the global adapter x and the mean D of the clients' differences to the next x."""

import numpy as np

from fedcli.algos.arrays import Array, Arrays


def add_mean(adapter: Arrays, mean_difference: Arrays) -> dict[str, Array]:
    """Return x + D: float64 arithmetic, float32 result."""
    return {
        name: np.add(array, mean_difference[name], dtype=np.float64).astype(np.float32)
        for name, array in adapter.items()
    }
