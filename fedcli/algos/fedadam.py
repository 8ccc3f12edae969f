"""FedAdam: the server's step is Adam's (Reddi et al. 2021; see adaptive.py)."""

from dataclasses import dataclass
from typing import Literal

from fedcli.algos.adaptive import AdaptiveMoments
from fedcli.algos.arrays import Array


@dataclass(frozen=True, kw_only=True)
class FedAdam(AdaptiveMoments):
    """v+ = b2 v + (1 - b2) g; the rest is AdaptiveMoments."""

    name: Literal["fedadam"] = "fedadam"

    def next_second(self, v: Array, g: Array) -> Array:
        return self.beta2 * v + (1.0 - self.beta2) * g
