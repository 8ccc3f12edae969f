"""FedAvgM: momentum on the server.

Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", 2019,
section 4.3, is `momentum: heavy_ball`: m+ = b1 m + D. OpenFedLLM's released code damps it, m+ = b1 m + (1 - b1) D: that
is `momentum: damped`, the default here.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedcli.algos.algorithm import MergedUpdates
from fedcli.algos.arrays import Array, Arrays
from fedcli.algos.hyperparameters import CLOSED, Decay
from fedcli.algos.server_step import FIRST, Momentum, add_mean, next_momentum, stored
from fedcli.algos.weighting import by_num_samples


@dataclass(frozen=True, kw_only=True)
class FedAvgM:
    """m+ = b1 m + (1 - b1) D, or b1 m + D; x+ = x + m+; D is weighted by the clients' numbers of rows."""

    __pydantic_config__ = CLOSED
    uses_control: ClassVar[bool] = False
    state_prefixes: ClassVar[tuple[str, ...]] = (FIRST,)

    name: Literal["fedavgm"] = "fedavgm"
    beta1: Decay = 0.9
    momentum: Momentum = "damped"

    def client_rule(self, adapter: Arrays, correction: Arrays) -> None:
        """Return nothing: clients train plainly."""

    def weight(self, num_samples: int) -> float:
        """Return n_k."""
        return by_num_samples(num_samples)

    def apply(
        self, adapter: Arrays, merged: MergedUpdates, state: Arrays
    ) -> "tuple[dict[str, Array], dict[str, Array]]":
        """Return x + m+, and m+."""
        momentum = next_momentum(state, merged.difference, beta1=self.beta1, form=self.momentum)
        return add_mean(adapter, momentum), stored(FIRST, momentum)
