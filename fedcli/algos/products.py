"""Products B A of LoRA's factors, without ever forming one: means, best approximations, residuals, norms, distances.

B is d_out x r, A is r x d_in; the scale s = alpha / r is common to all and left out. All is float64. A mean product
P = sum p_k B_k A_k is kept as two stacks: L = [p_1 B_1 | ... | p_K B_K] and M = [A_1; ...; A_K], P = L M.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from fedcli.algos.arrays import Array
from fedcli.randomness import stream

MOST_EXACT = 640
"""Columns of a stack that is factorised whole; of a wider one the leading subspace is iterated."""
_EXTRA = 16
"""Random directions beside the warm start of that iteration."""
_PASSES = 1
"""Of that iteration: with a warm start it is as good as the best wherever clients agree at all."""
_PROBES = 32
"""Random vectors by which norms of wide stacks are estimated: to about a tenth."""
_NOTHING = 1e-10
"""Of the largest singular value: what is below is rounding."""


class Factors(NamedTuple):
    """Factors of a product, and the share of its norm that they lack."""

    b: Array
    a: Array
    error: float


def stacked(
    bs: "Sequence[Array]", as_: "Sequence[Array]", shares: Array, out: "tuple[Array, Array] | None" = None
) -> "tuple[Array, Array]":
    """Return L and M of the mean product; ranks may differ. `out` is memory for L, and an M that is there already."""
    left = np.empty((bs[0].shape[0], sum(b.shape[1] for b in bs))) if out is None else out[0]
    begin = 0
    for share, b in zip(shares, bs, strict=True):
        np.multiply(b, share, out=left[:, begin : begin + b.shape[1]])
        begin += b.shape[1]
    return left, np.concatenate(as_, axis=0) if out is None else out[1]


def residual(bs: "Sequence[Array]", as_: "Sequence[Array]", shares: Array) -> "tuple[Array, Array]":
    """Return stacks of R = P - mean(B) mean(A) = sum p_k (B_k - mean B)(A_k - mean A), of rank (K - 1) r.

    That is FedEx-LoRA's residual. As the p_k (B_k - mean B) add up to zero, A_K may stand for the mean of A, and the
    last term falls away.
    """
    mean_b = sum(share * b for share, b in zip(shares, bs, strict=True))
    left = [share * (b - mean_b) for share, b in zip(shares, bs, strict=True)][:-1]
    right = [a - as_[-1] for a in as_[:-1]]
    if not left:
        return np.zeros((bs[0].shape[0], 0)), np.zeros((0, as_[0].shape[1]))
    return np.concatenate(left, axis=1), np.concatenate(right, axis=0)


def truncated(left: Array, right: Array, rank: int, warm: "Array | None" = None) -> Factors:
    """Return the best factors of this rank of a product of stacks: balanced, B = U sqrt(S), A = sqrt(S) V^T.

    Thin QR of both stacks, then an SVD of R1 R2^T (beyond.md 1.2; FlexLoRA does it on the dense product). Of stacks
    wider than MOST_EXACT the leading subspace is found by block iteration (Halko et al. 2011, 0909.4061), which starts
    from the rows of `warm` and fixed random ones; then the error is an estimate. Signs are fixed: the first of the
    largest entries of each left vector is positive. Where S is zero, B and A are.
    """
    width = left.shape[1]
    if width == 0:
        return Factors(np.zeros((left.shape[0], rank)), np.zeros((rank, right.shape[1])), 0.0)
    if width <= MOST_EXACT:
        q1, r1 = np.linalg.qr(left)
        q2, r2 = np.linalg.qr(right.T)
        u, s, vt = np.linalg.svd(r1 @ r2.T)
        u, vt, beyond = q1 @ u[:, : len(s)], vt[: len(s)] @ q2.T, 0.0
    else:
        u, s, vt, beyond = _leading(left, right, rank, warm)
    kept = min(rank, len(s))
    lost = float((s[kept:] ** 2).sum()) + beyond
    total = float((s**2).sum()) + beyond
    signs = np.sign(u[np.abs(u).argmax(axis=0), np.arange(u.shape[1])])[:kept]
    root = np.sqrt(np.where(s[:kept] > _NOTHING * s[0], s[:kept], 0.0))
    b, a = np.zeros((left.shape[0], rank)), np.zeros((rank, right.shape[1]))
    b[:, :kept] = u[:, :kept] * (signs * root)
    a[:kept] = (signs * root)[:, None] * vt[:kept]
    return Factors(b, a, math.sqrt(lost / total) if total > 0 else 0.0)


def with_old_rows(factors: Factors, old: Array) -> Factors:
    """Return factors with the old A's rows where S is zero: an A and a B that are both zero have no gradient."""
    a = factors.a.copy()
    unused = np.flatnonzero(~factors.b.any(axis=0))
    a[unused] = old[unused]
    return factors._replace(a=a)


