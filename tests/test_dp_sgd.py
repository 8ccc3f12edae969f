"""DP-SGD in the training loop, against gradients that autograd makes of one row at a time."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.models import TINY, examples_of, farthest, make_model, preference

from fedcli.algos import Array
from fedcli.data.demo import demo_rows
from fedcli.data.encoded import EncodedRow
from fedcli.data.encoding import Encoder
from fedcli.errors import ConfigError
from fedcli.model.library_logging import quiet_libraries
from fedcli.model.lora import AdaptedModel, lora_config
from fedcli.tasks import DPO, SFT, Task
from fedcli.tasks.conversation import instruct
from fedcli.training import dp_sgd, row_gradients, trainer
from fedcli.training.dp_sgd import Protection, Unit, draw_units, fit_privately
from fedcli.training.reports import StepReport, TrainSettings
from fedcli.training.trainer import StepGradient, loss_of

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


def dp_sgd_steps(
    adapted: AdaptedModel,
    batches: Sequence[Sequence[Unit]],
    task: Task,
    settings: TrainSettings,
    protection: Protection,
) -> Iterator[StepGradient]:
    """Yield after each step's gradient, in the state that training has."""
    adapted.start_training(has_dropout=False, has_checkpointing=settings.gradient_checkpointing)
    with quiet_libraries(), trainer._checkpointing(adapted.base, settings.gradient_checkpointing):
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


@pytest.mark.parametrize(
    ("task", "grouping"),
    [
        pytest.param(SFT, [1] * 5, id="rows-sft"),
        pytest.param(DPO, [2, 1, 2], id="groups-dpo"),
        pytest.param(SFT, [2, 1, 2], id="groups-sft", marks=pytest.mark.slow),
        pytest.param(DPO, [1] * 5, id="rows-dpo", marks=pytest.mark.slow),
    ],
)
def test_the_clipped_sum_is_that_of_one_row_at_a_time(adapted: AdaptedModel, task: Task, grouping: list[int]) -> None:
    check_sum(prepared(adapted), task, grouping)


@pytest.mark.slow
@pytest.mark.parametrize("task", [SFT, DPO], ids=["sft", "dpo"])
@pytest.mark.parametrize("rank", [1, 64])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("grouping", [[1] * 5, [3, 1, 1], [5]], ids=str)
def test_the_clipped_sum_holds_for(
    task: Task, rank: int, micro_batch_size: int | None, checkpointing: bool, grouping: list[int]
) -> None:
    adapted = prepared(model_of(rank, ("q_proj", "k_proj", "o_proj", "down_proj", "up_proj")))
    check_sum(adapted, task, grouping, micro_batch_size=micro_batch_size, gradient_checkpointing=checkpointing)


def check_sum(adapted: AdaptedModel, task: Task, grouping: list[int], **changes: Any) -> None:
    rows = iter(rows_of(adapted, task))
    units = [[next(rows) for _ in range(number)] for number in grouping]
    arguments = {"beta": 0.1} if task is DPO else {}
    norms = [norm_of(expected_sum(adapted, [unit], task, 1e9, **arguments)) for unit in units]
    for clip in (1e9, float(np.median(norms))):
        expected = expected_sum(adapted, units, task, clip, **arguments)
        found = gradient_of(adapted, units, task, clip, hyperparameters=arguments, **changes)
        assert largest(expected) > 1e-6
        assert farthest(found, expected) <= 1e-5 * largest(expected)


def test_short_rows_of_a_large_rank_are_summed_by_gram_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = prepared(model_of(64, ("q_proj", "v_proj")))
    made = []
    original = row_gradients._Ghost.squared_norms
    monkeypatch.setattr(row_gradients._Ghost, "squared_norms", lambda self: made.append(1) or original(self))
    items = [instruct(ask, answer) for ask, answer in zip(SHORT, ANSWERS, strict=True)]
    rows = [[row] for row in Encoder(adapted.tokenizer).encode(items, 512)]
    expected = expected_sum(adapted, rows, SFT, 0.5)
    found = gradient_of(adapted, rows, SFT, 0.5)
    assert made
    assert farthest(found, expected) <= 1e-5 * largest(expected)


