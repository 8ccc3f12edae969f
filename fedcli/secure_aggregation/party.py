"""A party's side of an attempt: masks, shares that it seals for the others, and what it reveals in a repair."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from fedcli.secure_aggregation.agreement import Unsealable, commitment, seal, unseal
from fedcli.secure_aggregation.fixed_point import Ring
from fedcli.secure_aggregation.masks import add_masks
from fedcli.secure_aggregation.shamir import split
from fedcli.secure_aggregation.terms import Terms

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

SELF = "self"
"""What tells the own mask from those that a client shares with another one."""
Sealed: TypeAlias = "dict[str, dict[int, bytes]]"
"""By what is shared (SELF, or another client's id) and receiver: a sealed share."""


def what_is(name: str) -> str:
    """Return what a sealed share is, as whoever opens it must know it."""
    return f"share|{name}"


@dataclass(frozen=True)
class Secrets:
    """What a client's masks of an attempt are made of: seeds by the other client, and its own with `double`."""

    seeds: Mapping[int, bytes]
    own: bytes | None

    def commitments(self) -> dict[str, str]:
        """Return what tells each secret again once it is revealed."""
        found = {str(other): commitment(seed) for other, seed in self.seeds.items()}
        return found if self.own is None else found | {SELF: commitment(self.own)}


def make_secrets(terms: Terms, key: "X25519PrivateKey", client: int) -> Secrets:
    """Return a client's secrets; its own is new with every call, the others follow from the keys."""
    seeds = {other: terms.seed(key, client, other) for other in terms.cohort if other != client}
    return Secrets(seeds, os.urandom(32) if terms.mode == "double" else None)


def mask(numbers: Ring, client: int, secrets: Secrets) -> None:
    """Add a client's masks to its numbers, in place: those of two clients cancel in their sum, its own does not."""
    add_masks(
        numbers,
        [seed for other, seed in secrets.seeds.items() if other > client]
        + ([] if secrets.own is None else [secrets.own]),
        [seed for other, seed in secrets.seeds.items() if other < client],
    )


def share(terms: Terms, key: "X25519PrivateKey", client: int, secrets: Secrets) -> Sealed:
    """Return shares of all of a client's secrets, each sealed for the client that is to keep it."""
    assert secrets.own is not None
    named = {SELF: secrets.own} | {str(other): seed for other, seed in secrets.seeds.items()}
    keys = {to: terms.sealing_key(key, to, sender=client, receiver=to) for to in terms.cohort}
    sealed: Sealed = {}
    for name, secret in named.items():
        parts = split(secret, terms.fewest, [to + 1 for to in terms.cohort])
        sealed[name] = {to: seal(keys[to], parts[to + 1], what_is(name)) for to in terms.cohort}
    return sealed


@dataclass
class Revealed:
    """What a client reveals in a repair."""

    seeds: dict[int, bytes] = field(default_factory=dict)
    """With `pairwise`: of the masks that it shares with those who are missing."""
    shares: dict[int, dict[str, bytes]] = field(default_factory=dict)
    """With `double`, by the client that sealed it and what it is of: of the own mask, or one that it shares."""


def reveal_seeds(secrets: Secrets, dropped: list[int]) -> Revealed:
    """Return what a client reveals where clients are missing, with `pairwise`."""
    return Revealed(seeds={other: secrets.seeds[other] for other in dropped})


def unlocking_keys(terms: Terms, key: "X25519PrivateKey", client: int) -> dict[int, bytes]:
    """Return what opens the shares that others, and the client itself, seal for it, by the one who sealed them."""
    return {sender: terms.sealing_key(key, sender, sender=sender, receiver=client) for sender in terms.cohort}


def reveal_shares(
    unlock: Mapping[int, bytes], dropped: list[int], sealed: Mapping[int, Mapping[str, bytes]]
) -> Revealed:
    """Open the shares that were sealed for a client by those counted; what is not theirs is left out.

    Of a counted client that is the share of its own mask, and of the masks that it shares with missing ones: never of
    both kinds of one client.
    """
    revealed = Revealed()
    for sender, packets in sealed.items():
        for name in (SELF, *map(str, dropped)):
            try:
                part = unseal(unlock[sender], packets.get(name, b""), what_is(name))
                revealed.shares.setdefault(sender, {})[name] = part
            except Unsealable:
                continue
    return revealed
