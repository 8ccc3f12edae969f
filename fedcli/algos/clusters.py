"""Clusters by the directions of updates: when one splits, and into which two.

Sattler, Mueller and Samek, "Clustered Federated Learning", 2021 (1910.01991): near a stationary point of the mean the
clients' own differences vanish only where they agree.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedcli.algos.arrays import Array


def cosines(products: "Array") -> "Array":
    """Return the cosines of all pairs by their Gram matrix (n, n); that of a zero is zero."""
    import numpy as np

    norms = np.sqrt(np.maximum(products.diagonal(), 0.0))
    scale = np.outer(norms, norms)
    found: Array = np.divide(products, scale, out=np.zeros_like(products, dtype=float), where=scale > 0)
    return found


def disagreement(products: "Array", shares: "Array") -> float:
    """Return the norm of the mean over the largest norm: 1 where all agree, 0 where they cancel; 1 without any."""
    import numpy as np

    mean, largest = float(shares @ products @ shares), float(products.diagonal().max(initial=0.0))
    return float(np.sqrt(max(mean, 0.0) / largest)) if largest > 0 else 1.0


def bipartition(products: "Array") -> list[list[int]]:
    """Return the two parts between which the largest cosine is least (1910.01991, algorithm 1), the first with 0.

    The most similar clients are joined until two parts are left, which gives that minimum exactly. Raises ValueError
    for fewer than two.
    """
    if len(products) < 2:
        raise ValueError("one update has no two parts")
    similar = cosines(products)
    parts = [[number] for number in range(len(products))]
    while len(parts) > 2:
        pairs = ((one, other) for other in range(len(parts)) for one in range(other))
        one, other = max(pairs, key=lambda pair: max(similar[i, j] for i in parts[pair[0]] for j in parts[pair[1]]))
        parts[one] = sorted(parts[one] + parts.pop(other))
    return sorted(parts)
