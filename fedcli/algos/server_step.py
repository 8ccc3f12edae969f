"""The server's step: from the global adapter x and the mean D of the clients' differences to the next x.

Arithmetic is float64; adapters and states come back in float32, as they are stored. A state is a mapping of the
names m.NAME (momentum) and v.NAME (second moment); an empty one is a fresh start.
"""

from typing import Literal

from fedcli.algos.arrays import Array, Arrays, apply, to_float32

FIRST, SECOND = "m.", "v."
"""The prefixes of a momentum's and a second moment's names."""
Momentum = Literal["damped", "heavy_ball"]


def add_mean(adapter: Arrays, step: Arrays) -> "dict[str, Array]":
    """Return x + step, float32."""
    return apply(lambda x, d: x + d, adapter, step, dtype="float32")


def adaptive_step(adapter: Arrays, direction: Arrays, second: Arrays, *, eta: float, tau: float) -> "dict[str, Array]":
    """Return x + eta direction / (sqrt v + tau), float32: Reddi et al. 2021, algorithm 2."""
    return apply(lambda x, d, v: x + eta * d / (v**0.5 + tau), adapter, direction, second, dtype="float32")


def next_momentum(state: Arrays, mean: Arrays, *, beta1: float, form: Momentum = "damped") -> "dict[str, Array]":
    """Return m+ in float64: b1 m + (1 - b1) D, or b1 m + D for a heavy ball; D itself while there is no m."""
    if not state:
        return apply(lambda d: d, mean)
    share = 1.0 - beta1 if form == "damped" else 1.0
    return apply(lambda m, d: beta1 * m + share * d, part(state, FIRST), mean)


def second_moment(state: Arrays, mean: Arrays, tau: float) -> "dict[str, Array]":
    """Return v: what the state holds, or tau^2 everywhere in a fresh start."""
    return part(state, SECOND) if state else apply(lambda d: d * 0.0 + tau**2, mean)


def part(state: Arrays, prefix: str) -> "dict[str, Array]":
    """Return the arrays of a state whose names begin with a prefix, by the adapter's names."""
    return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}


def stored(prefix: str, arrays: Arrays) -> "dict[str, Array]":
    """Return arrays as a state holds them: float32, named with a prefix."""
    return {prefix + name: array for name, array in to_float32(arrays).items()}
