"""What all parties of an attempt agree on, and how few may be summed."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedcli.secure_aggregation.agreement import derive, label

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

Mode = Literal["pairwise", "double"]
MOST = {"pairwise": 512, "double": 128}
"""Clients of an attempt: what each says of the others, and shares for them, must stay small beside an update."""
FEWEST = 3
"""Clients: from the sum of two each knows the other's update."""


def fewest_of(mode: Mode, size: int) -> int:
    """Return how many of a round's cohort of this size must be summed at least.

    More than half of them with `pairwise`; more than two thirds with `double`: then of any two sets that may be summed
    one party in three and more is in both, and it answers only one.
    """
    return max(FEWEST, size // 2 + 1 if mode == "pairwise" else 2 * size // 3 + 1)


@dataclass(frozen=True)
class Terms:
    """An attempt: who takes part under which keys, and where its labels hold."""

    mode: Mode
    workspace: str
    round: int
    attempt: int
    size: int
    """Of the round's whole cohort, whether or not all take part."""
    keys: Mapping[int, bytes]
    """The X25519 public keys of those who take part."""

    @property
    def cohort(self) -> list[int]:
        """Who takes part."""
        return sorted(self.keys)

    @property
    def fewest(self) -> int:
        """How many must be summed; with `double`, how many shares give a secret, too."""
        return fewest_of(self.mode, self.size)

    def fault(self) -> str | None:
        """Return why nobody may take part in such an attempt; None where they may."""
        if len(self.keys) < self.fewest:
            return f"{len(self.keys)} of {self.size} clients take part, and {self.fewest} are needed"
        if len(self.keys) > MOST[self.mode]:
            return f"{len(self.keys)} clients take part, and with {self.mode} at most {MOST[self.mode]} may"
        if len({*self.keys.values()}) < len(self.keys):
            return "two clients have the same key"
        return None

    def fault_of_sum(self, counted: Collection[int], dropped: Collection[int]) -> str | None:
        """Return why the sum of those counted may not be revealed; None where it may."""
        if {*counted} & {*dropped}:
            return f"it counts clients that it says are missing: {sorted({*counted} & {*dropped})}"
        if sorted([*counted, *dropped]) != self.cohort:
            return "it is not about each client of the attempt exactly once"
        if len(counted) < self.fewest:
            return f"it sums {len(counted)} of {self.size} clients, and {self.fewest} are needed"
        return None

    def seed(self, own: "X25519PrivateKey", client: int, other: int) -> bytes:
        """Return the key of the mask that two clients share, as either of them computes it."""
        low, high = sorted((client, other))
        info = label("pair", self.workspace, self.round, self.attempt, low, high).encode()
        return derive(own, self.keys[other], info + self.keys[low] + self.keys[high])

    def sealing_key(self, own: "X25519PrivateKey", other: int, *, sender: int, receiver: int) -> bytes:
        """Return the key under which one client seals for another, as either of them computes it."""
        info = label("seal", self.workspace, self.round, self.attempt, sender, receiver).encode()
        return derive(own, self.keys[other], info + self.keys[sender] + self.keys[receiver])
