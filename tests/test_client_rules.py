"""What clients do beside plain training, against loops written by hand in torch: full batches, one row at a time."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import (
    adapter_parameters,
    examples_of,
    farthest,
    make_config,
    make_model,
    preference,
    same_bits,
    sides,
)
from torch.nn.functional import logsigmoid

import fedcli.tasks
from fedcli.algos import Array, Arrays, ClientRule
from fedcli.algos.client_rule import ControlVariate, Proximal
from fedcli.data.demo import demo_preferences, demo_rows
from fedcli.data.encoded import EncodedExample, EncodedRow
from fedcli.data.encoding import Encoder
from fedcli.model.base import find_base
from fedcli.model.lora import AdaptedModel, start_adapter
from fedcli.tasks import DPO, SFT
from fedcli.training.reports import TrainSettings
from fedcli.training.trainer import fit

LEARNING_RATE = 1e-3
MAX_GRAD_NORM = 0.05
"""So low that every step of these tests is clipped."""
BATCH_SIZE = 8
NUM_STEPS = 3
BETA = 1.0


def log_prob(model: Any, row: EncodedExample) -> torch.Tensor:
    """Return the log-probability of one response, from full logits, without padding."""
    ids = torch.tensor(row.ids.astype(np.int64))
    log_probs = model(ids[None]).logits[0, :-1].log_softmax(-1)
    return log_probs[torch.arange(len(ids) - 1), ids[1:]][row.prompt_length - 1 :].sum()


def sft_loss(model: Any, trained: Sequence[EncodedRow]) -> torch.Tensor:
    rows = sides(trained)
    return -sum(log_prob(model, row) for row in rows) / sum(len(row.ids) - row.prompt_length for row in rows)


def dpo_loss(model: Any, rows: Sequence[EncodedRow]) -> torch.Tensor:
    losses = []
    for row in rows:
        chosen, rejected = (
            log_prob(model, side) - reference for side, reference in zip(row.sides, row.reference, strict=True)
        )
        losses.append(-logsigmoid(BETA * (chosen - rejected)))
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class Task:
    """One of the two tasks: its rows, its loss by hand, and fedcli's training."""

    definition: fedcli.tasks.Task
    rows: list[EncodedRow]
    loss: Callable[[Any, Sequence[Any]], torch.Tensor]

    def train(
        self, adapted: AdaptedModel, start: Arrays, rule: ClientRule | None = None, **changes: Any
    ) -> tuple[list[float], dict[str, Array]]:
        """Train from `start` with fedcli; return the losses and the adapter."""
        values = {
            "batch_size": BATCH_SIZE, "micro_batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE,
            "weight_decay": 0.0, "max_grad_norm": MAX_GRAD_NORM, "gradient_checkpointing": False, "seed": 0,
            "hyperparameters": {"beta": BETA} if self.definition is DPO else {},
        }  # fmt: skip
        settings = TrainSettings(**(values | changes))
        adapted.load(start)
        losses = fit(adapted, self.rows, self.definition, settings, rule=rule, on_step=lambda report: None)
        return losses, adapted.values()

    def by_hand(
        self,
        adapted: AdaptedModel,
        start: Arrays,
        *,
        mu: float = 0.0,
        before: bool = False,
        drift: dict[str, Array] | None = None,
    ) -> dict[str, Array]:
        """Train from `start` in a plain loop; `before`: the proximal term is clipped with the gradient."""
        adapted.load(start)
        adapted.model.train()
        parameters = adapter_parameters(adapted)
        x = {name: torch.tensor(array) for name, array in start.items()}
        optimizer = torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE, weight_decay=0.0)
        for at in range(0, len(self.rows), BATCH_SIZE):
            optimizer.zero_grad()
            self.loss(adapted.model, self.rows[at : at + BATCH_SIZE]).backward()
            if before:
                add_proximal(parameters, x, mu)
            assert float(torch.nn.utils.clip_grad_norm_(parameters.values(), MAX_GRAD_NORM)) > 1.5 * MAX_GRAD_NORM
            if not before:
                add_proximal(parameters, x, mu)
            optimizer.step()
            with torch.no_grad():
                for name, parameter in parameters.items():
                    if drift is not None:
                        parameter -= LEARNING_RATE * torch.tensor(drift[name])
        optimizer.zero_grad()
        return adapted.values()


