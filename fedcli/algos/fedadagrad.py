"""FedAdagrad: the server's step shrinks with the squares of all differences so far.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, Algorithm 2, without momentum. The mean of the differences
is unweighted, as in OpenFedLLM's code.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedcli.algos.algorithm import MergedUpdates
from fedcli.algos.arrays import Array, Arrays, apply
from fedcli.algos.hyperparameters import CLOSED, Positive
from fedcli.algos.server_step import SECOND, adaptive_step, second_moment, stored
from fedcli.algos.weighting import uniform


@dataclass(frozen=True, kw_only=True)
class FedAdagrad:
    """v+ = v + D^2; x+ = x + eta D / (sqrt v+ + tau); v starts at tau^2."""

    __pydantic_config__ = CLOSED
    uses_control: ClassVar[bool] = False
    state_prefixes: ClassVar[tuple[str, ...]] = (SECOND,)

    name: Literal["fedadagrad"] = "fedadagrad"
    eta: Positive = 1e-3
    tau: Positive = 1e-3

    def client_rule(self, adapter: Arrays, correction: Arrays) -> None:
        """Return nothing: clients train plainly."""

    def weight(self, num_samples: int) -> float:
        """Return 1."""
        return uniform(num_samples)

    def apply(
        self, adapter: Arrays, merged: MergedUpdates, state: Arrays
    ) -> "tuple[dict[str, Array], dict[str, Array]]":
        """Return x + eta D / (sqrt v+ + tau), and v+."""
        mean = merged.difference
        second = apply(lambda v, d: v + d * d, second_moment(state, mean, self.tau), mean)
        return adaptive_step(adapter, mean, second, eta=self.eta, tau=self.tau), stored(SECOND, second)
