"""Supervised fine-tuning: cross-entropy of the response's tokens."""

from collections.abc import Callable, Sequence
from functools import partial

from fedcli.algos import ClientRule
from fedcli.data.encoded import EncodedExample
from fedcli.model.likelihood import collate, supervised_cross_entropy
from fedcli.model.lora import AdaptedModel
from fedcli.training.reports import StepReport, TrainSettings
from fedcli.training.trainer import fit


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
    return fit(
        adapted,
        examples,
        settings,
        collate=partial(collate, pad_id=adapted.pad_id),
        loss=lambda model, batch: supervised_cross_entropy(model, batch)[0].sum(),
        divisor=lambda batch: sum(example.num_supervised for example in batch),
        rule=rule,
        on_step=on_step,
    )
