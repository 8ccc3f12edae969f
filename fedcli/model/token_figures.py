"""What a model says of each supervised token: its log-probability, and those of all words that could stand there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedcli.data.encoded import EncodedExample
from fedcli.model.likelihood import IGNORED, PIECE, collate, supervised_logits
from fedcli.model.loading import has_bfloat16
from fedcli.model.lora import AdaptedModel
from fedcli.model.padding import cheapest_parts

OVERHEAD = 64
"""What a further batch costs, in tokens."""
LARGEST = 4096
"""Padded tokens of a batch."""


@dataclass(frozen=True)
class TokenFigures:
    """Of one text's supervised tokens, in their order."""

    log_probs: NDArray[np.float64]
    means: NDArray[np.float64]
    """Of the log-probability of a word that the model draws at the token's place."""
    deviations: NDArray[np.float64]
    """And its standard deviation."""
    is_likeliest: NDArray[np.bool_]
    """Whether greedy decoding writes the token, behind the text before it."""


def token_figures(adapted: AdaptedModel, examples: Sequence[EncodedExample]) -> Iterator[tuple[int, TokenFigures]]:
    """Yield each text's place and figures under the model as it is, batch after batch of like length."""
    model = adapted.base
    adapted.model.eval()
    order = sorted(range(len(examples)), key=lambda place: len(examples[place].ids))
    lengths = [len(examples[place].ids) for place in order]
    for part in cheapest_parts(lengths, overhead=OVERHEAD, largest=LARGEST):
        places = order[part.start : part.stop]
        batch = collate([examples[place] for place in places], adapted.pad_id)
        labels = batch["labels"].to(model.device)
        # the trainer's precision
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=has_bfloat16()):
            logits, targets = supervised_logits(model, batch["input_ids"].to(model.device), labels)
        found = _figures(logits, targets)
        ends = (batch["labels"][:, 1:] != IGNORED).sum(dim=1).cumsum(0).tolist()
        for place, start, end in zip(places, [0, *ends], ends, strict=False):
            first, second, third, fourth = (array[start:end] for array in found)
            yield place, TokenFigures(first, second, third, fourth.astype(np.bool_))


def _figures(logits: torch.Tensor, targets: torch.Tensor) -> tuple[NDArray[np.float64], ...]:
    """Return log p of the targets, mean and deviation of all words' log p, and whether targets are likeliest."""
    columns: list[torch.Tensor] = []
    step = max(1, PIECE // max(1, logits.shape[1]))
    for start in range(0, len(targets), step):
        log_probs = logits[start : start + step].float().log_softmax(1)
        places = targets[start : start + step, None]
        probs = log_probs.exp()
        mean = (probs * log_probs).sum(1)
        variance = (probs * (log_probs - mean[:, None]) ** 2).sum(1)
        likeliest = log_probs.argmax(1) == places[:, 0]
        columns.append(torch.stack([log_probs.gather(1, places)[:, 0], mean, variance.sqrt(), likeliest.float()]))
    joined = torch.cat(columns, dim=1) if columns else logits.new_zeros((4, 0))
    return tuple(joined.double().cpu().numpy())
