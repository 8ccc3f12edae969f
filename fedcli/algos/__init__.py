"""The federated algorithms: pure functions on named arrays; no input or output, no torch."""

from collections.abc import Mapping
from dataclasses import Field
from typing import Any, ClassVar, Protocol

from fedcli.algos.arrays import Array, Arrays
from fedcli.algos.fedavg import FedAvg

__all__ = ["ALGORITHMS", "Algorithm", "Array", "Arrays", "FedAvg", "algorithm_from"]


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


ALGORITHMS: dict[str, type[FedAvg]] = {"fedavg": FedAvg}
"""The registry: name -> class."""


def algorithm_from(record: Mapping[str, Any]) -> Algorithm:
    """Return the algorithm that a manifest's record names; raise KeyError or TypeError where there is none such."""
    return ALGORITHMS[record["name"]](**record)
