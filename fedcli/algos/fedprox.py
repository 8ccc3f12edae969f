"""FedProx: FedAvg whose clients are held near the global adapter by a proximal term.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, equation 2. The gradient of the term,
mu (w - x), is added after gradients are clipped; OpenFedLLM's code has the term in the loss, where it is clipped too.
"""

from dataclasses import dataclass
from typing import Literal

from fedcli.algos.algorithm import Algorithm
from fedcli.algos.arrays import Arrays
from fedcli.algos.client_rule import Proximal
from fedcli.algos.hyperparameters import NonNegative


@dataclass(frozen=True, kw_only=True)
class FedProx(Algorithm):
    """Clients: gradient + mu (w - x). Server: as FedAvg."""

    name: Literal["fedprox"] = "fedprox"
    mu: NonNegative = 0.01

    def client_rule(self, adapter: Arrays, state: Arrays, own: Arrays) -> Proximal:
        return Proximal(adapter, self.mu)
