"""FedAdam: the server's step is Adam's.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, Algorithm 2, squares the mean difference D for the second
moment: `second_moment: delta`. OpenFedLLM's released code squares the new momentum m+ instead: `second_moment:
momentum`, the default here. As in that code the mean is unweighted, and the first m is D itself.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedcli.algos.algorithm import MergedUpdates
from fedcli.algos.arrays import Array, Arrays, apply
from fedcli.algos.hyperparameters import CLOSED, Decay, Positive
from fedcli.algos.server_step import (
    FIRST,
    SECOND,
    SecondMoment,
    adaptive_step,
    next_momentum,
    second_moment,
    stored,
)
from fedcli.algos.weighting import uniform


@dataclass(frozen=True, kw_only=True)
class FedAdam:
    """m+ = b1 m + (1 - b1) D; g = m+^2 or D^2; v+ = b2 v + (1 - b2) g; x+ = x + eta m+ / (sqrt v+ + tau)."""

    __pydantic_config__ = CLOSED
    uses_control: ClassVar[bool] = False
    state_prefixes: ClassVar[tuple[str, ...]] = (FIRST, SECOND)

    name: Literal["fedadam"] = "fedadam"
    eta: Positive = 1e-3
    tau: Positive = 1e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    second_moment: SecondMoment = "momentum"

    def client_rule(self, adapter: Arrays, correction: Arrays) -> None:
        """Return nothing: clients train plainly."""

    def weight(self, num_samples: int) -> float:
        """Return 1."""
        return uniform(num_samples)

    def apply(
        self, adapter: Arrays, merged: MergedUpdates, state: Arrays
    ) -> "tuple[dict[str, Array], dict[str, Array]]":
        """Return x + eta m+ / (sqrt v+ + tau), and m+ and v+; v starts at tau^2."""
        mean = merged.difference
        momentum = next_momentum(state, mean, beta1=self.beta1)
        squared = mean if self.second_moment == "delta" else momentum
        second = apply(self._second, second_moment(state, mean, self.tau), squared)
        adapter = adaptive_step(adapter, momentum, second, eta=self.eta, tau=self.tau)
        return adapter, stored(FIRST, momentum) | stored(SECOND, second)

    def _second(self, v: Array, direction: Array) -> Array:
        g = direction * direction
        return self.beta2 * v + (1.0 - self.beta2) * g
