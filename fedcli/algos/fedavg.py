"""FedAvg: the mean of the clients' adapters, weighted by their numbers of rows.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017, Algorithm 1.
The mean of LoRA's factors A and B is not the mean of their products B A; like the OpenFedLLM paper, the factors
themselves are averaged.
"""

from dataclasses import dataclass
from typing import Literal

from fedcli.algos.arrays import Array, Arrays
from fedcli.algos.server_step import add_mean
from fedcli.algos.weighting import by_num_samples


@dataclass(frozen=True, kw_only=True)
class FedAvg:
    """x+ = x + sum_k (n_k / sum n) (y_k - x)."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  # pydantic reads it by this name

    name: Literal["fedavg"] = "fedavg"

    def weight(self, num_samples: int) -> float:
        """Return the weight of an update before normalisation."""
        return by_num_samples(num_samples)

    def apply(self, adapter: Arrays, mean_difference: Arrays) -> "dict[str, Array]":
        """Return the next global adapter, float32."""
        return add_mean(adapter, mean_difference)