def add_proximal(parameters: dict[str, torch.nn.Parameter], x: dict[str, torch.Tensor], mu: float) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.grad += mu * (parameter - x[name])


@pytest.fixture(scope="module")
def adapted() -> AdaptedModel:
    return make_model()


@pytest.fixture(scope="module")
def start() -> dict[str, Array]:
    """An adapter whose B is not zero: with B zero the gradient of A is zero, and nothing would be compared."""
    folder = find_base("builtin:tiny", revision=None, root=Path.cwd())
    arrays, _ = start_adapter(folder, make_config(), seed=3, trust_remote_code=False)
    generator = np.random.default_rng(0)
    return {
        name: generator.normal(0, 0.1, array.shape).astype(np.float32) if ".lora_B." in name else array
        for name, array in arrays.items()
    }


@pytest.fixture(scope="module")
def drift(start: dict[str, Array]) -> dict[str, Array]:
    """A correction c - c_k."""
    generator = np.random.default_rng(1)
    return {name: generator.normal(0, 1, array.shape).astype(np.float32) for name, array in start.items()}


@pytest.fixture(scope="module", params=["sft", "dpo"])
def task(request: pytest.FixtureRequest, adapted: AdaptedModel) -> Task:
    encoder = Encoder(adapted.tokenizer)
    step = 1200 // (BATCH_SIZE * NUM_STEPS)
    if request.param == "sft":
        examples = examples_of(demo_rows(0)["train"][::step])
        return Task(SFT, list(encoder.encode(examples, 512)), sft_loss)
    rows = [preference(row["prompt"], row["chosen"], row["rejected"]) for row in demo_preferences(0)["train"][::step]]
    generator = np.random.default_rng(2)
    referred = [
        replace(pair, reference=tuple(generator.uniform(-4, -1, 2).tolist())) for pair in encoder.encode(rows, 512)
    ]
    return Task(DPO, referred, dpo_loss)


# Client rules


@pytest.mark.parametrize("micro_batch_size", [BATCH_SIZE, 2])
def test_the_proximal_term_is_added_once_a_step_after_clipping_and_before_adamw(
    adapted: AdaptedModel, start: dict[str, Array], task: Task, micro_batch_size: int
) -> None:
    mu = 2.0
    assert len(task.rows) == BATCH_SIZE * NUM_STEPS
    _, trained = task.train(adapted, start, Proximal(start, mu), micro_batch_size=micro_batch_size)
    expected = task.by_hand(adapted, start, mu=mu)
    assert farthest(trained, expected) <= 1e-6
    assert farthest(trained, task.by_hand(adapted, start, mu=mu, before=True)) > 1e-4
    assert farthest(trained, task.by_hand(adapted, start)) > 1e-4
    # One term for every micro-batch would be this one:
    assert farthest(trained, task.by_hand(adapted, start, mu=4 * mu)) > 1e-4


@pytest.mark.parametrize("micro_batch_size", [BATCH_SIZE, 2])
def test_the_control_variate_moves_the_weights_after_each_step_by_the_learning_rate(
    adapted: AdaptedModel, start: dict[str, Array], drift: dict[str, Array], task: Task, micro_batch_size: int
) -> None:
    _, trained = task.train(adapted, start, ControlVariate(drift), micro_batch_size=micro_batch_size)
    assert farthest(trained, task.by_hand(adapted, start, drift=drift)) <= 1e-6
    plain = task.by_hand(adapted, start)
    assert farthest(trained, plain) > 1e-3
    # It is no correction of the end alone: the gradients of the second and third step see it.
    shifted = {name: plain[name] - np.float32(NUM_STEPS * LEARNING_RATE) * drift[name] for name in plain}
    assert farthest(trained, shifted) > 1e-5


def test_a_proximal_term_of_zero_is_no_rule_bit_for_bit(
    adapted: AdaptedModel, start: dict[str, Array], task: Task
) -> None:
    losses, plain = task.train(adapted, start)
    zero_losses, zero = task.train(adapted, start, Proximal(start, 0.0))
    assert losses == zero_losses
    assert same_bits(plain, zero)
    assert not same_bits(plain, task.train(adapted, start, Proximal(start, 0.1))[1])


