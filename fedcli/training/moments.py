"""AdamW's moments of an adapter as named arrays, so that a client can keep them from round to round."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fedcli.algos import Array

_NAMES = {"m.": "exp_avg", "v.": "exp_avg_sq", "steps.": "step"}
"""What stands before an adapter's names, and what torch calls it."""


@dataclass
class Moments:
    """What AdamW begins with, empty for a fresh start; after training `arrays` are those that it ended with.

    A tensor that was frozen keeps what it had.
    """

    arrays: "dict[str, Array]" = field(default_factory=dict)

    def load(self, optimizer: torch.optim.AdamW, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Give an optimiser the moments."""
        on_device = bool(optimizer.defaults.get("fused"))
        for name, parameter in parameters.items():
            if f"m.{name}" not in self.arrays:
                continue
            found = {key: torch.tensor(self.arrays[prefix + name]) for prefix, key in _NAMES.items()}
            steps = found.pop("step").reshape(())
            optimizer.state[parameter] = {key: tensor.to(parameter.device) for key, tensor in found.items()} | {
                "step": steps.to(parameter.device) if on_device else steps
            }

    def keep(self, optimizer: torch.optim.AdamW, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Take the moments from an optimiser."""
        kept = dict(self.arrays)
        for name, parameter in parameters.items():
            if state := optimizer.state.get(parameter):
                for prefix, key in _NAMES.items():
                    kept[prefix + name] = (
                        state[key].detach().float().cpu().reshape(state[key].shape or 1).numpy().copy()
                    )
        self.arrays = kept
