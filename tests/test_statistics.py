"""Scores of items: values by hand, and errors, intervals and ranks against closed formulas and scipy."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from fedcli.eval.benchmark import Metric
from fedcli.eval.statistics import NUM_RESAMPLES, average_ranks, difference, score
from fedcli.randomness import stream

MEAN = Metric("accuracy")
RATIO = Metric("ratio", of_sum=lambda sums: sums[0] / sums[1])
"""Such as F1 and BLEU: a function of sums, which is no mean over items."""


def marks(values: Sequence[float]) -> dict[str, float]:
    return {str(number): float(value) for number, value in enumerate(values)}


def draws(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_mean_and_a_function_of_sums_have_their_values() -> None:
    assert score(MEAN, [{"a": 1.0, "b": 0.0, "c": 0.5}]).value == 0.5
    assert score(MEAN, [{"a": 1.0, "b": 0.0, "c": 0.5}]).num_items == 3
    assert score(RATIO, [{"a": [1.0, 4.0], "b": [2.0, 2.0]}]).value == 3 / 6


def test_the_mean_over_parts_weighs_them_alike_whatever_their_sizes() -> None:
    found = score(MEAN, [marks([1, 1, 1, 0]), marks([0, 1]), marks([0])])
    assert found.value == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    assert found.num_items == 7
    assert score(RATIO, [{"a": [1, 4]}, {"a": [1, 2], "b": [2, 2]}]).value == pytest.approx((1 / 4 + 3 / 4) / 2)


@pytest.mark.parametrize("size", [10, 100, 1500])
@pytest.mark.parametrize("is_binary", [True, False])
def test_the_standard_error_of_a_mean_is_that_of_the_closed_formula(size: int, is_binary: bool) -> None:
    values = draws(size).binomial(1, 0.3, size) if is_binary else draws(size).normal(5, 2, size)
    assert score(MEAN, [marks(values)]).standard_error == pytest.approx(values.std() / math.sqrt(size), rel=0.08)


def test_error_and_interval_of_a_function_of_sums_are_scipys() -> None:
    pairs = np.stack([draws(1).integers(0, 5, 80), draws(2).integers(1, 9, 80)], axis=1)
    found = score(RATIO, [{str(number): pair.tolist() for number, pair in enumerate(pairs)}])

    def ratio(tops: np.ndarray, bottoms: np.ndarray, axis: int) -> np.ndarray:
        return tops.sum(axis) / bottoms.sum(axis)

    expected = stats.bootstrap(
        (pairs[:, 0], pairs[:, 1]), ratio, paired=True, method="percentile", rng=draws(3), n_resamples=9999
    )
    error = expected.standard_error
    assert found.standard_error == pytest.approx(error, rel=0.08)
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=0.2 * error)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=0.2 * error)


@pytest.mark.slow
def test_nineteen_of_twenty_intervals_cover_the_truth() -> None:
    found = [score(MEAN, [marks(draws(seed).binomial(1, 0.4, 60))]) for seed in range(200)]
    covered = sum(entry.low <= 0.4 <= entry.high for entry in found)
    assert 180 <= covered <= 199  # the percentile interval of 60 items covers a little less than 95 %
    assert all(0 <= entry.low <= entry.value <= entry.high <= 1 for entry in found)


def test_one_item_and_equal_items_have_no_spread() -> None:
    for values in ([1], [0.25] * 9):
        found = score(MEAN, [marks(values)])
        assert (found.standard_error, found.low, found.high) == (0, values[0], values[0])


def test_parts_of_one_size_are_resampled_apart() -> None:
    values = marks(draws(0).normal(0, 1, 200))
    one, two = score(MEAN, [values]), score(MEAN, [values, values])
    assert two.value == pytest.approx(one.value)
    assert two.standard_error == pytest.approx(one.standard_error / math.sqrt(2), rel=0.1)


def test_scores_are_the_same_each_time_and_in_any_order_of_the_items() -> None:
    values = marks(draws(0).normal(0, 1, 50))
    backwards = dict(reversed(values.items()))
    assert score(MEAN, [values]) == score(MEAN, [values]) == score(MEAN, [backwards])
    other = marks(draws(1).normal(0, 1, 50))
    assert difference(MEAN, [values], [other]) == difference(MEAN, [backwards], [other])


def test_equal_answers_differ_by_exactly_nothing() -> None:
    values = marks(draws(0).normal(0, 1, 50))
    found = difference(MEAN, [values], [dict(reversed(values.items()))])
    assert found is not None
    assert (found.value, found.standard_error, found.low, found.high, found.num_items) == (0, 0, 0, 0, 50)


def test_a_difference_is_paired_by_item() -> None:
    """Two models that find the same items hard differ far more surely than their own errors let expect."""
    hardness = draws(0).normal(0, 3, 300)
    gains = draws(1).normal(0.5, 0.2, 300)
    mine, theirs = marks(hardness + gains), marks(hardness)
    found = difference(MEAN, [mine], [theirs])
    assert found is not None
    assert found.value == pytest.approx(gains.mean())
    assert found.standard_error == pytest.approx(gains.std() / math.sqrt(300), rel=0.08)
    assert found.standard_error < score(MEAN, [mine]).standard_error / 10
    assert found.low < gains.mean() < found.high
    back = difference(MEAN, [theirs], [mine])
    assert back is not None
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low))


def test_only_items_that_both_have_count() -> None:
    found = difference(MEAN, [{"a": 1.0, "b": 0.0, "c": 1.0}], [{"b": 1.0, "c": 1.0, "d": 0.0}])
    assert found is not None
    assert (found.value, found.num_items) == (0.5 - 1, 2)
    assert difference(MEAN, [{"a": 1.0}], [{"b": 1.0}]) is None
    assert difference(MEAN, [{}], [{"b": 1.0}]) is None


def test_a_difference_of_means_over_parts_needs_items_in_each() -> None:
    found = difference(MEAN, [{"a": 1.0}, {"a": 1.0, "b": 1.0}], [{"a": 0.0}, {"a": 0.0, "b": 1.0}])
    assert found is not None
    assert found.value == pytest.approx((1 + 0.5) / 2)
    assert difference(MEAN, [{"a": 1.0}, {"a": 1.0}], [{"a": 0.0}, {"b": 0.0}]) is None


@pytest.mark.parametrize("seed", range(20))
def test_average_ranks_are_scipys_with_ties(seed: int) -> None:
    table = draws(seed).integers(0, 4, (6, 5)) / 4  # targets x metrics, of few values: many are equal
    higher = [bool(value) for value in draws(seed + 100).integers(0, 2, 5)]
    names = [f"round-{number}" for number in range(6)]
    found = average_ranks({name: row.tolist() for name, row in zip(names, table, strict=True)}, higher)
    expected = stats.rankdata(np.where(higher, -table, table), axis=0, method="average").mean(axis=1)
    assert [found[name] for name in names] == pytest.approx(expected.tolist())


def test_without_metrics_there_are_no_ranks() -> None:
    assert average_ranks({"base": [], "round-1": []}, []) == {}


def clustered(seed: int, sizes: Sequence[int], within: float) -> tuple[np.ndarray, list[int]]:
    """Return values with a share that the items of a cluster have in common, and each item's cluster."""
    cluster_of = [cluster for cluster, size in enumerate(sizes) for _ in range(size)]
    common = draws(seed).normal(0, 1, len(sizes))
    return 5 + common[cluster_of] + draws(seed + 1).normal(0, within, len(cluster_of)), cluster_of


