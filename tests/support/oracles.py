"""One training step of fedcli, and of a trainer of trl: the loss and the gradients of both."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedcli.algos import Array, Arrays
from fedcli.data.encoded import EncodedRow
from fedcli.model.likelihood import reference_log_probs
from fedcli.model.lora import AdaptedModel, start_adapter
from fedcli.tasks import Task
from fedcli.training.reports import TrainSettings
from fedcli.training.trainer import fit
from support.models import TINY, adapter_parameters, make_config


def noisy_adapter(seed: int) -> dict[str, Array]:
    """Return an adapter that changes the model."""
    arrays, _ = start_adapter(TINY, make_config(), seed=seed, trust_remote_code=False)
    generator = np.random.default_rng(seed)
    return {
        name: generator.normal(0, 0.1, array.shape).astype(np.float32) if ".lora_B." in name else array
        for name, array in arrays.items()
    }


def gradients_of(adapted: AdaptedModel, run: Callable[[], Any]) -> dict[str, torch.Tensor]:
    """Return the adapter's gradients of the one backward pass that `run` makes, before they are clipped."""
    gradients: dict[str, torch.Tensor] = {}
    parameters = {name: p for name, p in adapter_parameters(adapted).items() if ".ref." not in name}  # trl's own
    hooks = [
        parameter.register_hook(lambda gradient, name=name: gradients.update({name: gradient.clone()}))
        for name, parameter in parameters.items()
    ]
    run()
    for hook in hooks:
        hook.remove()
    return gradients


def train_step(
    adapted: AdaptedModel,
    start: Arrays,
    rows: Sequence[EncodedRow],
    task: Task,
    batch_rows: Sequence[EncodedRow] = (),
    **hyperparameters: float,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Make one step over one batch of all rows; return its loss and its gradients."""
    settings = TrainSettings(
        batch_size=len(rows), micro_batch_size=len(rows), learning_rate=1e-3, weight_decay=0.0,
        max_grad_norm=1.0, gradient_checkpointing=False, seed=0, hyperparameters=hyperparameters,
    )  # fmt: skip
    losses: list[float] = []
    adapted.load(start)

    def run() -> None:
        losses.extend(fit(adapted, rows, task, settings, batch_rows=batch_rows, on_step=lambda report: None))

    gradients = gradients_of(adapted, run)
    return losses[0], gradients


def refer(adapted: AdaptedModel, reference: Arrays, rows: Sequence[EncodedRow]) -> list[EncodedRow]:
    """Return rows with the log-probabilities that a reference gives to them."""
    adapted.load(reference)
    log_probs = list(reference_log_probs(adapted, rows))
    return [replace(row, reference=found) for row, found in zip(rows, log_probs, strict=True)]


def one_step_of_trl(num_rows: int, folder: Path, **others: Any) -> dict[str, Any]:
    """Return what the arguments of trl's trainers have in common: one step over one batch, on a CPU."""
    return {
        **{"output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": num_rows, "max_length": 512},
        **{"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "dataloader_pin_memory": False},
        **{"report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True},
        **others,
    }
