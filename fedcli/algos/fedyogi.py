"""FedYogi: the second moment changes by a bounded amount, whatever its size (Reddi et al. 2021; see adaptive.py)."""

from dataclasses import dataclass
from typing import Literal

from fedcli.algos.adaptive import AdaptiveMoments
from fedcli.algos.arrays import Array


@dataclass(frozen=True, kw_only=True)
class FedYogi(AdaptiveMoments):
    """v+ = v - (1 - b2) g sign(v - g); the rest is AdaptiveMoments."""

    name: Literal["fedyogi"] = "fedyogi"

    def next_second(self, v: Array, g: Array) -> Array:
        import numpy as np

        sign: Array = np.sign(v - g)
        return v - (1.0 - self.beta2) * g * sign
