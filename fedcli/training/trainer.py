"""One client's optimiser steps: the task with its loss, the client rule and the reports are given to it.

A loop of our own, not a library's trainer: a step is to cost what its mathematics costs. transformers' Trainer and
trl's pad a batch to its longest row, make logits at every position and metrics on every step, and take seconds to
import, which every `client train` would pay. trl's are the oracles of the tests.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fedcli.algos import ClientRule
from fedcli.data.encoded import EncodedRow
from fedcli.model.library_logging import quiet_libraries
from fedcli.model.likelihood import IGNORED, collate, response_log_probs, supervised_cross_entropy
from fedcli.model.loading import has_bfloat16
from fedcli.model.lora import AdaptedModel
from fedcli.tasks import Likelihood, Task
from fedcli.training.batches import LARGEST, OVERHEAD, cut
from fedcli.training.limits import TimeLimit
from fedcli.training.moments import Moments
from fedcli.training.reports import StepReport, TrainSettings
from fedcli.training.rule_terms import RuleTerms
from fedcli.training.work import RoundWork


@dataclass(frozen=True)
class StepGradient:
    """What is told of a gradient that lies in the parameters; the loss is None for a batch without rows."""

    loss: float | None
    num_tokens: int


def train_round(work: RoundWork) -> list[float]:
    """Train a round's rows as `fit` does: what a task's `trainer` names, where the task names no other."""
    return fit(
        work.adapted,
        work.rows,
        work.task,
        work.settings,
        batch_rows=work.batch_rows,
        rule=work.rule,
        limit=work.limit,
        moments=work.moments,
        on_step=work.on_step,
    )


def fit(
    adapted: AdaptedModel,
    rows: Sequence[EncodedRow],
    task: Task,
    settings: TrainSettings,
    *,
    batch_rows: Sequence[EncodedRow] = (),
    rule: ClientRule | None = None,
    limit: TimeLimit | None = None,
    moments: Moments | None = None,
    on_step: Callable[[StepReport], None],
) -> list[float]:
    """Train the adapter in place, one optimiser step for every `batch_size` rows; return the losses of the steps.

    A `limit` may stop it before; AdamW goes on from `moments`, and leaves them as they are then.
    `batch_rows` are what the task's hook of this name made of the batches, end to end.
    A step's loss is the mean of the task's loss over the supervised tokens or the rows of its batch: neither it nor
    its gradient depends on how the batch is cut into micro-batches.
    """
    steps = _plain_steps(adapted, rows, task, settings, batch_rows)
    losses = optimise(adapted, steps, task, settings, rule=rule, limit=limit, moments=moments, on_step=on_step)
    return [loss for loss in losses if loss is not None]


def optimise(
    adapted: AdaptedModel,
    steps: Iterator[StepGradient],
    task: Task,
    settings: TrainSettings,
    *,
    rule: ClientRule | None,
    dropout_seed: int | None = None,
    limit: TimeLimit | None = None,
    moments: Moments | None = None,
    on_step: Callable[[StepReport], None],
) -> list[float | None]:
    """Make an optimiser step for each gradient that `steps` leaves in the adapter's parameters; return the losses.

    The iterator runs in training mode, with the parameters that are trained requiring gradients. `dropout_seed` takes
    the place of the settings' seed.
    """
    for name, parameter in adapted.parameters.items():  # one that is frozen has no gradient, and so makes no step
        parameter.requires_grad_(rule is None or rule.trains(name))
    model, parameters = adapted.base, list(adapted.parameters.values())
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=model.device.type == "cuda"
    )
    if moments is not None:
        moments.load(optimizer, adapted.parameters)
    terms = RuleTerms(adapted, rule)
    losses: list[float | None] = []
    torch.manual_seed(settings.seed if dropout_seed is None else dropout_seed)
    optimizer.zero_grad()  # what another client's training left that broke off
    adapted.start_training(has_dropout=task.has_dropout, has_checkpointing=settings.gradient_checkpointing)
    if limit is not None:
        limit.begin()
    with quiet_libraries(), _checkpointing(model, settings.gradient_checkpointing):
        for step in steps:
            terms.add_to_gradients()
            optimizer.step()
            optimizer.zero_grad()
            terms.add_to_weights(settings.learning_rate)
            losses.append(step.loss)
            on_step(StepReport(len(losses), step.loss, step.num_tokens))
            if limit is not None and limit.is_over(len(losses)):
                break
    if moments is not None:
        moments.keep(optimizer, adapted.parameters)
    return losses


def micro_batches(
    adapted: AdaptedModel, rows: Sequence[EncodedRow], settings: TrainSettings, *, most: int | None = None
) -> list[list[EncodedRow]]:
    """Return rows in micro-batches, as the settings say and the device bears, of `most` rows at most."""
    device = adapted.base.device.type
    parts = cut(rows, size=settings.micro_batch_size, overhead=OVERHEAD[device], largest=LARGEST[device])
    if most is None:
        return parts
    return [part[start : start + most] for part in parts for start in range(0, len(part), most)]


def loss_of(
    adapted: AdaptedModel, part: Sequence[EncodedRow], task: Task, arguments: Mapping[str, Any]
) -> torch.Tensor:
    """Return the sum of a task's loss over a micro-batch's rows, or their supervised tokens."""
    with torch.autocast(adapted.base.device.type, torch.bfloat16, enabled=has_bfloat16()):
        assert task.loss is not None, f"task {task.name} is trained otherwise"
        return task.loss(likelihood_of(adapted.base, part, adapted.pad_id), **arguments)


@torch.no_grad()
def mean_loss(adapted: AdaptedModel, rows: Sequence[EncodedRow], task: Task, settings: TrainSettings) -> float:
    """Return a task's mean loss over rows, or their supervised tokens, without dropout; no task with batch terms."""
    adapted.model.eval()
    num_parts = len(rows) if task.mean_over == "rows" else sum(row.num_supervised for row in rows)
    parts = micro_batches(adapted, rows, settings)
    return sum(loss_of(adapted, part, task, settings.hyperparameters).item() for part in parts) / num_parts


