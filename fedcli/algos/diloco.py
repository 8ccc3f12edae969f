"""DiLoCo's outer step: Nesterov momentum on the server.

Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", 2023 (2311.08105), Algorithm 1
with Nesterov as its outer optimiser: rate 0.7, momentum 0.9. The steps of constant differences grow to eta / (1 - mu)
of them, seven with the defaults, after many rounds. LoRA with few rounds wants a mu of 0.5 to 0.8. The inner optimiser
there keeps its state from round to round: that is `train.keep_optimizer`.
"""

from dataclasses import dataclass
from typing import Literal

from fedcli.algos.algorithm import Algorithm, MergedUpdates, NextStep
from fedcli.algos.arrays import Arrays, apply
from fedcli.algos.hyperparameters import Decay, Positive
from fedcli.algos.server_step import FIRST, next_momentum, stored


@dataclass(frozen=True, kw_only=True)
class DiLoCo(Algorithm):
    """m+ = mu m + D; x+ = x + eta (D + mu m+); D is the unweighted mean of the differences."""

    state_prefixes = (FIRST,)

    name: Literal["diloco"] = "diloco"
    eta: Positive = 0.7
    mu: Decay = 0.9

    def weight(self, num_samples: int) -> float:
        return 1.0

    def apply(self, adapter: Arrays, merged: MergedUpdates, state: Arrays) -> NextStep:
        mean = merged.difference
        momentum = next_momentum(state, mean, beta1=self.mu, form="heavy_ball")
        following = apply(lambda x, d, m: x + self.eta * (d + self.mu * m), adapter, mean, momentum, dtype="float32")
        return following, stored(FIRST, momentum)