@pytest.mark.parametrize("fault", [pytest.param("sees_rows", marks=pytest.mark.slow), "mixes_rows"])
def test_a_model_whose_rows_cannot_be_told_apart_goes_through_units_one_by_one(
    adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(dp_sgd, fault, lambda _: fault == "mixes_rows")
    check_sum(prepared(adapted), SFT, [2, 1, 2])


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_the_norm_is_of_trained_factors_alone(adapted: AdaptedModel, frozen: str) -> None:
    rows = [[row] for row in rows_of(prepared(adapted), SFT)[:4]]
    for name, parameter in adapted.parameters.items():
        parameter.requires_grad_(frozen not in name)
    settings = settings_of()
    (_,) = dp_sgd_steps(adapted, [rows[:1]], SFT, settings, Protection(1e-3, 1e-9))
    found = {name: each.grad * 4 for name, each in adapted.parameters.items() if each.grad is not None}
    assert all(frozen not in name for name in found)
    assert norm_of(found) == pytest.approx(1e-3, rel=1e-5)


def test_a_gradient_that_is_not_finite_adds_nothing(adapted: AdaptedModel) -> None:
    rows = [[row] for row in rows_of(prepared(adapted), DPO)]
    broken = [EncodedRow(rows[0][0].sides, (), (math.nan, 0.0))]
    honest = gradient_of(adapted, rows[1:], DPO, 0.1, hyperparameters={"beta": 0.1})
    found = gradient_of(prepared(adapted), [broken, *rows[1:]], DPO, 0.1, hyperparameters={"beta": 0.1})
    assert farthest(found, honest) <= 1e-7


def test_one_rows_gradient_does_not_depend_on_who_is_beside_it(adapted: AdaptedModel) -> None:
    """A row more moves the sum by the clip at most, whatever it holds."""
    rows = [[row] for row in rows_of(prepared(adapted), SFT)]
    whole = gradient_of(adapted, rows, SFT, 0.3)
    for left_out in range(len(rows)):
        others = rows[:left_out] + rows[left_out + 1 :]
        without = gradient_of(prepared(adapted), others, SFT, 0.3)
        moved = norm_of({name: whole[name] - without[name] for name in whole})
        assert moved <= 0.3 * (1 + 1e-4)


def test_noise_has_deviation_z_times_clip_over_the_batch_size_whoever_was_drawn(adapted: AdaptedModel) -> None:
    settings = settings_of(batch_size=5)
    rows = [[row] for row in rows_of(prepared(adapted), SFT)[:3]]
    drawn: list[torch.Tensor] = []
    for _ in dp_sgd_steps(adapted, [[], [], rows], SFT, settings, Protection(0.5, 200.0)):
        drawn.append(torch.cat([each.grad.flatten() for each in adapted.parameters.values()]).double())
    first, second, third = drawn
    for each in (first, second, third):  # of rows there is at most 3 x 0.5 / 5
        assert float(each.std()) == pytest.approx(200.0 * 0.5 / 5, rel=5 / math.sqrt(len(each)))
        assert abs(float(each.mean())) < 5 * 20 / math.sqrt(len(each))
    assert abs(float((first * second).mean())) < 5 * 400 / math.sqrt(len(first))
    assert not torch.equal(first, second)


def test_an_empty_batch_is_a_step_that_moves_the_weights_by_noise(adapted: AdaptedModel) -> None:
    rows = [[row] for row in rows_of(prepared(adapted), SFT)[:2]]
    before = adapted.values()
    reports: list[StepReport] = []
    losses = fit_privately(adapted, iter([[], rows]), SFT, settings_of(), Protection(1.0, 1.0), on_step=reports.append)
    assert (len(losses), [report.step for report in reports]) == (1, [1, 2])
    assert (reports[0].loss, reports[0].num_tokens) == (None, 0)
    assert min(float(abs(after - before[name]).min()) for name, after in adapted.values().items()) > 0


def test_two_trainings_of_one_seed_differ(adapted: AdaptedModel) -> None:
    made = []
    for _ in range(2):
        fit_privately(prepared(adapted), iter([[]]), SFT, settings_of(), Protection(1.0, 1.0), on_step=lambda _: None)
        made.append(adapted.values())
    assert farthest(*made) > 1e-5


def test_units_are_drawn_independently_by_their_chance() -> None:
    num_units, q, num_draws = 2000, 0.03, 400
    drawn = np.zeros((num_draws, num_units), bool)
    for number in range(num_draws):
        drawn[number, draw_units(num_units, q)] = True
    sizes = drawn.sum(1)
    deviation = math.sqrt(num_units * q * (1 - q))  # of a binomial number
    assert abs(sizes.mean() - num_units * q) < 5 * deviation / math.sqrt(num_draws)
    assert sizes.std() == pytest.approx(deviation, rel=5 / math.sqrt(2 * num_draws))
    counts = drawn.sum(0)
    chi_square = ((counts - num_draws * q) ** 2).sum() / (num_draws * q * (1 - q))
    assert abs(chi_square - num_units) < 5 * math.sqrt(2 * num_units)
    together = (drawn[:, :-1] & drawn[:, 1:]).mean()
    assert together == pytest.approx(q * q, rel=5 / math.sqrt(num_draws * num_units * q * q))
    assert draw_units(3, 1.0).tolist() == [0, 1, 2]


def test_a_task_with_terms_of_a_whole_batch_is_refused(adapted: AdaptedModel) -> None:
    task = replace(SFT, batch_terms=lambda likelihood: {})
    with pytest.raises(ConfigError, match="terms of a whole batch"):
        fit_privately(adapted, iter([]), task, settings_of(), Protection(1.0, 1.0), on_step=lambda _: None)


def test_no_more_rows_are_kept_at_once_than_the_bound(adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    num_numbers = sum(parameter.numel() for parameter in adapted.parameters.values())
    monkeypatch.setitem(dp_sgd.MOST_NUMBERS, "cpu", 2 * num_numbers)
    most = []
    original = row_gradients.Recorder.begin
    monkeypatch.setattr(
        row_gradients.Recorder,
        "begin",
        lambda self, scale, **others: (most.append(len(scale)), original(self, scale, **others)),
    )
    check_sum(prepared(adapted), SFT, [1] * 5)
    assert max(most) == 2
