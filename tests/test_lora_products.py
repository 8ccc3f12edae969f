"""Means of LoRA's products against the digits of two clients by hand, and against dense arithmetic."""

import numpy as np
import pytest

from fedcli.algos import products
from fedcli.algos.lora import cut, joined, pairs

SHARES = np.array([0.25, 0.75])
AS = [np.array([[1.0, 2.0]]), np.array([[0.0, 1.0]])]
BS = [np.array([[1.0], [0.0], [2.0]]), np.array([[2.0], [1.0], [0.0]])]
MEAN_A, MEAN_B = np.array([[0.25, 1.25]]), np.array([[1.75], [0.75], [0.5]])
PRODUCT = np.array([[0.25, 2], [0, 0.75], [0.5, 1]])


def drawn(count: int, rank: int, d_out: int, d_in: int, spread: float = 1.0) -> tuple[list[np.ndarray], ...]:
    """Return factors of some clients, which drift from one start."""
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((d_out, rank)), rng.standard_normal((rank, d_in))
    bs = [b + spread * rng.standard_normal(b.shape) for _ in range(count)]
    return bs, [a + spread * rng.standard_normal(a.shape) for _ in range(count)]


def test_the_mean_product_and_what_the_means_of_the_factors_lack():
    left, right = products.stacked(BS, AS, SHARES)
    assert (left @ right == PRODUCT).all()
    assert (MEAN_B @ MEAN_A == [[0.4375, 2.1875], [0.1875, 0.9375], [0.125, 0.625]]).all()
    rest = np.matmul(*products.residual(BS, AS, SHARES))
    assert (rest == [[-0.1875, -0.1875], [-0.1875, -0.1875], [0.375, 0.375]]).all()
    assert (rest == 0.25 * 0.75 * (BS[0] - BS[1]) @ (AS[0] - AS[1])).all()  # of two clients
    assert products.shortfall(left, right, MEAN_B, MEAN_A) == pytest.approx(0.2679711, abs=5e-8)


def test_the_best_factors_of_rank_1_are_balanced_and_have_these_digits():
    left, right = products.stacked(BS, AS, SHARES)
    assert np.linalg.svd(left @ right)[1] == pytest.approx([2.397191, 0.358433], abs=5e-7)
    found = products.truncated(left, right, 1)
    assert found.b.ravel() == pytest.approx([1.299642, 0.476407, 0.693656], abs=5e-7)
    assert found.a.ravel() == pytest.approx([0.280219, 1.522717], abs=5e-7)
    assert found.error == pytest.approx(0.1478783, abs=5e-8)
    flipped = products.truncated(-left, -right, 1)
    assert flipped.b == pytest.approx(found.b)


@pytest.mark.parametrize(("penalty", "error"), [(0.01, 0.1486499), (0.0, 0.1486436)])
def test_lora_fairs_correction_in_closed_form_has_these_digits(penalty, error):
    change = products.corrected(BS, AS, SHARES, penalty)
    if penalty:
        assert change.ravel() == pytest.approx([-0.172018, -0.172018, 0.344037], abs=5e-7)
    left, right = products.stacked(BS, AS, SHARES)
    assert products.shortfall(left, right, MEAN_B + change, MEAN_A) == pytest.approx(error, abs=5e-8)


def test_with_one_common_a_the_mean_of_b_is_exact():
    left, right = products.stacked(BS, [AS[0], AS[0]], SHARES)
    assert (MEAN_B @ AS[0] == [[1.75, 3.5], [0.75, 1.5], [0.5, 1]]).all()
    assert (left @ right == MEAN_B @ AS[0]).all()


def test_norms_and_distances_of_products_that_are_never_formed():
    norms = np.array([products.norm(b, a) for b, a in zip(BS, AS, strict=True)])
    assert norms == pytest.approx([5, 2.236068], abs=5e-7)
    assert norms / norms.sum() == pytest.approx([0.690983, 0.309017], abs=5e-7)
    assert products.inner(BS[0], AS[0], BS[1], AS[1]) == 4
    assert products.distance(BS[0], AS[0], BS[1], AS[1]) ** 2 == pytest.approx(22)


@pytest.mark.parametrize("count", [2, 5])
def test_means_and_residual_give_the_mean_product_of_many(count):
    bs, as_ = drawn(count, 4, 24, 20)
    shares = np.full(count, 1 / count)
    left, right = products.residual(bs, as_, shares)
    dense = sum(b @ a for b, a in zip(bs, as_, strict=True)) / count
    assert left.shape[1] == (count - 1) * 4
    assert np.mean(bs, axis=0) @ np.mean(as_, axis=0) + left @ right == pytest.approx(dense)


def test_factors_of_mixed_ranks_give_the_best_approximation_that_a_dense_svd_gives():
    bs, as_ = drawn(3, 6, 24, 20)
    bs, as_ = (
        [b[:, :rank] for b, rank in zip(bs, (2, 4, 6), strict=True)],
        [a[:n] for a, n in zip(as_, (2, 4, 6), strict=True)],
    )
    left, right = products.stacked(bs, as_, np.array([0.5, 0.3, 0.2]))
    u, s, vt = np.linalg.svd(left @ right)
    found = products.truncated(left, right, 6)
    assert found.b @ found.a == pytest.approx((u[:, :6] * s[:6]) @ vt[:6])
    assert found.error == pytest.approx(np.linalg.norm(s[6:]) / np.linalg.norm(s))
    assert found.b.T @ found.b == pytest.approx(found.a @ found.a.T, abs=1e-9)


def test_where_the_product_is_zero_a_keeps_the_old_rows():
    a = np.arange(6.0).reshape(2, 3)
    found = products.with_old_rows(products.truncated(*products.stacked([np.zeros((4, 2))], [a], np.ones(1)), 2), a)
    assert (found.a == a).all()
    assert not found.b.any()
    assert found.error == 0
    one = products.truncated(np.ones((4, 1)), np.ones((1, 3)), 2)
    assert (products.with_old_rows(one, a).a[1] == a[1]).all()
    assert products.with_old_rows(one, a).a[0] == pytest.approx(one.a[0])


def test_a_stack_too_wide_to_be_factorised_whole_comes_within_a_percent_of_the_best(monkeypatch):
    rng = np.random.default_rng(0)
    left, right = (
        rng.standard_normal((300, 700)),
        rng.standard_normal((700, 280)) * np.exp(-np.arange(700) / 40)[:, None],
    )
    found = products.truncated(left, right, 16)
    lost = np.linalg.norm(left @ right - found.b @ found.a) / np.linalg.norm(left @ right)
    told = products.shortfall(left, right, found.b, found.a)
    monkeypatch.setattr(products, "MOST_EXACT", 1000)
    assert lost == pytest.approx(products.truncated(left, right, 16).error, rel=0.01)
    assert found.error == pytest.approx(lost, rel=0.1)
    assert told == pytest.approx(lost, rel=0.1)


def test_factors_are_told_apart_cut_and_joined_by_their_names():
    adapter = {"m.lora_A.weight": np.ones((4, 3)), "m.lora_B.weight": np.ones((2, 4)), "other": np.ones(2)}
    assert pairs(adapter) == {"m": ("m.lora_A.weight", "m.lora_B.weight")}
    factors = {name: array for name, array in adapter.items() if name != "other"}
    small = cut(factors, 1)
    assert [array.shape for array in small.values()] == [(1, 3), (2, 1)]
    assert [array.shape for array in joined(factors, small).values()] == [(5, 3), (2, 5)]
