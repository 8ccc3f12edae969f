"""What an algorithm is to the rest of fedcli."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from fedcli.algos.arrays import Array, Arrays
from fedcli.algos.client_rule import ClientRule
from fedcli.algos.server_step import add_mean

if TYPE_CHECKING:
    from fedcli.algos.reducer import Reducer

NextStep: TypeAlias = "tuple[dict[str, Array], dict[str, Array]]"
"""The next global adapter and the next state, float32."""


@dataclass(frozen=True)
class MergedUpdates:
    """A round's counted updates together, float64, by the adapter's names.

    `difference` is what the algorithm's reducer makes of y_k - x, the weighted mean by default; `files` holds what its
    `file_reducer` makes of each of its `update_files`, by default the sum over the number of all clients. Tensors that
    updates do not carry are zero in both.
    """

    difference: Arrays
    files: Mapping[str, Arrays] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A federated algorithm: a frozen dataclass whose fields are its name and hyperparameters.

    The class is its own configuration: fedcli.yaml and manifests hold its fields. The defaults are FedAvg's.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}
    """What pydantic is told: no unknown hyperparameter, no NaN, no infinity."""

    update_files: ClassVar[tuple[str, ...]] = ()
    """Files that a client sends beside its adapter, each with the tensors that updates carry."""
    private_state: ClassVar[str] = ""
    """The folder in a client's home of what it keeps from round to round; empty where it keeps nothing."""
    state_file: ClassVar[str] = "optimizer.safetensors"
    """The file of a round that holds the server's state."""
    state_prefixes: ClassVar[tuple[str, ...]] = ()
    """What stands before the adapter's names in the server's state: one full set of arrays for each."""
    clients_read_state: ClassVar[bool] = False
    """Whether clients need the server's state."""

    name: str
    """The algorithm's name in fedcli.yaml and in manifests."""

    def shares(self, tensor: str) -> bool:
        """Return whether updates carry this tensor of the adapter; no merge changes one that they do not carry."""
        return True

    def update_tensors(self, tensors: Collection[str]) -> list[str] | None:
        """Return which of the adapter's tensors updates carry, sorted; None for all of them."""
        shared = sorted(filter(self.shares, tensors))
        return None if len(shared) == len(tensors) else shared

    def start(self, adapter: Arrays, own: Arrays) -> Arrays:
        """Return what a client's training starts from, x by default; `own` is what the client kept."""
        return adapter

    def client_rule(self, adapter: Arrays, state: Arrays, own: Arrays) -> ClientRule | None:
        """Return what a client does beside plain training; None for nothing.

        `adapter` is x; `state` is the server's, empty unless clients read it; `own` is what the client kept, empty
        before its first counted update.
        """
        return None

    def client_step(
        self, adapter: Arrays, trained: Arrays, state: Arrays, own: Arrays, *, steps: int, learning_rate: float
    ) -> "tuple[dict[str, dict[str, Array]], dict[str, Array]]":
        """Return what a client sends after training, by `update_files`, and what it keeps if that update counts.

        Of what is sent only the tensors that updates carry leave the client.
        """
        return {}, {}

    def weight(self, num_samples: int) -> float:
        """Return the weight of an update before normalisation: its number of rows, McMahan et al. 2017."""
        return float(num_samples)

    def reducer(self) -> "Reducer":
        """Return what merges the updates' differences from x: their weighted mean."""
        from fedcli.algos.reducer import WeightedMean

        return WeightedMean()

    def file_reducer(self, num_clients: int) -> "Reducer":
        """Return what merges one of `update_files`, all weights being 1: the sum over the number of all clients."""
        from fedcli.algos.reducer import WeightedMean

        return WeightedMean(divisor=num_clients)

    def apply(self, adapter: Arrays, merged: MergedUpdates, state: Arrays) -> NextStep:
        """Return the next global adapter and state, by default x + D and none; an empty state is a fresh start."""
        return add_mean(adapter, merged.difference), {}

    def changes_clients(self) -> bool:
        """Return whether a client must do, send or keep more than plain training gives."""
        has_own = any(getattr(type(self), name) is not getattr(Algorithm, name) for name in ("shares", "start"))
        return has_own or bool(self.update_files or self.private_state) or self.client_rule({}, {}, {}) is not None
