"""SCAFFOLD: control variates correct the drift of clients whose rows differ.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, Algorithm 1 with
option II for c_k and a server learning rate of 1. The clients' optimiser is AdamW, as in the OpenFedLLM paper, so the
correction is made to the weights after each step and not to the gradients: c_k is in units of updates.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedcli.algos.algorithm import MergedUpdates
from fedcli.algos.arrays import Array, Arrays, apply, to_float32
from fedcli.algos.client_rule import ControlVariate
from fedcli.algos.hyperparameters import CLOSED
from fedcli.algos.server_step import add_mean
from fedcli.algos.weighting import by_num_samples


@dataclass(frozen=True, kw_only=True)
class Scaffold:
    """Clients: w -= lr (c - c_k) after each step. Server: as FedAvg, and c+ = c + (1/N) sum_k (c_k+ - c_k)."""

    __pydantic_config__ = CLOSED
    uses_control: ClassVar[bool] = True
    state_prefixes: ClassVar[tuple[str, ...]] = ("",)

    name: Literal["scaffold"] = "scaffold"

    def client_rule(self, adapter: Arrays, correction: Arrays) -> ControlVariate:
        """Return the correction by c - c_k."""
        return ControlVariate(correction)

    def weight(self, num_samples: int) -> float:
        """Return n_k."""
        return by_num_samples(num_samples)

    def apply(
        self, adapter: Arrays, merged: MergedUpdates, state: Arrays
    ) -> "tuple[dict[str, Array], dict[str, Array]]":
        """Return x + D, and c + (1/N) sum_k (c_k+ - c_k); c is zero in a fresh start."""
        control = apply(lambda c, d: c + d, state, merged.control) if state else merged.control
        return add_mean(adapter, merged.difference), to_float32(control)


def control_delta(
    adapter: Arrays, trained: Arrays, control: Arrays, *, steps: int, learning_rate: float
) -> "dict[str, Array]":
    """Return a client's c_k+ - c_k = (x - y_k) / (K lr) - c after K steps, float32."""
    scale = steps * learning_rate
    return to_float32(apply(lambda x, y, c: (x - y) / scale - c, adapter, trained, control))
