"""The federated algorithms: pure functions on named arrays; no input or output, no torch."""

from dataclasses import Field
from typing import Any, ClassVar, Protocol, TypeAlias, get_args

from fedcli.algos.arrays import Array, Arrays
from fedcli.algos.fedavg import FedAvg

__all__ = ["ALGORITHMS", "Algorithm", "AnyAlgorithm", "Array", "Arrays", "FedAvg"]


class Algorithm(Protocol):
    """What the server needs of an algorithm: a dataclass whose fields are its name and hyperparameters."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def name(self) -> str:
        """The algorithm's name in fedcli.yaml and in manifests."""

    def weight(self, num_samples: int) -> float:
        """Return the weight of an update before normalisation."""

    def apply(self, adapter: Arrays, mean_difference: Arrays) -> "dict[str, Array]":
        """Return the next global adapter (float32) from x and the weighted mean of y_k - x (float64)."""


AnyAlgorithm: TypeAlias = FedAvg
"""The registry: the union of all algorithms, told apart by their names."""

ALGORITHMS: dict[str, type[AnyAlgorithm]] = {
    algorithm.name: algorithm for algorithm in get_args(AnyAlgorithm) or (AnyAlgorithm,)
}
"""The same by name."""
