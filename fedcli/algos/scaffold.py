"""SCAFFOLD: control variates correct the drift of clients whose rows differ.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, Algorithm 1 with
option II for c_k and a server learning rate of 1. The clients' optimiser is AdamW, as in the OpenFedLLM paper, so the
correction is made to the weights after each step and not to the gradients: c_k is in units of updates.
"""

from dataclasses import dataclass
from typing import Literal

from fedcli.algos.algorithm import Algorithm, MergedUpdates, NextStep
from fedcli.algos.arrays import Array, Arrays, apply, to_float32
from fedcli.algos.client_rule import ControlVariate
from fedcli.algos.server_step import add_mean

DELTA_FILE = "control_delta.safetensors"
"""What a client sends beside its adapter: c_k+ - c_k."""


@dataclass(frozen=True, kw_only=True)
class Scaffold(Algorithm):
    """Clients: w -= lr (c - c_k) after each step. Server: as FedAvg, and c+ = c + (1/N) sum_k (c_k+ - c_k).

    The server's state is c, and what a client keeps is c_k; both begin with zero.
    """

    update_files = (DELTA_FILE,)
    private_state = "control"
    state_file = "control.safetensors"
    state_prefixes = ("",)
    clients_read_state = True

    name: Literal["scaffold"] = "scaffold"

    def client_rule(self, adapter: Arrays, state: Arrays, own: Arrays) -> ControlVariate:
        zeros = _zeros(adapter)
        return ControlVariate(apply(lambda c, c_k: c - c_k, state or zeros, own or zeros, dtype="float32"))

    def client_step(
        self, adapter: Arrays, trained: Arrays, state: Arrays, own: Arrays, *, steps: int, learning_rate: float
    ) -> "tuple[dict[str, dict[str, Array]], dict[str, Array]]":
        """Return c_k+ - c_k = (x - y_k) / (K lr) - c after K steps, and c_k+, float32."""
        scale = steps * learning_rate
        delta = to_float32(apply(lambda x, y, c: (x - y) / scale - c, adapter, trained, state or _zeros(adapter)))
        before = own or _zeros(adapter)
        return {DELTA_FILE: delta}, {name: before[name] + change for name, change in delta.items()}

    def apply(self, adapter: Arrays, merged: MergedUpdates, state: Arrays) -> NextStep:
        change = merged.files[DELTA_FILE]
        control = apply(lambda c, d: c + d, state, change) if state else change
        return add_mean(adapter, merged.difference), to_float32(control)


def _zeros(adapter: Arrays) -> "dict[str, Array]":
    import numpy as np

    return {name: np.zeros_like(array) for name, array in adapter.items()}
