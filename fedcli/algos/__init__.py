"""The federated algorithms: pure functions on named arrays; no input or output, no torch."""

from typing import TypeAlias, get_args

from fedcli.algos.algorithm import Algorithm, MergedUpdates
from fedcli.algos.arrays import Array, Arrays
from fedcli.algos.client_rule import ClientRule
from fedcli.algos.fedadagrad import FedAdagrad
from fedcli.algos.fedadam import FedAdam
from fedcli.algos.fedavg import FedAvg
from fedcli.algos.fedavgm import FedAvgM
from fedcli.algos.fedprox import FedProx
from fedcli.algos.fedyogi import FedYogi
from fedcli.algos.scaffold import Scaffold

__all__ = ["ALGORITHMS", "Algorithm", "AnyAlgorithm", "Array", "Arrays", "ClientRule", "FedAvg", "MergedUpdates"]

AnyAlgorithm: TypeAlias = FedAvg | FedProx | Scaffold | FedAvgM | FedAdagrad | FedYogi | FedAdam
"""The registry: the union of all algorithms, told apart by their names."""

ALGORITHMS: dict[str, type[AnyAlgorithm]] = {algorithm.name: algorithm for algorithm in get_args(AnyAlgorithm)}
"""The same by name."""
