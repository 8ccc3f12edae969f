"""DP-SGD in the training loop, against gradients that autograd makes of one row at a time."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.models import examples_of, farthest, make_model, preference

from fedcli.algos import Array
from fedcli.data.demo import demo_rows
from fedcli.data.encoded import EncodedRow
from fedcli.data.encoding import Encoder
from fedcli.model.lora import AdaptedModel, lora_config
from fedcli.tasks import DPO, SFT, Task
from fedcli.tasks.conversation import instruct
from fedcli.training import dp_sgd
from fedcli.training.dp_sgd import Protection
from fedcli.training.reports import TrainSettings
from fedcli.training.trainer import loss_of

SHORT = ("Name it", "Say no", "Which one?", "Red or green?", "Tell the colour of the long wet harbour, please, now.")
ANSWERS = ("red", "no, for it is late", "the last one", "green", "grey as the bank after the quarterly report")


def start_of(adapted: AdaptedModel) -> dict[str, Array]:
    """Return an adapter whose B is not zero: with B zero the gradient of A is zero."""
    generator = np.random.default_rng(7)
    return {
        name: generator.normal(0, 0.1, tuple(parameter.shape)).astype(np.float32)
        for name, parameter in adapted.parameters.items()
    }


def model_of(rank: int = 4, targets: Sequence[str] = ("q_proj", "v_proj", "down_proj")) -> AdaptedModel:
    from support.models import TINY

    config = lora_config(rank=rank, alpha=8, dropout=0.0, target_modules=targets, base=None)
    return AdaptedModel(TINY, config, trust_remote_code=False)


@pytest.fixture(scope="module")
def adapted() -> AdaptedModel:
    return make_model()


def rows_of(adapted: AdaptedModel, task: Task) -> list[EncodedRow]:
    """Return rows of different lengths, some of demo's."""
    if task is SFT:
        items = [instruct(ask, answer) for ask, answer in zip(SHORT, ANSWERS, strict=True)]
        return list(Encoder(adapted.tokenizer).encode([*items, *examples_of(demo_rows(0)["train"][::400])], 512))
    items = [preference(ask, ANSWERS[i], ANSWERS[(i + 1) % 5]) for i, ask in enumerate(SHORT)]
    encoded = Encoder(adapted.tokenizer).encode(items, 512)
    return [EncodedRow(row.sides, row.numbers, (-9.0 - i, -11.0)) for i, row in enumerate(encoded)]


def settings_of(**changes: Any) -> TrainSettings:
    values = {
        **{"batch_size": 4, "micro_batch_size": None, "learning_rate": 1e-3, "weight_decay": 0.0},
        **{"max_grad_norm": 1e-9, "gradient_checkpointing": False, "seed": 0},
    }
    return TrainSettings(**values | changes)


def expected_sum(
    adapted: AdaptedModel, units: Sequence[Sequence[EncodedRow]], task: Task, clip: float, **arguments: float
) -> dict[str, torch.Tensor]:
    """Return the sum of clipped gradients by autograd, unpadded, one row at a time."""
    total = {name: torch.zeros_like(each, dtype=torch.float64) for name, each in adapted.parameters.items()}
    parameters = adapted.parameters
    for unit in units:
        summed = {name: torch.zeros_like(each, dtype=torch.float64) for name, each in parameters.items()}
        for row in unit:
            loss = loss_of(adapted, [row], task, arguments)
            loss = loss / (1 if task.mean_over == "rows" else row.num_supervised)
            for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                summed[name] += gradient.double()
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in summed.values()))
        for name, gradient in summed.items():
            total[name] += gradient * min(1.0, clip / norm)
    return total


def gradient_of(
    adapted: AdaptedModel, units: Sequence[Sequence[EncodedRow]], task: Task, clip: float, **changes: Any
) -> dict[str, torch.Tensor]:
    """Return B times the gradient of one private step that practically has no noise."""
    settings = settings_of(**changes)
    gradients = {}
    for batch_step in dp_sgd_steps(adapted, [units], task, settings, Protection(clip, 1e-9 / clip)):
        assert batch_step.loss is not None
        gradients = {name: each.grad.double() * settings.batch_size for name, each in adapted.parameters.items()}
    return gradients


def dp_sgd_steps(adapted, batches, task, settings, protection) -> Iterator[Any]:
    """Yield after each step's gradient, in the state that training has."""
    from fedcli.training.trainer import _checkpointing

    adapted.start_training(has_dropout=False, has_checkpointing=settings.gradient_checkpointing)
    with _checkpointing(adapted.base, settings.gradient_checkpointing):
        yield from dp_sgd._private_steps(adapted, iter(batches), task, settings, protection)


def prepared(adapted: AdaptedModel) -> AdaptedModel:
    adapted.load(start_of(adapted))
    for parameter in adapted.parameters.values():
        parameter.requires_grad_()
        parameter.grad = None
    return adapted


def largest(gradients: dict[str, torch.Tensor]) -> float:
    return max(float(gradient.abs().max()) for gradient in gradients.values())


def norm_of(gradients: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


@pytest.mark.parametrize("task", [SFT, DPO], ids=["sft", "dpo"])
@pytest.mark.parametrize("grouping", [[1] * 5, [2, 1, 2]], ids=["rows", "groups"])
def test_the_clipped_sum_is_that_of_one_row_at_a_time(adapted: AdaptedModel, task: Task, grouping: list[int]) -> None:
    rows = iter(rows_of(prepared(adapted), task))
    units = [[next(rows) for _ in range(number)] for number in grouping]
    arguments = {"beta": 0.1} if task is DPO else {}
    norms = [norm_of(expected_sum(adapted, [unit], task, 1e9, **arguments)) for unit in units]
    for clip in (1e9, float(np.median(norms))):
        expected = expected_sum(adapted, units, task, clip, **arguments)
        found = gradient_of(adapted, units, task, clip, hyperparameters=arguments)
        assert largest(expected) > 1e-6
        assert farthest(found, expected) <= 1e-5 * largest(expected)
