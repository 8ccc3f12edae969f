"""What an algorithm is to the rest of fedcli."""

from dataclasses import Field, dataclass, field
from typing import Any, ClassVar, Protocol

from fedcli.algos.arrays import Array, Arrays
from fedcli.algos.client_rule import ClientRule


@dataclass(frozen=True)
class MergedUpdates:
    """A round's counted updates together, float64, by the adapter's names.

    `difference` is the mean of y_k - x with the algorithm's weights; `control` is (1/N) sum_k (c_k+ - c_k) over the
    counted updates, N being the number of all clients, and empty unless the algorithm uses control variates.
    """

    difference: Arrays
    control: Arrays = field(default_factory=dict)


class Algorithm(Protocol):
    """A frozen dataclass whose fields are its name and hyperparameters: a client rule, a weighting and a server step.

    The class is its own configuration: fedcli.yaml and manifests hold its fields.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    uses_control: ClassVar[bool]
    """Whether its state is SCAFFOLD's c, and its clients send c_k+ - c_k beside their adapters."""
    state_prefixes: ClassVar[tuple[str, ...]]
    """What stands before the adapter's names in the server's state: one full set of arrays for each."""

    @property
    def name(self) -> str:
        """The algorithm's name in fedcli.yaml and in manifests."""

    def client_rule(self, adapter: Arrays, correction: Arrays) -> ClientRule | None:
        """Return what a client does beside plain training; None for nothing.

        `adapter` is x; `correction` is c - c_k, empty unless the algorithm uses control variates.
        """

    def weight(self, num_samples: int) -> float:
        """Return the weight of an update before normalisation."""

    def apply(
        self, adapter: Arrays, merged: MergedUpdates, state: Arrays
    ) -> "tuple[dict[str, Array], dict[str, Array]]":
        """Return the next global adapter and the next state, float32; an empty state is a fresh start."""
