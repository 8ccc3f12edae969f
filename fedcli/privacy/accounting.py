"""What Gaussian noise guarantees: (epsilon, delta) of rounds without sampling in closed form, of Poisson steps by PLDs.

The closed form is Balle and Wang's (2018, 1805.06530, Theorem 8): delta(epsilon) = Phi(1 / 2z - epsilon z) -
e^epsilon Phi(-1 / 2z - epsilon z). R releases with noise multiplier z are one with z / sqrt(R). Steps with Poisson
sampling are composed by dp-accounting, fedcli's extra `privacy`. Neighbours differ by one unit that is there or not.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import count
from typing import TypeAlias

from fedcli.errors import RequirementError, require_packages

PoissonSteps: TypeAlias = tuple[float, float, int]
"""Steps of one kind: how likely each unit is drawn for one, the noise multiplier, and their number."""

LEAST_STEP_NOISE, MOST_NOISE = 0.25, 2.0**20
"""Between which a multiplier for Poisson steps is looked for: with less noise than the least nothing is hidden."""


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
    return bisect(lambda epsilon: gaussian_delta(single, epsilon) > delta, 0.0, high)


def gaussian_noise(epsilon: float, delta: float, rounds: int) -> float:
    """Return the least noise multiplier with which so many releases spend no more."""
    high = 1.0
    while gaussian_epsilon(high, delta, rounds) > epsilon:
        high *= 2
    return bisect(lambda noise: gaussian_epsilon(noise, delta, rounds) > epsilon, high * 1e-9, high)


def poisson_epsilon(events: Sequence[PoissonSteps], delta: float) -> float:
    """Return the epsilon of steps (q, z, number) together; 0.0 for none, infinity where none is finite.

    Raises RequirementError where dp-accounting is missing.
    """
    steps: Counter[tuple[float, float]] = Counter()
    for sampling, noise, number in events:
        steps[sampling, noise] += number
    found = tuple(sorted((sampling, noise, number) for (sampling, noise), number in steps.items() if number))
    return _composed_epsilon(found, delta) if found else 0.0


def poisson_noise(
    epsilon: float, delta: float, q: float, steps: int, *, spent: Sequence[PoissonSteps] = (), start: float = 1.0
) -> float:
    """Return a noise multiplier with which steps, after those that were `spent`, spend no more; 0.1 % above the least.

    It is looked for from `start` on. Raises RequirementError where dp-accounting is missing, or where no noise up to
    2^20 is enough.
    """

    def excess(log_noise: float) -> float:
        found = poisson_epsilon([*spent, (q, math.exp(log_noise), steps)], delta)
        return math.log(min(max(found, 1e-12), 1e12) / epsilon)

    at = math.log(start)
    above = excess(at)
    ends = {above > 0: (at, above)}  # by whether it is too little noise
    while len(ends) < 2:
        at += max(-0.7, min(0.7, 0.8 * above)) + (0.05 if above > 0 else -0.05)
        if at > math.log(MOST_NOISE):
            raise RequirementError(
                f"no noise keeps {steps} steps within epsilon {epsilon:g} at delta {delta:g}",
                hint="Ask for a larger epsilon or delta, or for fewer steps.",
            )
        if at < math.log(LEAST_STEP_NOISE):
            return math.exp(ends[False][0])
        above = excess(at)
        ends[above > 0] = (at, above)
    return math.exp(_root(excess, ends[True], ends[False]))


def _root(falling: Callable[[float], float], low: tuple[float, float], high: tuple[float, float]) -> float:
    """Return where a falling function is 0, at most 0.001 too far, between two places with their values.

    Places are guessed by a line through the ends, in turn a little above and below it, so that both ends come near;
    each third one is the middle.
    """
    for turn in count():
        if high[0] - low[0] <= 0.001:
            break
        guess = low[0] + (high[0] - low[0]) * low[1] / (low[1] - high[1])
        guess = (low[0] + high[0]) / 2 if turn % 3 == 2 else guess + (0.0004 if turn % 2 == 0 else -0.0004)
        at = min(max(guess, low[0] + 1e-4), high[0] - 1e-4)
        value = falling(at)
        low, high = ((at, value), high) if value > 0 else (low, (at, value))
    return high[0]


@lru_cache(maxsize=256)
def _composed_epsilon(events: tuple[PoissonSteps, ...], delta: float) -> float:
    require_packages(["dp_accounting"])
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    for sampling, noise, number in events:
        gaussian = GaussianDpEvent(noise)
        accountant.compose(gaussian if sampling >= 1 else PoissonSampledDpEvent(sampling, gaussian), number)
    return float(accountant.get_epsilon(delta))


def bisect(is_low: Callable[[float], bool], low: float, high: float) -> float:
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
