"""Direct preference optimisation: Rafailov et al., "Direct Preference Optimization", NeurIPS 2023, equation 7."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from fedcli.algos import ClientRule
from fedcli.data.encoded import EncodedPair
from fedcli.model.likelihood import collate, response_log_probs
from fedcli.model.lora import AdaptedModel
from fedcli.training.reports import StepReport, TrainSettings
from fedcli.training.trainer import Batch, fit


@dataclass(frozen=True)
class ReferredPair:
    """A pair, and the log-probabilities that the reference model gives to its two responses."""

    pair: EncodedPair
    chosen: float
    rejected: float

    @property
    def num_tokens(self) -> int:
        """The tokens of both sides."""
        return self.pair.num_tokens

    @property
    def length(self) -> int:
        """The tokens of both sides once the shorter is padded to the longer."""
        return self.pair.length


def train_dpo(
    adapted: AdaptedModel,
    pairs: Sequence[ReferredPair],
    beta: float,
    settings: TrainSettings,
    on_step: Callable[[StepReport], None],
    rule: ClientRule | None = None,
) -> list[float]:
    """Train the adapter in place, one optimiser step for every `batch_size` pairs; return the losses of the steps.

    A step's loss is the mean over its pairs of -log sigmoid(beta ((log p(chosen) - log p(rejected)) - the same of the
    reference)), however the batch is cut into micro-batches. Dropout is off, as in trl: the reference has none.
    """
    with _no_dropout(adapted.model):
        return fit(
            adapted,
            pairs,
            settings,
            collate=partial(_collate, pad_id=adapted.pad_id),
            loss=partial(_loss, beta),
            divisor=len,
            rule=rule,
            on_step=on_step,
        )


@contextmanager
def _no_dropout(model: torch.nn.Module) -> Iterator[None]:
    rates = {module: module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    for module in rates:
        module.p = 0.0
    try:
        yield
    finally:
        for module, rate in rates.items():
            module.p = rate


def _collate(pairs: Sequence[ReferredPair], pad_id: int) -> Batch:
    """Return a micro-batch: all chosen sides, then all rejected ones, and the reference's margin of each pair."""
    sides = [item.pair.chosen for item in pairs] + [item.pair.rejected for item in pairs]
    return collate(sides, pad_id) | {"reference_margin": torch.tensor([item.chosen - item.rejected for item in pairs])}


def _loss(beta: float, model: Any, batch: Batch) -> torch.Tensor:
    chosen, rejected = response_log_probs(model, batch).chunk(2)
    return -logsigmoid(beta * (chosen - rejected - batch["reference_margin"])).sum()
