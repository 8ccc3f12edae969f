"""FedProx: FedAvg whose clients are held near the global adapter by a proximal term.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, equation 2. The gradient of the term,
mu (w - x), is added after gradients are clipped; OpenFedLLM's code has the term in the loss, where it is clipped too.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedcli.algos.algorithm import MergedUpdates
from fedcli.algos.arrays import Array, Arrays
from fedcli.algos.client_rule import Proximal
from fedcli.algos.hyperparameters import CLOSED, NonNegative
from fedcli.algos.server_step import add_mean
from fedcli.algos.weighting import by_num_samples


@dataclass(frozen=True, kw_only=True)
class FedProx:
    """Clients: gradient + mu (w - x). Server: x+ = x + sum_k (n_k / sum n) (y_k - x)."""

    __pydantic_config__ = CLOSED
    uses_control: ClassVar[bool] = False
    state_prefixes: ClassVar[tuple[str, ...]] = ()

    name: Literal["fedprox"] = "fedprox"
    mu: NonNegative = 0.01

    def client_rule(self, adapter: Arrays, correction: Arrays) -> Proximal:
        """Return the pull towards x."""
        return Proximal(adapter, self.mu)

    def weight(self, num_samples: int) -> float:
        """Return n_k."""
        return by_num_samples(num_samples)

    def apply(
        self, adapter: Arrays, merged: MergedUpdates, state: Arrays
    ) -> "tuple[dict[str, Array], dict[str, Array]]":
        """Return x + D, and no state."""
        return add_mean(adapter, merged.difference), {}
