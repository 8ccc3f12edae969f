"""What FedYogi and FedAdam share: momentum, and a second moment that scales each number's step.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, Algorithm 2, squares the mean difference D for the second
moment: `second_moment: delta`. OpenFedLLM's released code squares the new momentum m+ instead: `second_moment:
momentum`, the default here. As in that code the mean is unweighted, and the first m is D itself.
"""

from dataclasses import dataclass
from typing import Literal

from fedcli.algos.algorithm import Algorithm, MergedUpdates, NextStep
from fedcli.algos.arrays import Array, Arrays, apply
from fedcli.algos.hyperparameters import Decay, Positive
from fedcli.algos.server_step import FIRST, SECOND, adaptive_step, next_momentum, second_moment, stored


@dataclass(frozen=True, kw_only=True)
class AdaptiveMoments(Algorithm):
    """m+ = b1 m + (1 - b1) D; g = m+^2 or D^2; v+ from v (tau^2 at first) and g; x+ = x + eta m+ / (sqrt v+ + tau)."""

    state_prefixes = (FIRST, SECOND)

    eta: Positive = 1e-3
    tau: Positive = 1e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    second_moment: Literal["momentum", "delta"] = "momentum"

    def next_second(self, v: Array, g: Array) -> Array:
        """Return v+."""
        raise NotImplementedError

    def weight(self, num_samples: int) -> float:
        return 1.0

    def apply(self, adapter: Arrays, merged: MergedUpdates, state: Arrays) -> NextStep:
        mean = merged.difference
        momentum = next_momentum(state, mean, beta1=self.beta1)
        squared = mean if self.second_moment == "delta" else momentum
        second = apply(lambda v, s: self.next_second(v, s * s), second_moment(state, mean, self.tau), squared)
        adapter = adaptive_step(adapter, momentum, second, eta=self.eta, tau=self.tau)
        return adapter, stored(FIRST, momentum) | stored(SECOND, second)
