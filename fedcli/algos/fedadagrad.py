"""FedAdagrad: the server's step shrinks with the squares of all differences so far.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, Algorithm 2, without momentum. The mean of the differences
is unweighted, as in OpenFedLLM's code.
"""

from dataclasses import dataclass
from typing import Literal

from fedcli.algos.algorithm import Algorithm, MergedUpdates, NextStep
from fedcli.algos.arrays import Arrays, apply
from fedcli.algos.hyperparameters import Positive
from fedcli.algos.server_step import SECOND, adaptive_step, second_moment, stored


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(Algorithm):
    """v+ = v + D^2; x+ = x + eta D / (sqrt v+ + tau); v starts at tau^2."""

    state_prefixes = (SECOND,)

    name: Literal["fedadagrad"] = "fedadagrad"
    eta: Positive = 1e-3
    tau: Positive = 1e-3

    def weight(self, num_samples: int) -> float:
        return 1.0

    def apply(self, adapter: Arrays, merged: MergedUpdates, state: Arrays) -> NextStep:
        mean = merged.difference
        second = apply(lambda v, d: v + d * d, second_moment(state, mean, self.tau), mean)
        return adaptive_step(adapter, mean, second, eta=self.eta, tau=self.tau), stored(SECOND, second)
