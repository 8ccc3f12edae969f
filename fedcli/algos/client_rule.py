"""What a client does beside plain training: what it adds to gradients, and to weights after a step.

Only operators are used, so the same rule takes numpy arrays and tensors.
"""

from dataclasses import dataclass
from typing import Any

from fedcli.algos.arrays import Arrays


@dataclass(frozen=True)
class ClientRule:
    """A rule with one array for each of the adapter's, which its two functions get beside the weight."""

    arrays: Arrays
    """The rule's own arrays, by the adapter's names."""

    def trains(self, tensor: str) -> bool:
        """Return whether training changes this tensor of the adapter; it is frozen otherwise."""
        return True

    def gradient_term(self, weight: Any, own: Any) -> Any | None:
        """Return what is added to a weight's gradient after clipping, before the optimiser's step; None for nothing."""
        return None

    def weight_term(self, own: Any, learning_rate: float) -> Any | None:
        """Return what is added to a weight after the optimiser's step; None for nothing."""
        return None


@dataclass(frozen=True)
class Proximal(ClientRule):
    """Pulls every weight towards the global adapter x: gradient + mu (w - x), Li et al. 2020, equation 2."""

    mu: float

    def gradient_term(self, weight: Any, own: Any) -> Any:
        return self.mu * (weight - own)


@dataclass(frozen=True)
class ControlVariate(ClientRule):
    """Corrects a client's drift: w -= lr (c - c_k) after every step, Karimireddy et al. 2020, equation 3."""

    def weight_term(self, own: Any, learning_rate: float) -> Any:
        return -learning_rate * own
