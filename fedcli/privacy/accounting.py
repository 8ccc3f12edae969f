"""What Gaussian noise guarantees: (epsilon, delta) of rounds without sampling in closed form, of Poisson steps by PLDs.

The closed form is Balle and Wang's (2018, 1805.06530, Theorem 8): delta(epsilon) = Phi(1 / 2z - epsilon z) -
e^epsilon Phi(-1 / 2z - epsilon z). R releases with noise multiplier z are one with z / sqrt(R).
"""

import math
from collections.abc import Callable


def gaussian_delta(noise: float, epsilon: float) -> float:
    """Return the delta of one Gaussian release at a noise multiplier and an epsilon."""
    first, second = 1 / (2 * noise) - epsilon * noise, -1 / (2 * noise) - epsilon * noise
    return _phi(first) - math.exp(epsilon + _log_phi(second))


def gaussian_epsilon(noise: float, delta: float, rounds: int) -> float:
    """Return the epsilon of so many Gaussian releases; 0.0 for none."""
    if rounds == 0:
        return 0.0
    single = noise / math.sqrt(rounds)
    if gaussian_delta(single, 0.0) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(single, high) > delta:
        high *= 2
    return _bisect(lambda epsilon: gaussian_delta(single, epsilon) > delta, 0.0, high)


def gaussian_noise(epsilon: float, delta: float, rounds: int) -> float:
    """Return the least noise multiplier with which so many releases spend no more."""
    high = 1.0
    while gaussian_epsilon(high, delta, rounds) > epsilon:
        high *= 2
    return _bisect(lambda noise: gaussian_epsilon(noise, delta, rounds) > epsilon, high * 1e-9, high)


def _bisect(is_low: Callable[[float], bool], low: float, high: float) -> float:
    """Return the least value for which `is_low` is false, rounded up."""
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if is_low(middle) else (low, middle)
    return high


def _phi(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def _log_phi(x: float) -> float:
    """Return log Phi(x), also where Phi(x) is below the smallest float (asymptotic series)."""
    if x > -30:
        return math.log(_phi(x))
    return -x * x / 2 - math.log(-x * math.sqrt(2 * math.pi)) + math.log1p(-1 / (x * x) + 3 / x**4)