def _plain_steps(
    adapted: AdaptedModel,
    rows: Sequence[EncodedRow],
    task: Task,
    settings: TrainSettings,
    batch_rows: Sequence[EncodedRow],
) -> Iterator[StepGradient]:
    """Leave the clipped gradient of one batch after another in the parameters."""
    model, parameters = adapted.base, list(adapted.parameters.values())
    device, has_autocast = model.device, has_bfloat16()
    for start in range(0, len(rows), settings.batch_size):
        batch = rows[start : start + settings.batch_size]
        num_parts = len(batch) if task.mean_over == "rows" else sum(row.num_supervised for row in batch)
        total = torch.zeros((), device=device)
        parts = micro_batches(adapted, batch, settings)
        arguments: dict[str, Any] = {**settings.hyperparameters}
        if task.batch_terms is not None:
            others = batch_rows[start : start + settings.batch_size]
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=has_autocast):
                said = [
                    likelihood_of(model, part, adapted.pad_id)
                    for part in micro_batches(adapted, others or batch, settings)
                ]
                whole = Likelihood(*(torch.cat(tensors, -1) for tensors in zip(*said, strict=True)))
                arguments |= task.batch_terms(whole, **settings.hyperparameters)
        for part in parts:
            share = loss_of(adapted, part, task, arguments) / num_parts
            share.backward()  # type: ignore[no-untyped-call]  # torch's annotations
            total += share.detach()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        yield StepGradient(total.item(), sum(row.num_tokens for row in batch))


def likelihood_of(model: Any, rows: Sequence[EncodedRow], pad_id: int) -> Likelihood:
    """Return what the model says of a micro-batch: all first sides in one forward pass with all second ones."""
    sides = [side for sides in zip(*(row.sides for row in rows), strict=True) for side in sides]
    inputs = collate(sides, pad_id)
    inputs["reference"] = torch.tensor([row.reference for row in rows], dtype=torch.float64).T
    inputs["numbers"] = torch.tensor([row.numbers for row in rows], dtype=torch.float32).T
    inputs = {name: tensor.to(model.device, non_blocking=True) for name, tensor in inputs.items()}
    losses, positions = supervised_cross_entropy(model, inputs)
    log_probs = response_log_probs(losses, positions, len(sides))
    num_tokens = (inputs["labels"][:, 1:] != IGNORED).sum(1)
    return Likelihood(
        token_losses=losses,
        log_probs=log_probs.view(-1, len(rows)),
        num_tokens=num_tokens.view(-1, len(rows)),
        reference=inputs["reference"],
        numbers=inputs["numbers"],
    )


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
