"""What an audit makes of likelihoods: exposure, Min-K%, how well members are told apart, a lower bound on epsilon.

Exposure is Carlini et al.'s (2019, 1802.08232), Min-K% Shi et al.'s (2310.16789), Min-K%++ Zhang et al.'s (2404.02936),
the lower bound from one run Steinke, Nasr and Jagielski's (2023, 2305.08846).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcli.privacy.accounting import bisect

CONFIDENCE = 0.95
LOWEST_PERCENT = 20
"""Of a text's tokens: the k of Min-K%."""
GUESSED_SHARES = (1.0, 0.5, 0.25)
"""Of the canaries, the surest of which a guess is made of; the best of these counts, each at a share of the error."""

Numbers = NDArray[np.float64]


def rank_among(score: float, others: Sequence[float]) -> int:
    """Return a score's rank, 1 the highest, among itself and others; equal ones stand before it."""
    return 1 + sum(other >= score for other in others)


def exposure(rank: int, num_fillings: int) -> float:
    """Return log2 |R| - log2 rank, in bits: of a canary that is no likelier than others 1.44 on average."""
    return math.log2(num_fillings) - math.log2(rank)


def min_k(log_probs: Sequence[float], percent: float = LOWEST_PERCENT) -> float:
    """Return the mean of the lowest `percent` of the tokens' log-probabilities, of one token at least."""
    lowest = sorted(log_probs)[: max(1, int(len(log_probs) * percent / 100))]
    return math.fsum(lowest) / len(lowest)


def min_k_plus(
    log_probs: Sequence[float], means: Sequence[float], deviations: Sequence[float], percent: float = LOWEST_PERCENT
) -> float:
    """Return Min-K%++: Min-K% of (log p - mean) / deviation, both over the words that could stand at the token's place.

    A deviation of 0, where all words are alike likely, gives 0.
    """
    places = zip(log_probs, means, deviations, strict=True)
    return min_k(
        [(log_prob - mean) / deviation if deviation > 0 else 0.0 for log_prob, mean, deviation in places], percent
    )


@dataclass(frozen=True)
class Estimate:
    """A share or a probability, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Separation:
    """How well scores tell members from others.

    `threshold_rate` is the share of others that the threshold of `true_positives` really takes for members: at most
    1 %, and 0 where there are fewer than a hundred.
    """

    auc: Estimate
    true_positives: Estimate
    threshold_rate: float
    num_members: int
    num_others: int


def separate(members: Sequence[float], others: Sequence[float]) -> Separation | None:
    """Return AUC, and the share of members found at a false-positive rate of 1 %; None where a side is empty.

    The AUC's interval solves |estimate - AUC| = z sqrt(V(AUC)) with Hanley and McNeil's variance (Newcombe 2006, method
    5). The share's is Clopper and Pearson's; it takes the threshold as given.
    """
    if not members or not others:
        return None
    inside, outside = np.asarray(members, np.float64), np.asarray(others, np.float64)
    above = (inside[:, None] > outside).sum() + (inside[:, None] == outside).sum() / 2
    num_false = int(len(others) * 0.01)
    threshold = np.sort(outside)[::-1][num_false]  # what is above it has num_false of the others at most
    found = int((inside > threshold).sum())
    return Separation(
        auc=_auc_interval(float(above) / (len(members) * len(others)), len(members), len(others)),
        true_positives=share(found, len(members)),
        threshold_rate=float((outside > threshold).mean()),
        num_members=len(members),
        num_others=len(others),
    )


def share(found: int, total: int) -> Estimate:
    """Return a share with Clopper and Pearson's interval; total is 1 or more."""
    tail = (1 - CONFIDENCE) / 2
    low = 0.0 if found == 0 else bisect(lambda p: binomial_tail(found, total, p) < tail, 0.0, 1.0)
    high = 1.0 if found == total else bisect(lambda p: 1 - binomial_tail(found + 1, total, p) > tail, 0.0, 1.0)
    return Estimate(found / total, low, high)


def binomial_tail(least: int, total: int, p: float) -> float:
    """Return P[Bin(total, p) >= least]."""
    if least <= 0:
        return 1.0
    if p <= 0.0 or p >= 1.0:
        return float(p >= 1.0 and least <= total)
    log_p, log_q = math.log(p), math.log1p(-p)
    terms = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) + k * log_p + (total - k) * log_q
        for k in range(least, total + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, terms)))


