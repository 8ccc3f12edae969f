"""The federated algorithms: pure functions on named arrays; no input or output, no torch."""

import dataclasses

from fedcli.algos.adaptive import FedAdagrad, FedAdam, FedYogi
from fedcli.algos.algorithm import Algorithm, MergedUpdates
from fedcli.algos.arrays import Array, Arrays
from fedcli.algos.client_rule import ClientRule
from fedcli.algos.diloco import DiLoCo
from fedcli.algos.fedavg import FedAvg
from fedcli.algos.fedavgm import FedAvgM
from fedcli.algos.fedprox import FedProx
from fedcli.algos.scaffold import Scaffold
from fedcli.plugins import Registry

__all__ = ["ALGORITHMS", "Algorithm", "Array", "Arrays", "ClientRule", "FedAvg", "MergedUpdates"]

_OWN: tuple[type[Algorithm], ...] = (FedAvg, FedProx, Scaffold, FedAvgM, FedAdagrad, FedYogi, FedAdam, DiLoCo)
"""A new algorithm adds its class here."""


def _name(kind: type[Algorithm]) -> str:
    return str(next(field.default for field in dataclasses.fields(kind) if field.name == "name"))


def _check(name: str, loaded: object) -> type[Algorithm]:
    """Return an algorithm of another package; raise ValueError where it is none."""
    if not isinstance(loaded, type) or not issubclass(loaded, Algorithm) or "__dataclass_fields__" not in vars(loaded):
        raise ValueError("it is no dataclass that inherits fedcli.algos.Algorithm")
    if _name(loaded) != name:
        raise ValueError(f"its name is {_name(loaded)!r}")
    loaded(name=name)  # every hyperparameter has a default
    return loaded


ALGORITHMS = Registry("fedcli.algorithms", {_name(kind): kind for kind in _OWN}, _check)
"""All algorithms by name: fedcli's own, then those of installed packages."""
