"""FedAvgM: momentum on the server.

Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", 2019,
section 4.3, is `momentum: heavy_ball`: m+ = b1 m + D. OpenFedLLM's released code damps it, m+ = b1 m + (1 - b1) D: that
is `momentum: damped`, the default here.
"""

from dataclasses import dataclass
from typing import Literal

from fedcli.algos.algorithm import Algorithm, MergedUpdates, NextStep
from fedcli.algos.arrays import Arrays
from fedcli.algos.hyperparameters import Decay
from fedcli.algos.server_step import FIRST, Momentum, add_mean, next_momentum, stored


@dataclass(frozen=True, kw_only=True)
class FedAvgM(Algorithm):
    """m+ = b1 m + (1 - b1) D, or b1 m + D; x+ = x + m+; D is weighted by the clients' numbers of rows."""

    state_prefixes = (FIRST,)

    name: Literal["fedavgm"] = "fedavgm"
    beta1: Decay = 0.9
    momentum: Momentum = "damped"

    def apply(self, adapter: Arrays, merged: MergedUpdates, state: Arrays) -> NextStep:
        momentum = next_momentum(state, merged.difference, beta1=self.beta1, form=self.momentum)
        return add_mean(adapter, momentum), stored(FIRST, momentum)
