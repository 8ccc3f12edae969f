"""Robust rules on seven rows of two numbers, the last one hostile, digit for digit; and what tells an unusual update.

The expected digits were computed apart from fedcli, in the direct form; here everything goes through the Gram matrix.
"""

import numpy as np
import pytest

from fedcli.algos import rules
from fedcli.algos.diagnostics import diagnose, outliers
from fedcli.algos.robust import Rule

ROWS = np.array([(1, 0), (1.2, 0.1), (0.9, -0.1), (1.1, 0.2), (1.03, 0.1), (0.8, 0), (50, -40)], float)
PRODUCTS = ROWS @ ROWS.T
EQUAL = np.full(7, 1 / 7)


def merged(rule: Rule, rows: np.ndarray = ROWS) -> np.ndarray:
    """Return what a rule makes of rows, as a merge does it."""
    products, shares = rows @ rows.T, np.full(len(rows), 1 / len(rows))
    return rule.combine(rows, rule.mixing(products)) if rule.is_blockwise else rule.weights(products, shares) @ rows


def test_krum_sums_the_n_f_2_smallest_squared_distances_to_others():
    scores = [0.1209, 0.2289, 0.2269, 0.2149, 0.1116, 0.2529, 15999.3409]
    assert rules.krum_scores(PRODUCTS, 1) == pytest.approx(scores, abs=1e-9)
    # ByzFL sums n - f - 1 of them, and would choose the first row.
    others = np.sort(rules.squared_distances(PRODUCTS) + np.diag(np.full(7, np.inf)), axis=1)
    assert np.argmin(others[:, :5].sum(axis=1)) == 0


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule(), (8.004286, -5.671429)),
        (Rule(rule="median"), (1.03, 0.0)),
        (Rule(rule="trimmed_mean"), (1.046, 0.02)),
        (Rule(rule="krum"), (1.03, 0.1)),
        (Rule(rule="multi_krum"), (1.005, 0.05)),
        (Rule(rule="geometric_median"), (1.018312, 0.024845)),
        (Rule(rule="norm_clip"), (0.941071, -0.053629)),
        (Rule(rule="trimmed_mean", nearest_mixing=True), (1.005, 0.05)),
    ],
)
def test_a_rule_gives_these_digits(rule, expected):
    assert merged(rule).round(6).tolist() == pytest.approx(expected, abs=1e-9)


def test_multi_krum_keeps_m_updates():
    assert (rules.multi_krum(PRODUCTS, 1, keep=3) @ ROWS).round(6).tolist() == [1.043333, 0.1]


@pytest.mark.parametrize(("iterations", "expected"), [(3, (1.066106, 0.019160)), (4, (1.036654, 0.037443))])
def test_the_geometric_median_after_some_steps_from_the_mean(iterations, expected):
    found = rules.geometric_median(PRODUCTS, iterations=iterations) @ ROWS
    assert found.round(6).tolist() == pytest.approx(expected, abs=1e-9)


def test_the_geometric_median_after_three_steps_from_the_median():
    rows = np.vstack([ROWS, np.median(ROWS, axis=0)])  # a start that is no sum of the rows is one more, of weight zero
    alphas, start = np.array([1.0] * 7 + [0.0]), np.eye(8)[7]
    found = rules.geometric_median(rows @ rows.T, alphas=alphas, start=start, iterations=3) @ rows
    assert found.round(6).tolist() == pytest.approx((1.015734, 0.021201), abs=1e-9)


@pytest.mark.parametrize(("iterations", "expected"), [(1, (0.922372, -0.052304)), (3, (1.129774, -0.055351))])
def test_centred_clipping_from_zero_within_a_radius_of_1(iterations, expected):
    found = rules.centred_clip(PRODUCTS, radius=1.0, iterations=iterations) @ ROWS
    assert found.round(6).tolist() == pytest.approx(expected, abs=1e-9)


def test_norms_are_clipped_to_their_median():
    assert np.median(np.sqrt(PRODUCTS.diagonal())).round(6) == 1.034843
    assert rules.norm_clip(PRODUCTS).tolist() == pytest.approx(
        [min(1.0, 1.0348429832588129 / np.hypot(*row)) / 7 for row in ROWS], abs=1e-15
    )


