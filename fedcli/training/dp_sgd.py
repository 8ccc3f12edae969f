"""DP-SGD (Abadi et al. 2016, 1607.00133): steps that hide whether one unit, a row or a group of rows, was there.

Each unit is in a step's batch by chance q, by itself (Poisson sampling): q = min(1, B / units), where B is the batch
size. The gradient is (sum of the units' gradients, each clipped to the norm C, + N(0, (z C)^2)) / B; AdamW and a client
rule take it as any other. A row's loss is the mean over its own supervised tokens (or the row's, for a task whose loss
is a mean over rows): what other rows are there changes nothing of it. Draws, noise and dropout come from the operating
system's randomness, never from federation.seed, which is public.
"""

import math
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from fedcli.algos import ClientRule
from fedcli.data.encoded import EncodedRow
from fedcli.errors import ConfigError
from fedcli.model.lora import AdaptedModel
from fedcli.privacy.noise import NoiseStream, new_key
from fedcli.tasks import Task
from fedcli.tasks.task import LOOP
from fedcli.training.moments import Moments
from fedcli.training.reports import StepReport, TrainSettings
from fedcli.training.row_gradients import Recorder, mixes_rows, recording, sees_rows
from fedcli.training.trainer import StepGradient, loss_of, micro_batches, optimise

Unit: TypeAlias = Sequence[EncodedRow]
"""What is hidden as a whole: one row, or all rows of a group."""
MOST_NUMBERS = {"cpu": 2**26, "cuda": 2**28}
"""Of all gradients that are kept row by row at once, by the kind of device; one row's are always kept."""


@dataclass(frozen=True)
class Protection:
    """How steps are protected: the norm C that a unit's gradient is clipped to, and the noise multiplier z."""

    clip: float
    noise: float


def draw_units(num_units: int, q: float) -> NDArray[np.int64]:
    """Return the units of one batch: each is drawn by chance q, rounded down to a multiple of 2^-64."""
    if q >= 1:
        return np.arange(num_units)
    words = np.frombuffer(os.urandom(8 * num_units), np.uint64)
    return np.flatnonzero(words < np.uint64(math.floor(q * 2.0**64)))


def check_task(task: Task) -> None:
    """Raise ConfigError for a task whose loss mixes the rows of a batch: no row's share of it is bounded."""
    if task.trainer != LOOP:
        raise ConfigError(
            f"task {task.name} marks each answer of the model by the others to its prompt, and a step's answers depend "
            "on all steps before: privacy.unit row or group bounds each row by itself, and cannot do so here",
            hint="Set privacy.unit to client or null, or choose a task whose loss is a sum over rows: sft, dpo.",
        )
    if not task.is_row_by_row:
        raise ConfigError(
            f"task {task.name} computes terms of a whole batch, and privacy.unit row or group bounds each by itself",
            hint="Set privacy.unit to client or null, or choose a task whose loss is a sum over rows: sft, dpo, orpo.",
        )


def fit_privately(
    adapted: AdaptedModel,
    batches: Iterator[Sequence[Unit]],
    task: Task,
    settings: TrainSettings,
    protection: Protection,
    *,
    rule: ClientRule | None = None,
    moments: Moments | None = None,
    on_step: Callable[[StepReport], None],
) -> list[float]:
    """Train the adapter in place, one optimiser step for every batch, empty ones too; return the losses of the others.

    The settings' max_grad_norm is not applied: each unit's gradient is clipped already. `moments` are of noisy
    gradients alone.
    """
    check_task(task)
    steps = _private_steps(adapted, batches, task, settings, protection)
    seed = secrets.randbits(63)
    losses = optimise(adapted, steps, task, settings, rule=rule, dropout_seed=seed, moments=moments, on_step=on_step)
    return [loss for loss in losses if loss is not None]


