"""An audit's figures: beyond.md's vectors digit for digit, and others against independent computations."""

import math

import numpy as np
import pytest
from scipy.stats import beta, binom

from fedcli.privacy.audit_statistics import (
    binomial_tail,
    epsilon_at_least,
    exposure,
    group_guarantee,
    min_k,
    min_k_plus,
    one_run_bound,
    rank_among,
    separate,
    share,
)

LOG_PROBS = (-0.1, -2, -0.5, -6, -0.2, -3, -1, -0.3, -4, -0.4)


def test_exposure_is_the_papers() -> None:
    assert round(exposure(2, 9), 4) == 2.1699
    assert exposure(1, 256) == 8
    assert rank_among(-3.0, [-1.0, -3.0, -5.0]) == 3, "an equal filling stands before the canary"


def test_min_k_takes_the_lowest_tokens() -> None:
    assert min_k(LOG_PROBS) == -5.0
    assert min_k((-7.0, -1.0)) == -7.0, "one token at least"


def test_min_k_plus_standardises_each_token() -> None:
    means, deviations = [-1.0] * 10, [2.0] * 10
    assert min_k_plus(LOG_PROBS, means, deviations) == (-5.0 + 1) / 2
    assert min_k_plus((-1.0,), (-1.0,), (0.0,)) == 0.0


@pytest.mark.parametrize(
    ("right", "guesses", "epsilon"), [(50, 50, 2.785), (90, 100, 1.631), (60, 100, 0.052), (55, 100, 0.0)]
)
def test_the_one_run_bound_is_the_papers(right: int, guesses: int, epsilon: float) -> None:
    assert round(epsilon_at_least(right, guesses), 3) == epsilon


def test_the_bound_is_where_the_binomials_tail_crosses_the_error() -> None:
    for right, guesses, delta in ((40, 50, 0.0), (31, 40, 1e-4), (20, 21, 1e-5)):
        epsilon = epsilon_at_least(right, guesses, delta=delta, num_canaries=64)
        tail = binom.sf(right - 1, guesses, 1 / (1 + math.exp(-epsilon))) + 64 * delta
        assert tail == pytest.approx(0.05, rel=1e-9)
    assert epsilon_at_least(50, 50, delta=0.001) == 0.0, "50 canaries, each wrong by 0.001, are the whole error"
    assert binomial_tail(3, 7, 0.3) == pytest.approx(binom.sf(2, 7, 0.3), rel=1e-12)


def test_delta_costs_the_least_that_randomised_response_with_a_leak_needs() -> None:
    """Of (epsilon, delta): with delta tell the bit, else answer by chance e^epsilon : 1; it must not be refuted."""
    epsilon, delta, canaries = 1.0, 1e-3, 40
    right = delta + (1 - delta) / (1 + math.exp(-epsilon))
    likely = [binom.pmf(k, canaries, right) for k in range(canaries + 1)]
    refuted = [epsilon_at_least(k, canaries, delta=delta) > epsilon for k in range(canaries + 1)]
    assert math.fsum(p for p, is_wrong in zip(likely, refuted, strict=True) if is_wrong) <= 0.05


def test_guesses_abstain_about_the_least_sure() -> None:
    clear = [(np.r_[np.full(20, 5.0), np.full(12, -5.0)], [True] * 20 + [False] * 12)]
    bound = one_run_bound(clear)
    assert (bound.num_right, bound.num_guesses) == (32, 32), "the cut lies between them, however many were in"
    assert bound.epsilon == pytest.approx(epsilon_at_least(32, 32, error=0.05 / 3))
    generator = np.random.default_rng(0)
    middle = generator.normal(size=80)
    mixed = [
        (
            np.r_[middle, np.full(20, 9.0), np.full(20, -9.0)],
            [*(generator.random(80) < 0.5), *[True] * 20, *[False] * 20],
        )
    ]
    sure = one_run_bound(mixed)
    assert sure.num_guesses == 30
    assert sure.num_right == 30, "the highest and the lowest of 120, an eighth each"


def test_of_a_mechanism_that_hides_enough_one_audit_in_twenty_at_most_says_otherwise() -> None:
    generator, wrong = np.random.default_rng(1), 0
    for _ in range(400):
        included = generator.random(60) < 0.5
        told = np.where(generator.random(60) < 1 / (1 + math.exp(-0.5)), included, ~included)
        wrong += one_run_bound([(told + generator.random(60) / 10, included)]).epsilon > 0.5
    assert wrong <= 400 * 0.05 + 3 * math.sqrt(400 * 0.05)


def test_separation_counts_pairs_and_members_above_the_highest_others() -> None:
    members, others = [3.0, 2.0, 1.0, 4.0], [0.0, 1.0, 2.5]
    found = separate(members, others)
    assert found is not None
    pairs = [(m > o) + (m == o) / 2 for m in members for o in others]
    assert found.auc.value == pytest.approx(sum(pairs) / 12)
    assert found.auc.low < found.auc.value < found.auc.high
    assert (found.true_positives.value, found.threshold_rate) == (0.5, 0.0)
    assert separate(members, []) is None


def test_at_a_rate_of_one_percent_one_other_in_a_hundred_is_taken_for_a_member() -> None:
    found = separate([99.5, 98.5, 50.0], [float(n) for n in range(200)][:100] + [0.0] * 100)
    assert found is not None
    assert found.true_positives.value == pytest.approx(2 / 3)
    assert found.threshold_rate <= 0.01


def test_a_perfect_separation_has_an_interval_that_narrows_with_their_number() -> None:
    few, many = separate([1.0] * 5, [0.0] * 5), separate([1.0] * 200, [0.0] * 200)
    assert few is not None
    assert many is not None
    assert few.auc.value == few.auc.high == 1.0
    assert few.auc.low < 0.7 < 0.97 < many.auc.low < 1.0


def test_shares_have_clopper_and_pearsons_interval() -> None:
    for found, total in ((3, 10), (0, 8), (8, 8)):
        got = share(found, total)
        assert got.low == pytest.approx(beta.ppf(0.025, found, total - found + 1) if found else 0.0, abs=1e-9)
        assert got.high == pytest.approx(beta.ppf(0.975, found + 1, total - found) if found < total else 1.0, abs=1e-9)


def test_a_group_of_rows_has_the_sum_of_their_epsilons() -> None:
    assert group_guarantee(1.0, 1e-5, 1) == (1.0, 1e-5)
    epsilon, delta = group_guarantee(0.5, 1e-6, 4)
    assert epsilon == 2.0
    assert delta == pytest.approx(1e-6 * sum(math.exp(0.5 * k) for k in range(4)))
    assert group_guarantee(64.0, 1e-5, 16) == (1024.0, 1.0)
    assert group_guarantee(0.0, 1e-5, 4) == (0.0, 4e-5)
