"""One client's optimiser steps: the loss, the client rule and the reports are given to it.

A loop of our own, not a library's trainer: a step is to cost what its mathematics costs. transformers' Trainer and
trl's pad a batch to its longest row, make logits at every position and metrics on every step, and take seconds to
import, which every `client train` would pay. trl's are the oracles of the tests.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

from fedcli.algos import ClientRule
from fedcli.model.base import has_bfloat16
from fedcli.model.library_logging import quiet_libraries
from fedcli.model.lora import AdaptedModel
from fedcli.training.batches import LARGEST, OVERHEAD, Item, cut
from fedcli.training.reports import StepReport, TrainSettings

Batch = dict[str, torch.Tensor]


class CountedItem(Item, Protocol):
    """What the trainer must know of a row."""

    @property
    def num_tokens(self) -> int:
        """The tokens that a forward pass over it sees."""


ItemT = TypeVar("ItemT", bound=CountedItem)


def fit(
    adapted: AdaptedModel,
    items: Sequence[ItemT],
    settings: TrainSettings,
    *,
    collate: Callable[[Sequence[ItemT]], Batch],
    loss: Callable[[Any, Batch], torch.Tensor],
    divisor: Callable[[Sequence[ItemT]], int],
    rule: ClientRule | None,
    on_step: Callable[[StepReport], None],
) -> list[float]:
    """Train the adapter in place, one optimiser step for every `batch_size` items; return the losses of the steps.

    A step's loss is the sum of `loss(model, micro-batch)` over the batch's micro-batches, over `divisor(batch)`:
    neither it nor its gradient depends on how the batch is cut.
    """
    model, parameters = adapted.base, list(adapted.parameters.values())
    device, has_autocast = model.device, has_bfloat16()
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=device.type == "cuda"
    )
    own = [] if rule is None else [torch.tensor(rule.arrays[name], device=device) for name in adapted.parameters]
    losses: list[float] = []
    torch.manual_seed(settings.seed)  # of dropout
    optimizer.zero_grad()  # what another client's training left that broke off
    adapted.model.train()
    with quiet_libraries(), _checkpointing(model, settings.gradient_checkpointing):
        for start in range(0, len(items), settings.batch_size):
            batch = items[start : start + settings.batch_size]
            num_parts = divisor(batch)
            total = torch.zeros((), device=device)
            parts = cut(
                batch, size=settings.micro_batch_size, overhead=OVERHEAD[device.type], largest=LARGEST[device.type]
            )
            for part in parts:
                inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in collate(part).items()}
                with torch.autocast(device.type, torch.bfloat16, enabled=has_autocast):
                    share = loss(model, inputs) / num_parts
                share.backward()  # type: ignore[no-untyped-call]  # torch's annotations
                total += share.detach()
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            _step(optimizer, parameters, rule, own, settings.learning_rate)
            losses.append(total.item())
            on_step(StepReport(len(losses), losses[-1], sum(item.num_tokens for item in batch)))
    return losses


@torch.no_grad()
def _step(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    rule: ClientRule | None,
    own: Sequence[torch.Tensor],
    learning_rate: float,
) -> None:
    """Make an optimiser step, with the client rule's terms for clipped gradients and, after it, for weights."""
    if rule is not None:
        for parameter, array in zip(parameters, own, strict=True):
            term = rule.gradient_term(parameter, array)
            if term is not None and parameter.grad is not None:
                parameter.grad.add_(term)
    optimizer.step()
    optimizer.zero_grad()
    if rule is not None:
        for parameter, array in zip(parameters, own, strict=True):
            term = rule.weight_term(array, learning_rate)
            if term is not None:
                parameter.add_(term)


@contextmanager
def _checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    """Keep only layers' inputs for the backward pass inside the block, and compute the rest again."""
    if not wanted:
        yield
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
