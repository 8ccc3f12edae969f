"""Robust rules: what takes the place of the mean of the updates' differences where some of them may be hostile.

n updates x_i, of which f may be hostile. All rules but the mean are unweighted: a hostile client may claim any number
of rows. Most need nothing of the updates but their Gram matrix G, G_ij = <x_i, x_j>: whatever they compute is a sum
z = sum w_i x_i, and ||x_j - z||^2 = G_jj - 2 (G w)_j + w^T G w. These return w. Median and trimmed mean look at each
number of all updates by itself. Where clients hold rows of unlike kinds, the rules take a minority for an attack.

Definitions differ between libraries. Krum's score here, as in the paper and in Flower, sums the n - f - 2 smallest
squared distances to other updates; ByzFL's sums n - f - 1, and so may choose another. Multi-Krum is the mean of the
m = n - f updates of the lowest scores, as in ByzFL; Flower's default keeps one. The trimmed mean drops f numbers at
each end; Flower drops floor(beta n), with beta 0.2. The geometric median here is Weiszfeld's iteration until it stands
still; ByzFL makes 3 iterations from zero with nu 0.1, and RFA's authors 3 to 4 from the mean, which a far outlier
still pulls. ByzFL clips around zero with a radius of 100; here the radius is the median of the norms.
"""

import math
from collections.abc import Callable

import numpy as np

from fedcli.algos.arrays import Array


def capped(weights: Array, cap: float | None) -> Array:
    """Return weights none of which is larger than `cap` times their median."""
    return weights if cap is None else np.minimum(weights, cap * np.median(weights))


def squared_distances(products: Array) -> Array:
    """Return ||x_i - x_j||^2 of a Gram matrix, clamped at zero."""
    squares = products.diagonal()
    found: Array = np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0.0)
    np.fill_diagonal(found, 0.0)
    return found


def distances_to(products: Array, weights: Array) -> Array:
    """Return ||x_j - z|| for each update and z = sum w_i x_i."""
    towards = products @ weights
    found: Array = np.sqrt(np.maximum(products.diagonal() - 2 * towards + weights @ towards, 0.0))
    return found


def krum_scores(products: Array, tolerate: int) -> Array:
    """Return for each update the sum of its n - f - 2 (at least one) smallest squared distances to others.

    Blanchard et al. 2017 (1703.02757).
    """
    distances = squared_distances(products)
    np.fill_diagonal(distances, np.inf)  # an update is no neighbour of its own
    neighbours = max(1, len(products) - tolerate - 2)
    found: Array = np.sort(distances, axis=1)[:, :neighbours].sum(axis=1)
    return found


def multi_krum(products: Array, tolerate: int, *, keep: int | None = None) -> Array:
    """Return equal weights for the `keep` (default: n - f) updates of the lowest Krum scores; ties go to the first."""
    count = len(products)
    keep = max(1, count - tolerate) if keep is None else keep
    weights = np.zeros(count)
    weights[np.argsort(krum_scores(products, tolerate), kind="stable")[:keep]] = 1 / keep
    return weights


def krum(products: Array, tolerate: int) -> Array:
    """Return all weight for the update of the lowest Krum score."""
    return multi_krum(products, tolerate, keep=1)


def nearest_mixing(products: Array, tolerate: int) -> Array:
    """Return the matrix that makes of each update the mean of the n - f nearest, itself among them.

    Nearest-neighbour mixing, Allouah et al. 2023 (2302.01772).
    """
    distances = squared_distances(products)
    np.fill_diagonal(distances, -1.0)
    keep = max(1, len(products) - tolerate)
    mixing = np.zeros_like(distances)
    np.put_along_axis(mixing, np.argsort(distances, axis=1, kind="stable")[:, :keep], 1 / keep, axis=1)
    return mixing


def norm_clip(products: Array, tolerate: int = 0, *, radius: float | None = None) -> Array:
    """Return the mean's weights times min(1, C / ||x_i||), where C is the median of the norms by default.

    Sun et al. 2019 (1911.07963). It bounds what an update does, and removes none.
    """
    norms = np.sqrt(np.maximum(products.diagonal(), 0.0))
    return _shrunk(norms, float(np.median(norms)) if radius is None else radius) / len(products)


def centred_clip(products: Array, tolerate: int = 0, *, radius: float | None = None, iterations: int = 3) -> Array:
    """Return w after v <- v + mean_i (x_i - v) min(1, tau / ||x_i - v||) from v = 0; tau: the norms' median by default.

    Karimireddy et al. 2021 (2012.10333), where v starts at the last round's result.
    """
    count = len(products)
    tau = float(np.median(np.sqrt(np.maximum(products.diagonal(), 0.0)))) if radius is None else radius
    weights = np.zeros(count)
    for _ in range(iterations):
        factors = _shrunk(distances_to(products, weights), tau) / count
        weights = weights * (1 - factors.sum()) + factors
    return weights


def geometric_median(
    products: Array,
    tolerate: int = 0,
    *,
    alphas: "Array | None" = None,
    start: "Array | None" = None,
    nu: float = 1e-5,
    iterations: int = 1000,
) -> Array:
    """Return w of the point with the least sum of distances, by z <- sum b_i x_i / sum b_i.

    b_i = a_i / max(nu, ||x_i - z||): RFA, Pillutla et al. 2019 (1912.13445); `nu` is in units of the median of the
    norms. From `start`, by default the mean, until w stands still or for so many iterations. a_i are equal by default.
    """
    count = len(products)
    alphas = np.full(count, 1 / count) if alphas is None else alphas
    weights = alphas / alphas.sum() if start is None else start
    least = nu * math.sqrt(max(float(np.median(products.diagonal())), 0.0)) or nu
    for _ in range(iterations):
        before, shares = weights, alphas / np.maximum(distances_to(products, weights), least)
        weights = shares / shares.sum()
        if np.abs(weights - before).max() < 1e-14:
            break
    return weights


def median(rows: Array, tolerate: int = 0) -> Array:
    """Return the median of each column: Yin et al. 2018 (1803.01498)."""
    found: Array = np.median(rows, axis=0)
    return found


def trimmed_mean(rows: Array, tolerate: int) -> Array:
    """Return the mean of each column without its f lowest and f highest numbers: Yin et al. 2018."""
    found: Array = np.sort(rows, axis=0)[tolerate : len(rows) - tolerate].mean(axis=0)
    return found


def _shrunk(norms: Array, radius: float) -> Array:
    """Return min(1, radius / norm), 1 for a norm of zero."""
    found: Array = radius / np.maximum(norms, radius) if radius > 0 else (norms == 0).astype(float)
    return found


BY_PRODUCTS: dict[str, Callable[[Array, int], Array]] = {
    "norm_clip": norm_clip,
    "krum": krum,
    "multi_krum": multi_krum,
    "geometric_median": geometric_median,
    "centred_clip": centred_clip,
}
"""Weights by a Gram matrix and f."""
BLOCKWISE: dict[str, Callable[[Array, int], Array]] = {"median": median, "trimmed_mean": trimmed_mean}
"""What stands for some numbers of all updates, a row for each, by these and f."""