def cluster_robust_error(values: np.ndarray, cluster_of: Sequence[int]) -> float:
    """Return the standard error of a mean that lets a cluster's items depend on each other (Liang and Zeger 1986)."""
    residuals = np.bincount(cluster_of, values - values.mean())
    return math.sqrt(float((residuals**2).sum())) / len(values)


def names(cluster_of: Sequence[int]) -> dict[str, str]:
    return {str(number): f"passage {cluster}" for number, cluster in enumerate(cluster_of)}


SIZES = {"pairs": [2] * 80, "fives": [5] * 60, "of all sizes": [1 + number % 9 for number in range(120)]}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_error_of_clustered_items_is_the_cluster_robust_one(sizes: Sequence[int]) -> None:
    values, cluster_of = clustered(len(sizes), sizes, 0.5)
    expected = cluster_robust_error(values, cluster_of)
    found = score(MEAN, [marks(values)], [names(cluster_of)])
    assert found.standard_error == pytest.approx(expected, rel=0.1)
    alone = score(MEAN, [marks(values)])
    assert alone.standard_error < 0.8 * expected  # what it would be if they were independent
    assert (found.value, found.num_items) == (alone.value, alone.num_items)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_error_of_a_paired_difference_of_clustered_items_is_the_cluster_robust_one(sizes: Sequence[int]) -> None:
    values, cluster_of = clustered(len(sizes), sizes, 0.5)
    gains, _ = clustered(len(sizes) + 100, sizes, 0.5)
    found = difference(MEAN, [marks(values + gains)], [marks(values)], [names(cluster_of)])
    assert found is not None
    assert found.value == pytest.approx(gains.mean())
    assert found.standard_error == pytest.approx(cluster_robust_error(gains, cluster_of), rel=0.1)


def test_the_error_of_a_ratio_of_clustered_sums_is_that_of_its_linearisation() -> None:
    values, cluster_of = clustered(3, [3] * 100, 0.5)
    weights = draws(4).integers(1, 9, len(values))
    pairs = {str(n): [float(v * w), float(w)] for n, (v, w) in enumerate(zip(values, weights, strict=True))}
    found = score(RATIO, [pairs], [names(cluster_of)])
    residuals = np.bincount(cluster_of, weights * (values - found.value))
    assert found.standard_error == pytest.approx(math.sqrt(float((residuals**2).sum())) / weights.sum(), rel=0.1)


def test_items_without_clusters_and_clusters_of_one_item_have_the_numbers_of_the_plain_bootstrap() -> None:
    given = marks(draws(7).normal(0, 1, 37))
    rows = np.array([(given[item], 1.0) for item in sorted(given)])
    drawn = stream(0, "bootstrap", client=0, part="37")
    sums = [np.bincount(drawn.integers(37, size=37), minlength=37) @ rows for _ in range(NUM_RESAMPLES)]
    resampled = np.array([total / count for total, count in sums])
    plain = score(MEAN, [given])
    assert plain.standard_error == resampled.std(ddof=1)
    assert [plain.low, plain.high] == pytest.approx(np.quantile(resampled, [0.025, 0.975]), rel=1e-12)
    assert score(MEAN, [given], [{item: f"own {item}" for item in given}]) == plain
    assert score(MEAN, [given], [{}]) == plain


def test_a_cluster_named_as_an_item_is_not_that_item() -> None:
    given = {"a": 1.0, "b": 0.0, "c": 0.0}
    assert score(MEAN, [given], [{"a": "x", "b": "x"}]) == score(MEAN, [given], [{"a": "c", "b": "c"}])
