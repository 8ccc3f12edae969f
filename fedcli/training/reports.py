"""What training is told and what it tells; free of torch, so that everybody can name it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self


@dataclass(frozen=True)
class TrainSettings:
    """One client's work in one round; the learning rate is constant in it, AdamW's state fresh."""

    batch_size: int
    micro_batch_size: int | None
    """None: micro-batches are cut where that is cheapest."""
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    gradient_checkpointing: bool
    seed: int
    """Of dropout; 32 bits."""
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    """The task's, by name."""

    @classmethod
    def of(cls, record: object, **others: Any) -> Self:
        """Return the settings that a record, a manifest's, has under the same names, but for the others."""
        same = {each.name: getattr(record, each.name) for each in fields(cls) if each.name not in others}
        return cls(**same, **others)


@dataclass(frozen=True)
class StepReport:
    """What is told after every optimiser step: its number from 1, its loss, and the tokens it went through.

    The loss is None for a batch without rows, and where privacy withholds it.
    """

    step: int
    loss: float | None
    num_tokens: int
