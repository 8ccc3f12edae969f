"""Which of LoRA's two factors clients train, send and keep: the setting aggregation.share.

[B] is FFA-LoRA (2403.12313): A stays what round 0 has, and so sum p_k B_k A is exactly (sum p_k B_k) A. alternate is
RoLoRA (2409.02346): the first round trains and sends B, the next A, and so on; the other factor is frozen and the same
for all, so that the mean is exact in every round. [A] is FedSA-LoRA (2410.01463): clients train both factors, send A
and keep a B of their own.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from fedcli.algos.algorithm import Algorithm, NextStep
from fedcli.algos.arrays import Array, Arrays
from fedcli.algos.client_rule import ClientRule

Share: TypeAlias = Literal["A", "B", "alternate"]
"""What is shared where not both factors are."""


def is_sent(share: Share | None, round_number: int, tensor: str) -> bool:
    """Return whether the updates of a round carry a tensor; of `alternate` rounds 0, 2, 4, ... send B."""
    if share is None:
        return True
    factor = ("B", "A")[round_number % 2] if share == "alternate" else share
    return factor == factor_of(tensor)


def factor_of(tensor: str) -> str:
    """Return which of LoRA's factors a tensor is."""
    return "A" if ".lora_A." in tensor else "B"


def private_tensors(patterns: Collection[str], tensors: Collection[str]) -> list[str]:
    """Return the tensors that any of the patterns names, sorted: parts of a name between dots, A-B for a range of them.

    `layers.28-31` names all of four layers, `v_proj` one module of each: FedPer (1912.00818), of any tensors.
    """
    return sorted(name for name in tensors if any(_names(pattern, name) for pattern in patterns))


def _names(pattern: str, tensor: str) -> bool:
    wanted, parts = pattern.split("."), tensor.split(".")
    return any(
        all(map(_is_part, wanted, parts[start : start + len(wanted)])) for start in range(len(parts) - len(wanted) + 1)
    )


def _is_part(wanted: str, part: str) -> bool:
    low, _, high = wanted.partition("-")
    if low.isdecimal() and high.isdecimal() and part.isdecimal():
        return int(low) <= int(part) <= int(high)
    return wanted == part


def sent_tensors(
    algorithm: Algorithm,
    share: Share | None,
    round_number: int,
    tensors: Collection[str],
    private: Collection[str] = (),
) -> list[str] | None:
    """Return which tensors the updates of a round carry, sorted: those that all share; None for all of them."""
    found = sorted(
        name
        for name in tensors
        if algorithm.shares(name) and is_sent(share, round_number, name) and name not in private
    )
    return None if len(found) == len(tensors) else found


@dataclass(frozen=True)
class Freezing(ClientRule):
    """Another rule, or none, that lets some tensors stay as they are."""

    rule: ClientRule | None
    frozen: Collection[str]

    def trains(self, tensor: str) -> bool:
        return tensor not in self.frozen and (self.rule is None or self.rule.trains(tensor))

    def gradient_term(self, weight: Any, own: Any) -> Any | None:
        return None if self.rule is None else self.rule.gradient_term(weight, own)

    def weight_term(self, own: Any, learning_rate: float) -> Any | None:
        return None if self.rule is None else self.rule.weight_term(own, learning_rate)


def freezing(rule: ClientRule | None, frozen: Collection[str], adapter: Arrays) -> ClientRule | None:
    """Return a client's rule with some tensors frozen."""
    if not frozen:
        return rule
    return Freezing(adapter if rule is None else rule.arrays, rule, frozenset(frozen))


def without_unsent(
    algorithm: Algorithm, step: NextStep, unsent: Collection[str], adapter: Arrays, before: Arrays
) -> NextStep:
    """Return a server's step that changes nothing of tensors that were not sent: neither the adapter nor the state.

    A momentum would go on without them. `before` is the state before the step; a fresh one stays as the step began it.
    """
    following, state = step
    names = [prefix + name for prefix in algorithm.state_prefixes for name in unsent]
    kept: dict[str, Array] = {name: before[name] for name in names if name in before}
    return {**following, **{name: adapter[name] for name in unsent}}, {**state, **kept}


def own_without_unsent(
    algorithm: Algorithm, own: Arrays, unsent: Collection[str], before: Arrays
) -> "dict[str, Array]":
    """Return what a client keeps for its algorithm, with nothing new of tensors that `share` keeps out of updates.

    They are as before, or zero: SCAFFOLD's c_k is a share of c, and of what is not sent c has none.
    """
    zeros = {name: array * 0 for name, array in own.items() if name in unsent and algorithm.shares(name)}
    return {**own, **zeros, **{name: before[name] for name in unsent if name in before}}