def _private_steps(
    adapted: AdaptedModel,
    batches: Iterator[Sequence[Unit]],
    task: Task,
    settings: TrainSettings,
    protection: Protection,
) -> Iterator[StepGradient]:
    """Leave the noisy gradient of one batch after another in the parameters."""
    noise = NoiseStream(new_key())
    trained = {name: parameter for name, parameter in adapted.parameters.items() if parameter.requires_grad}
    total = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    add = _Adder(adapted, task, settings, protection.clip, total)
    for batch in batches:
        for gradient in total.values():
            gradient.zero_()
        loss = add.batch(batch)
        for name, parameter in trained.items():
            drawn = torch.from_numpy(noise.normal(tuple(parameter.shape)) * (protection.noise * protection.clip))
            noisy = (total[name].double().cpu() + drawn) / settings.batch_size
            parameter.grad = noisy.to(parameter.device, parameter.dtype)
        yield StepGradient(loss, sum(row.num_tokens for unit in batch for row in unit))


class _Adder:
    """Adds the clipped gradients of a batch's units to a sum."""

    def __init__(
        self, adapted: AdaptedModel, task: Task, settings: TrainSettings, clip: float, total: dict[str, torch.Tensor]
    ) -> None:
        self._adapted, self._task, self._settings = adapted, task, settings
        self._clip, self._total = clip, total
        num_numbers = sum(gradient.numel() for gradient in total.values())
        self._most_rows = max(1, MOST_NUMBERS[adapted.base.device.type] // max(1, num_numbers))
        self._sees_rows, self._mixes_rows = sees_rows(adapted), mixes_rows(adapted)

    def batch(self, units: Sequence[Unit]) -> float | None:
        """Add a batch's units; return its loss, the mean over supervised tokens or rows, None without rows."""
        if not units:
            return None
        add = self._recorded if self._sees_rows else self._row_by_row
        loss = math.fsum(add(units))
        return loss / sum(self._num_parts(row) for unit in units for row in unit)

    def _recorded(self, units: Sequence[Unit]) -> Iterator[float]:
        """Add units by their layers' inputs and outputs; yield losses that add up to the batch's."""
        is_apart = [len(unit) == 1 and not self._mixes_rows for unit in units]
        rows = [unit[0] for unit, apart in zip(units, is_apart, strict=True) if apart]
        with recording(self._adapted) as recorder:
            for part in micro_batches(self._adapted, rows, self._settings, most=self._most_rows):
                yield self._backward(recorder, part, is_together=False)
                recorder.add_clipped(self._clip, self._total)
            for unit in (unit for unit, apart in zip(units, is_apart, strict=True) if not apart):
                for part in micro_batches(self._adapted, unit, self._settings):
                    yield self._backward(recorder, part, is_together=True)
                recorder.add_clipped(self._clip, self._total)

    def _backward(self, recorder: Recorder, part: Sequence[EncodedRow], *, is_together: bool) -> float:
        scale = torch.tensor([self._scale(row) for row in part], device=self._adapted.base.device)
        recorder.begin(scale, num_sides=len(part[0].sides), is_together=is_together)
        loss = loss_of(self._adapted, part, self._task, self._settings.hyperparameters)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's annotations
        return loss.item()

    def _row_by_row(self, units: Sequence[Unit]) -> Iterator[float]:
        """Add units by a backward pass for each row: it holds for whatever is trained."""
        trained = {name: self._adapted.parameters[name] for name in self._total}
        for unit in units:
            for parameter in trained.values():
                parameter.grad = None
            for row in unit:
                loss = loss_of(self._adapted, [row], self._task, self._settings.hyperparameters)
                (loss * self._scale(row)).backward()  # type: ignore[no-untyped-call]  # torch's annotations
                yield loss.item()
            gradients = {name: each.grad.detach() for name, each in trained.items() if each.grad is not None}
            norm = torch.stack([gradient.double().square().sum() for gradient in gradients.values()]).sum().sqrt()
            if norm.isfinite():
                for name, gradient in gradients.items():
                    self._total[name].add_(gradient, alpha=min(1.0, self._clip / max(norm.item(), 1e-300)))

    def _num_parts(self, row: EncodedRow) -> int:
        return 1 if self._task.mean_over == "rows" else max(1, row.num_supervised)

    def _scale(self, row: EncodedRow) -> float:
        return 1 / self._num_parts(row)
