"""FedAvg: the mean of the clients' adapters, weighted by their numbers of rows.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017, Algorithm 1.
The mean of LoRA's factors A and B is not the mean of their products B A; like the OpenFedLLM paper, the factors
themselves are averaged.
"""

from dataclasses import dataclass
from typing import Literal

from fedcli.algos.algorithm import Algorithm


@dataclass(frozen=True, kw_only=True)
class FedAvg(Algorithm):
    """x+ = x + sum_k (n_k / sum n) (y_k - x): all defaults."""

    name: Literal["fedavg"] = "fedavg"
