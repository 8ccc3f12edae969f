"""What training is told and what it tells; free of torch, so that everybody can name it."""

from dataclasses import dataclass


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


@dataclass(frozen=True)
class StepReport:
    """What is told after every optimiser step: its number from 1, its loss, and the tokens it went through."""

    step: int
    loss: float
    num_tokens: int