def corrected(bs: "Sequence[Array]", as_: "Sequence[Array]", shares: Array, penalty: float) -> Array:
    """Return what LoRA-FAIR adds to the mean of B: R A^T (A A^T + lambda I)^-1, with A the mean.

    The paper (2411.14961) makes gradient steps on a similarity; this minimises ||R - dB A||^2 + lambda ||dB||^2.
    """
    mean_a = sum(share * a for share, a in zip(shares, as_, strict=True))
    left, right = residual(bs, as_, shares)
    found: Array = np.linalg.lstsq(
        mean_a @ mean_a.T + penalty * np.eye(len(mean_a)), (left @ (right @ mean_a.T)).T, rcond=None
    )[0].T
    return found


def norm(b: Array, a: Array) -> float:
    """Return ||B A||_F by r x r products: its square is tr((B^T B)(A A^T))."""
    return math.sqrt(max(0.0, inner(b, a, b, a)))


def inner(b1: Array, a1: Array, b2: Array, a2: Array) -> float:
    """Return the inner product of B1 A1 and B2 A2: tr((B2^T B1)(A1 A2^T))."""
    return float(((b1.T @ b2) * (a1 @ a2.T)).sum())


def distance(b1: Array, a1: Array, b2: Array, a2: Array) -> float:
    """Return ||B1 A1 - B2 A2||_F, of the factors' differences: nothing cancels where they are close."""
    return norm(np.concatenate([b1 - b2, b2], axis=1), np.concatenate([a1, a1 - a2], axis=0))


def shortfall(left: Array, right: Array, b: Array, a: Array) -> float:
    """Return ||L M - B A|| / ||L M||; of stacks wider than MOST_EXACT an estimate, by random vectors."""
    if left.shape[1] <= MOST_EXACT:
        lost = norm(np.concatenate([left, -b], axis=1), np.concatenate([right, a], axis=0))
        whole = norm(left, right)
    else:
        probes = _noise(right.shape[1], _PROBES)
        image = left @ (right @ probes)
        lost, whole = float(np.linalg.norm(image - b @ (a @ probes))), float(np.linalg.norm(image))
    return lost / whole if whole > 0 else 0.0


def _leading(left: Array, right: Array, rank: int, warm: "Array | None") -> "tuple[Array, Array, Array, float]":
    """Return leading singular vectors and values, and what the square of the norm has beyond them."""
    fewest = min(left.shape[0], right.shape[1])
    start = [] if warm is None else [warm.T]
    block = np.concatenate([*start, _noise(right.shape[1], _EXTRA if start else rank + _EXTRA)], axis=1)[:, :fewest]
    basis = np.linalg.qr(left @ (right @ block))[0]
    for _ in range(_PASSES):
        back = np.linalg.qr(right.T @ (left.T @ basis))[0]
        basis = np.linalg.qr(left @ (right @ back))[0]
    rows = (basis.T @ left) @ right
    q, r = np.linalg.qr(rows.T)
    u, s, vt = np.linalg.svd(r.T)
    probes = _noise(right.shape[1], _PROBES)
    image = left @ (right @ probes)
    beyond = float(((image - basis @ (rows @ probes)) ** 2).sum()) / _PROBES
    return basis @ u, s, vt @ q.T, beyond


@cache
def _noise(length: int, count: int) -> Array:
    """Return the same random vectors in every process, as columns."""
    return stream(0, "products", part=f"{length}x{count}").standard_normal((length, count))
