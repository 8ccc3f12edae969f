"""FedAvg: the mean of the clients' adapters, weighted by their numbers of rows.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017, Algorithm 1.
The mean of LoRA's factors A and B is not the mean of their products B A; like the OpenFedLLM paper, the factors
themselves are averaged.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedcli.algos.algorithm import MergedUpdates
from fedcli.algos.arrays import Array, Arrays
from fedcli.algos.hyperparameters import CLOSED
from fedcli.algos.server_step import add_mean
from fedcli.algos.weighting import by_num_samples


@dataclass(frozen=True, kw_only=True)
class FedAvg:
    """x+ = x + sum_k (n_k / sum n) (y_k - x)."""

    __pydantic_config__ = CLOSED
    uses_control: ClassVar[bool] = False
    state_prefixes: ClassVar[tuple[str, ...]] = ()

    name: Literal["fedavg"] = "fedavg"

    def client_rule(self, adapter: Arrays, correction: Arrays) -> None:
        """Return nothing: clients train plainly."""

    def weight(self, num_samples: int) -> float:
        """Return n_k."""
        return by_num_samples(num_samples)

    def apply(
        self, adapter: Arrays, merged: MergedUpdates, state: Arrays
    ) -> "tuple[dict[str, Array], dict[str, Array]]":
        """Return x + D, and no state."""
        return add_mean(adapter, merged.difference), {}
