"""FedAdagrad, FedYogi and FedAdam: a second moment scales each number of the server's step.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, Algorithm 2; FedAdagrad is without momentum. FedYogi and
FedAdam there square the mean difference D for the second moment: `second_moment: delta`. OpenFedLLM's released code
squares the new momentum m+ instead: `second_moment: momentum`, the default here. As in that code the mean is
unweighted, and the first m is D itself.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from fedcli.algos.algorithm import Algorithm, MergedUpdates, NextStep
from fedcli.algos.arrays import Array, Arrays, apply
from fedcli.algos.hyperparameters import Decay, Positive
from fedcli.algos.server_step import FIRST, SECOND, adaptive_step, next_momentum, second_moment, stored


@dataclass(frozen=True, kw_only=True)
class Adaptive(Algorithm):
    """x+ = x + eta direction / (sqrt v+ + tau); v starts at tau^2."""

    eta: Positive = 1e-3
    tau: Positive = 1e-3

    def weight(self, num_samples: int) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(Adaptive):
    """The step shrinks with the squares of all differences so far: v+ = v + D^2; the direction is D."""

    state_prefixes = (SECOND,)

    name: Literal["fedadagrad"] = "fedadagrad"

    def apply(self, adapter: Arrays, merged: MergedUpdates, state: Arrays) -> NextStep:
        mean = merged.difference
        second = apply(lambda v, d: v + d * d, second_moment(state, mean, self.tau), mean)
        return adaptive_step(adapter, mean, second, eta=self.eta, tau=self.tau), stored(SECOND, second)


@dataclass(frozen=True, kw_only=True)
class AdaptiveMoments(Adaptive, ABC):
    """The direction is m+ = b1 m + (1 - b1) D; v+ comes from v and g = m+^2 or D^2."""

    state_prefixes = (FIRST, SECOND)

    beta1: Decay = 0.9
    beta2: Decay = 0.99
    second_moment: Literal["momentum", "delta"] = "momentum"

    @abstractmethod
    def next_second(self, v: Array, g: Array) -> Array:
        """Return v+."""

    def apply(self, adapter: Arrays, merged: MergedUpdates, state: Arrays) -> NextStep:
        mean = merged.difference
        momentum = next_momentum(state, mean, beta1=self.beta1)
        squared = mean if self.second_moment == "delta" else momentum
        second = apply(lambda v, s: self.next_second(v, s * s), second_moment(state, mean, self.tau), squared)
        adapter = adaptive_step(adapter, momentum, second, eta=self.eta, tau=self.tau)
        return adapter, stored(FIRST, momentum) | stored(SECOND, second)


@dataclass(frozen=True, kw_only=True)
class FedAdam(AdaptiveMoments):
    """Adam's step: v+ = b2 v + (1 - b2) g."""

    name: Literal["fedadam"] = "fedadam"

    def next_second(self, v: Array, g: Array) -> Array:
        return self.beta2 * v + (1.0 - self.beta2) * g


@dataclass(frozen=True, kw_only=True)
class FedYogi(AdaptiveMoments):
    """v changes by a bounded amount, whatever its size: v+ = v - (1 - b2) g sign(v - g)."""

    name: Literal["fedyogi"] = "fedyogi"

    def next_second(self, v: Array, g: Array) -> Array:
        import numpy as np

        sign: Array = np.sign(v - g)
        return v - (1.0 - self.beta2) * g * sign
