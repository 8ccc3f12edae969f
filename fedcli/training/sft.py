"""Supervised fine-tuning: cross-entropy of the response's tokens."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from fedcli.algos import ClientRule
from fedcli.data.encoded import EncodedExample
from fedcli.model.likelihood import collate, supervised_cross_entropy
from fedcli.model.lora import AdaptedModel
from fedcli.training.reports import StepReport, TrainSettings
from fedcli.training.trainer import Batch, fit


def train_sft(
    adapted: AdaptedModel,
    examples: Sequence[EncodedExample],
    settings: TrainSettings,
    on_step: Callable[[StepReport], None],
    rule: ClientRule | None = None,
) -> list[float]:
    """Train the adapter in place, one optimiser step for every `batch_size` examples; return the losses of the steps.

    A step's loss is the mean over the supervised tokens of its batch, however the batch is cut into micro-batches.
    """
    pad = partial(collate, pad_id=adapted.pad_id)
    return fit(adapted, examples, settings, collate=pad, loss=_loss, rule=rule, on_step=on_step)


def _loss(model: Any, base: Any, batch: Batch, num_tokens: torch.Tensor | int) -> torch.Tensor:
    losses, _ = supervised_cross_entropy(model, base, batch)
    return losses.sum() / num_tokens
