"""What a client does beside plain training: what it adds to gradients, and to weights after a step.

Only operators are used, so the same rule takes numpy arrays and tensors.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from fedcli.algos.arrays import Arrays


class ClientRule(Protocol):
    """A rule with one array for each of the adapter's, which its two functions get beside the weight."""

    @property
    def arrays(self) -> Arrays:
        """The rule's own arrays, by the adapter's names."""

    def gradient_term(self, weight: Any, own: Any) -> Any | None:
        """Return what is added to a weight's gradient after clipping, before the optimiser's step; None for nothing."""

    def weight_term(self, own: Any, learning_rate: float) -> Any | None:
        """Return what is added to a weight after the optimiser's step; None for nothing."""


@dataclass(frozen=True)
class Proximal:
    """Pulls every weight towards the global adapter x: gradient + mu (w - x), Li et al. 2020, equation 2."""

    arrays: Arrays
    """The global adapter x."""
    mu: float

    def gradient_term(self, weight: Any, own: Any) -> Any:
        """Return mu (w - x)."""
        return self.mu * (weight - own)

    def weight_term(self, own: Any, learning_rate: float) -> None:
        """Return nothing."""


@dataclass(frozen=True)
class ControlVariate:
    """Corrects a client's drift: w -= lr (c - c_k) after every step, Karimireddy et al. 2020, equation 3."""

    arrays: Arrays
    """The correction c - c_k, by the adapter's names."""

    def gradient_term(self, weight: Any, own: Any) -> None:
        """Return nothing."""

    def weight_term(self, own: Any, learning_rate: float) -> Any:
        """Return -lr (c - c_k)."""
        return -learning_rate * own