@pytest.mark.parametrize("name", ["geometric_median", "centred_clip"])
def test_the_gram_form_gives_what_the_direct_form_gives(name):
    rows = np.random.default_rng(0).normal(size=(9, 40)) * np.linspace(0.1, 3, 9)[:, None]
    z = rows.mean(axis=0) if name == "geometric_median" else np.zeros(40)
    tau = np.median(np.linalg.norm(rows, axis=1))
    for _ in range(1000 if name == "geometric_median" else 3):
        distances = np.linalg.norm(rows - z, axis=1)
        if name == "geometric_median":
            z = (rows / distances[:, None]).sum(axis=0) / (1 / distances).sum()
        else:
            z = z + ((rows - z) * np.minimum(1, tau / distances)[:, None]).mean(axis=0)
    assert merged(Rule(rule=name), rows) == pytest.approx(z, abs=1e-9)


@pytest.mark.parametrize("name", ["norm_clip", "krum", "multi_krum", "geometric_median", "centred_clip"])
@pytest.mark.parametrize("nearest_mixing", [False, True])
def test_updates_that_change_nothing_are_merged_to_nothing(name, nearest_mixing):
    weights = Rule(rule=name, nearest_mixing=nearest_mixing).weights(np.zeros((5, 5)), np.full(5, 0.2))
    assert np.isfinite(weights).all()
    assert weights.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("settings", "fewest"),
    [
        ({}, 1),
        ({"rule": "norm_clip"}, 1),
        ({"rule": "mean", "nearest_mixing": True}, 3),
        ({"rule": "median", "tolerate": 2}, 5),
        ({"rule": "trimmed_mean"}, 3),
        ({"rule": "krum"}, 5),
        ({"rule": "multi_krum", "tolerate": 3}, 9),
        ({"rule": "geometric_median"}, 3),
    ],
)
def test_a_rule_says_how_many_updates_it_needs(settings, fewest):
    assert Rule(**settings).fewest == fewest


def test_no_weight_is_more_than_the_cap_times_the_median():
    assert Rule(weight_cap=2).shares(np.array([10.0, 20.0, 30.0, 2.0**53])) == pytest.approx(
        [10 / 110, 20 / 110, 30 / 110, 50 / 110]
    )
    assert Rule().shares(np.array([1000.0, 2.0**53]))[1] == pytest.approx(1)  # without one, one client owns the mean


def test_norm_cosine_and_leave_one_out_change_are_those_of_the_direct_form():
    rows = np.random.default_rng(1).normal(size=(6, 30))
    shares = np.arange(1.0, 7) / 21
    mean = shares @ rows
    for row, share, found in zip(rows, shares, diagnose(rows @ rows.T, shares), strict=True):
        without = (mean - share * row) / (1 - share)
        assert found.norm == pytest.approx(np.linalg.norm(row))
        assert found.cosine == pytest.approx(row @ mean / np.linalg.norm(row) / np.linalg.norm(mean))
        assert found.change == pytest.approx(np.linalg.norm(without - mean) / np.linalg.norm(mean))


def test_what_lies_over_five_deviations_from_the_median_is_marked():
    norms = [1.0, 1.1, 0.9, 1.2, 1.61]  # the median is 1.1, the median deviation 0.1
    assert outliers({"norm": norms}) == [[], [], [], [], ["norm"]]
    assert outliers({"norm": [*norms[:4], 1.59]}) == [[]] * 5
    assert outliers({"norm": [1.0, 1.0, 1.0, 1.0 + 1e-12, 900.0], "cosine": [None] * 5})[4] == ["norm"]
    assert outliers({"norm": [1.0, 1.0, 900.0]}) == [[]] * 3  # of three a median says nothing


@pytest.mark.parametrize("count", [2, 5, 40])
def test_no_rule_but_the_mean_and_norm_clip_moves_far_with_one_hostile_update_of_any_size(count):
    rows = np.random.default_rng(count).normal(size=(2 * count + 1, 12)) + 3
    spread = np.linalg.norm(rows - rows.mean(axis=0), axis=1).max()
    for size in (1e3, 1e6, 4e9):
        attacked = np.vstack([rows, np.full((1, 12), -size)])
        for name in ("median", "trimmed_mean", "krum", "multi_krum", "geometric_median", "centred_clip"):
            if len(attacked) >= Rule(rule=name).fewest:
                moved = merged(Rule(rule=name), attacked) - rows.mean(axis=0)
                assert np.linalg.norm(moved) < 2 * spread + 6, (name, size)
