"""The server's step: from the global adapter x and the mean D of the clients' differences to the next x."""

from fedcli.algos.arrays import Array, Arrays


def add_mean(adapter: Arrays, mean_difference: Arrays) -> "dict[str, Array]":
    """Return x + D: float64 arithmetic, float32 result."""
    return {
        name: (array.astype("float64") + mean_difference[name]).astype("float32") for name, array in adapter.items()
    }
