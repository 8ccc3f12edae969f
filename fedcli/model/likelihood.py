"""The likelihood that a causal language model gives to responses; logits are made at their positions only."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from fedcli.data.encoded import EncodedExample, EncodedRow
from fedcli.model.loading import has_bfloat16
from fedcli.model.lora import AdaptedModel
from fedcli.model.output_head import logits_at

IGNORED = -100
"""The label of a token that is not supervised."""
LARGE_LOGITS = 2**25
"""Numbers; above, their cross-entropy is computed in pieces of PIECE numbers."""
PIECE = 2**22


def collate(examples: Sequence[EncodedExample], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad examples on the right to the longest: input_ids and labels, each (examples, length).

    There is no attention mask: to what stands right of a token a causal model pays no attention, so that padding
    changes nothing, and without a mask attention takes its fastest path.
    """
    shape = (len(examples), max(len(example.ids) for example in examples))
    input_ids = torch.full(shape, pad_id)
    labels = torch.full(shape, IGNORED)
    for row, example in enumerate(examples):
        ids = torch.from_numpy(example.ids)
        input_ids[row, : len(ids)] = ids
        labels[row, : len(ids)] = ids.long().masked_fill(~torch.from_numpy(example.supervised), IGNORED)
    return {"input_ids": input_ids, "labels": labels}


def supervised_cross_entropy(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return -log p of every supervised token, float32, and the row of the batch that it belongs to."""
    labels = inputs["labels"]
    logits, targets = supervised_logits(model, inputs["input_ids"], labels)
    rows = (labels[:, 1:] != IGNORED).nonzero()[:, 0]
    return token_losses(logits, targets), rows


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return -log p of each target, float32; logits: (targets, words), of any float type.

    Large logits are gone through in pieces, and what is kept for the backward pass is one tensor of their size and
    type, the gradient: torch's own keeps two of float32, and makes two more.
    """
    if logits.numel() <= LARGE_LOGITS:
        return cross_entropy(logits.float(), targets, reduction="none")
    losses: torch.Tensor = _InPieces.apply(logits, targets)  # type: ignore[no-untyped-call]  # torch's annotations
    return losses


class _InPieces(torch.autograd.Function):
    """Cross-entropy of a few rows at a time; its gradient, softmax - one at the target, is made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses = logits.new_empty(len(targets), dtype=torch.float32)
        gradient = torch.empty_like(logits)
        num_rows = max(1, PIECE // logits.shape[1])
        for start in range(0, len(targets), num_rows):
            part = slice(start, start + num_rows)
            log_probs = logits[part].float().log_softmax(1)
            places = targets[part, None]
            losses[part] = -log_probs.gather(1, places)[:, 0]
            gradient[part] = log_probs.exp_().scatter_add_(1, places, log_probs.new_full(places.shape, -1.0))
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0][:, None].to(gradient.dtype), None


def response_log_probs(losses: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return the log-probability of every row's response, (rows,), of what `supervised_cross_entropy` returned."""
    return losses.new_zeros(num_rows).index_add(0, rows, -losses)


def reference_log_probs(adapted: AdaptedModel, rows: Sequence[EncodedRow]) -> Iterator[tuple[float, ...]]:
    """Yield, row by row, the log-probabilities that the model as it is gives to its responses, a pair's chosen first.

    Without dropout, and one row at a time, so that its figures do not depend on its neighbours in a batch.
    """
    model = adapted.base
    adapted.model.eval()
    for row in rows:
        batch = collate(row.sides, adapted.pad_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        # Trainer's precision, so that before the first step policy and reference agree
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=has_bfloat16()):
            log_probs = response_log_probs(*supervised_cross_entropy(model, batch), len(row.sides))
        yield tuple(log_probs.tolist())


def supervised_logits(
    model: torch.nn.Module, input_ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of the positions that predict a supervised token, (tokens, words), and their labels.

    input_ids and labels: (batch, length), a label IGNORED where the token is not supervised.
    """
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != IGNORED
    return logits_at(model, predicts, input_ids=input_ids), labels[:, 1:][predicts[:, :-1]]