def epsilon_at_least(
    num_right: int,
    num_guesses: int,
    *,
    delta: float = 0.0,
    num_canaries: int | None = None,
    error: float = 1 - CONFIDENCE,
) -> float:
    """Return the smallest epsilon that is consistent, up to `error`, with so many right guesses.

    Each of `num_canaries` (None: as many as guesses) was in or out by a fair coin. Under epsilon alone the right ones
    are at most Bin(guesses, e^epsilon / (1 + e^epsilon)), whatever was guessed and of which canaries. Under (epsilon,
    delta) each canary adds delta to the probability of any event: two distributions that are (epsilon, delta)-close
    agree up to a factor of e^epsilon once a part of delta is cut from each, so that a guess is right by more than
    e^epsilon / (1 + e^epsilon) only where one of the cut parts was drawn, with probability num_canaries x delta at
    most. The paper's correction is another one of the same size.
    """
    cut = (num_guesses if num_canaries is None else num_canaries) * delta

    def is_refuted(epsilon: float) -> bool:
        return binomial_tail(num_right, num_guesses, 1 / (1 + math.exp(-epsilon))) + cut < error

    if not is_refuted(0.0):
        return 0.0
    high = 1.0
    while is_refuted(high):
        high *= 2
    return bisect(is_refuted, 0.0, high)


@dataclass(frozen=True)
class Bound:
    """A lower bound on epsilon at 95 % confidence: it comes of so many guesses, of which so many were right."""

    epsilon: float
    num_right: int
    num_guesses: int
    num_canaries: int
    confidence: float = CONFIDENCE


def one_run_bound(groups: Sequence[tuple[Sequence[float], Sequence[bool]]], delta: float = 0.0) -> Bound:
    """Return the bound of canaries in groups, each with scores and whether it was in; higher scores mean "in".

    Guesses follow from scores alone. Of all canaries of a group they are made by the cut that leaves least variance in
    both parts (Otsu 1979); of a smaller share of GUESSED_SHARES the highest are "in", as many lowest "out". As the best
    of several shares counts, each has a part of the error.
    """
    error = (1 - CONFIDENCE) / len(GUESSED_SHARES)
    num_canaries = sum(len(scores) for scores, _ in groups)
    best = Bound(0.0, 0, 0, num_canaries)
    for share_guessed in GUESSED_SHARES:
        num_right = num_guesses = 0
        for scores, included in groups:
            chosen, guesses = _guesses(np.asarray(scores, np.float64), share_guessed)
            num_guesses += len(chosen)
            num_right += int((np.asarray(included, np.bool_)[chosen] == guesses).sum())
        epsilon = epsilon_at_least(num_right, num_guesses, delta=delta, num_canaries=num_canaries, error=error)
        if epsilon > best.epsilon or best.num_guesses == 0:
            best = Bound(epsilon, num_right, num_guesses, num_canaries)
    return best


def group_guarantee(epsilon: float, delta: float, size: int) -> tuple[float, float]:
    """Return what (epsilon, delta) for one unit guarantees for `size` of them together."""
    if size == 1:
        return epsilon, delta
    if epsilon == 0:
        return 0.0, min(1.0, size * delta)
    if size * epsilon > 700:
        return size * epsilon, 1.0
    return size * epsilon, min(1.0, delta * math.expm1(size * epsilon) / math.expm1(epsilon))


def _guesses(scores: Numbers, share_guessed: float) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return of which canaries a guess is made, and the guesses: whether each was in."""
    order = np.argsort(scores, kind="stable")
    if share_guessed == 1.0:
        return order, scores[order] > _cut(scores)
    num_each = int(len(scores) * share_guessed / 2)
    chosen = np.r_[order[len(order) - num_each :], order[:num_each]]
    return chosen, np.arange(2 * num_each) < num_each


def _cut(scores: Numbers) -> float:
    """Return the point that cuts numbers in two so that the variance within both parts is least."""
    ordered = np.sort(scores)
    if len(ordered) < 2:
        return 0.0
    sizes = np.arange(1, len(ordered))
    below = ordered.cumsum()[:-1] / sizes
    above = (ordered.sum() - ordered.cumsum()[:-1]) / (len(ordered) - sizes)
    place = int(np.argmax(sizes * (len(ordered) - sizes) * (above - below) ** 2))
    return float(ordered[place] + ordered[place + 1]) / 2


def _auc_interval(auc: float, num_members: int, num_others: int) -> Estimate:
    z = 1.959963984540054
    mean_size = (num_members + num_others) / 2

    def is_far(other: float) -> bool:
        spread = 1 + (mean_size - 1) * ((1 - other) / (2 - other) + other / (1 + other))
        return abs(auc - other) > z * math.sqrt(other * (1 - other) * spread / (num_members * num_others))

    low = bisect(is_far, 0.0, auc) if auc > 0 else 0.0
    high = 1 - bisect(lambda distance: is_far(1 - distance), 0.0, 1 - auc) if auc < 1 else 1.0
    return Estimate(auc, low, high)
