"""The server's side: the sum of masked vectors, and what is left of the masks in it."""

from collections.abc import Mapping
from itertools import chain, combinations, islice

from fedcli.secure_aggregation.agreement import commitment
from fedcli.secure_aggregation.fixed_point import Ring
from fedcli.secure_aggregation.masks import add_masks
from fedcli.secure_aggregation.shamir import BadShares, join

_MOST_TRIES = 200
"""Of subsets of shares, where some are wrong."""


def unmask(total: Ring, seeds: Mapping[tuple[int, int], bytes], own: Mapping[int, bytes]) -> None:
    """Take what is left of masks out of the sum of counted clients, in place.

    `seeds` are by a counted client and a missing one, `own` by a counted one.
    """
    add_masks(
        total,
        [seed for (client, other), seed in seeds.items() if other < client],
        [seed for (client, other), seed in seeds.items() if other > client] + [*own.values()],
    )


def recover(shares: Mapping[int, bytes], threshold: int, committed: str) -> bytes | None:
    """Return the secret that a client committed itself to, of shares by holder; None where they do not give it.

    Where some are wrong, other subsets are tried.
    """
    holders = sorted(shares)
    if len(holders) < threshold:
        return None
    turned = (
        [*holders[start:], *holders[:start]][:threshold] for start in range(len(holders))
    )  # survive one wrong one
    for chosen in chain(turned, islice(combinations(holders, threshold), _MOST_TRIES)):
        try:
            secret = join({holder + 1: shares[holder] for holder in chosen})
        except BadShares:
            continue
        if commitment(secret) == committed:
            return secret
    return None


def disagreements(commitments: Mapping[int, Mapping[str, str]]) -> list[tuple[int, int]]:
    """Return the pairs of counted clients that do not have the same mask: in their sum it would not cancel."""
    return [
        (low, high)
        for low, high in combinations(sorted(commitments), 2)
        if commitments[low].get(str(high)) is None or commitments[low].get(str(high)) != commitments[high].get(str(low))
    ]