def test_a_rule_leaves_its_own_arrays_as_they_are(
    adapted: AdaptedModel, start: dict[str, Array], drift: dict[str, Array], task: Task
) -> None:
    for rule in (Proximal(start, 1.0), ControlVariate(drift)):
        before = {name: array.copy() for name, array in rule.arrays.items()}
        task.train(adapted, start, rule)
        assert same_bits(rule.arrays, before)


# Training that broke off


def test_a_training_that_broke_off_leaves_nothing_in_the_next_ones_gradients(
    adapted: AdaptedModel, start: dict[str, Array], task: Task
) -> None:
    _, expected = task.train(adapted, start, micro_batch_size=2)
    backward, calls = torch.Tensor.backward, []

    def breaking(tensor: torch.Tensor) -> None:
        calls.append(tensor)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("in the middle of a batch")
        backward(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", breaking)
        with pytest.raises(torch.OutOfMemoryError):
            task.train(adapted, start, micro_batch_size=2)
    assert any(parameter.grad is not None for parameter in adapted.parameters.values())
    assert same_bits(task.train(adapted, start, micro_batch_size=2)[1], expected)


# Micro-batches and gradient checkpointing


@contextmanager
def layer_calls(adapted: AdaptedModel):
    """Count the forward passes through the model's decoder layers inside the block, those of a recomputation too.

    transformers checkpoints inside a layer's forward, so its parts are what runs again.
    """
    calls: list[None] = []
    layers = adapted.model.get_base_model().model.layers
    hooks = [layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(None)) for layer in layers]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def test_micro_batches_change_neither_losses_nor_adapter(
    adapted: AdaptedModel, start: dict[str, Array], task: Task
) -> None:
    task = Task(task.definition, task.rows[:16], task.loss)
    losses, adapter = task.train(adapted, start, batch_size=16, micro_batch_size=16, max_grad_norm=1.0)
    for micro_batch_size in (4, 1):
        cut_losses, cut = task.train(
            adapted, start, batch_size=16, micro_batch_size=micro_batch_size, max_grad_norm=1.0
        )
        assert cut_losses == pytest.approx(losses, rel=1e-5)
        assert farthest(adapter, cut) <= 1e-5
    assert farthest(adapter, start) > 1e-4


def test_gradient_checkpointing_computes_layers_twice_gives_the_same_adapter_and_is_off_again(
    adapted: AdaptedModel, start: dict[str, Array], task: Task
) -> None:
    num_layers = len(adapted.model.get_base_model().model.layers)
    forwards = num_layers * NUM_STEPS * 2  # two micro-batches a step
    with layer_calls(adapted) as calls:
        losses, plain = task.train(adapted, start, micro_batch_size=BATCH_SIZE // 2)
    assert len(calls) == forwards
    with layer_calls(adapted) as calls:
        again_losses, again = task.train(adapted, start, micro_batch_size=BATCH_SIZE // 2, gradient_checkpointing=True)
    assert len(calls) == 2 * forwards
    assert not any(getattr(module, "gradient_checkpointing", False) for module in adapted.model.modules())
    assert again_losses == pytest.approx(losses, rel=1e-6)
    assert farthest(plain, again) <= 1e-6
    with layer_calls(adapted) as calls:
        _, third = task.train(adapted, start, micro_batch_size=BATCH_SIZE // 2)
    assert len(calls) == forwards
    assert same_bits(plain, third)


def test_gradient_checkpointing_draws_the_same_dropout(start: dict[str, Array], task: Task) -> None:
    dropping = make_model(dropout=0.1)
    losses, plain = task.train(dropping, start)
    again_losses, again = task.train(dropping, start, gradient_checkpointing=True)
    assert again_losses == pytest.approx(losses, rel=1e-6)
    assert farthest(plain, again) <= 1e-6
    other_seed = task.train(dropping, start, seed=1)[1]
    if task.definition.name == "sft":
        assert farthest(plain, other_seed) > 1e-5
    else:  # the reference has no dropout, so DPO trains without
        assert same_bits(plain, other_seed)
        assert same_bits(plain, task.train(make_model(dropout=0.0), start)[1])
