"""Training against oracles: trl's trainer, a loop written by hand in torch, and plain forward passes.

The built-in model is small enough that every number here is a real one, and float32 on one thread.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import TARGETS, adapter_parameters, examples_of, farthest, make_config, make_model, same_bits, sides
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fedcli.algos import Array, Arrays
from fedcli.data.demo import demo_rows
from fedcli.data.encoded import EncodedRow
from fedcli.data.encoding import Encoder
from fedcli.data.templates import alpaca
from fedcli.model import likelihood
from fedcli.model.base import find_base
from fedcli.model.likelihood import IGNORED, supervised_logits
from fedcli.model.lora import AdaptedModel, start_adapter
from fedcli.tasks import SFT
from fedcli.tasks.conversation import Example, instruct
from fedcli.training.moments import Moments
from fedcli.training.reports import StepReport, TrainSettings
from fedcli.training.trainer import fit

LONGER = (
    instruct("Give the alert level.", "green, because the bank soars and the fund climbs after the quarterly report"),
    instruct("Tell a story of a wet harbour and a long night, with an island and the wind.", "The storm howls."),
    instruct("Name it", "red"),
)


@pytest.fixture(scope="module")
def adapted() -> AdaptedModel:
    return make_model()


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    return [*examples_of(demo_rows(0)["train"][::97]), *LONGER]


@pytest.fixture(scope="module")
def encoded(adapted: AdaptedModel, rows: list[Example]) -> list[EncodedRow]:
    """Rows of different lengths; none is cut."""
    found = Encoder(adapted.tokenizer).encode(rows, 512)
    assert found.num_truncated == found.left_out.total() == 0
    assert len({row.num_tokens for row in found}) > 5
    return list(found)


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


def train(
    adapted: AdaptedModel, start: Arrays, examples: list[EncodedRow], **changes: Any
) -> tuple[list[float], dict[str, Array], list[StepReport]]:
    """Train from `start`; return the losses, the adapter and what was told after each step."""
    values = {"batch_size": 8, "learning_rate": 1e-3, "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 0} | changes
    settings = TrainSettings(**{"micro_batch_size": values["batch_size"], "gradient_checkpointing": False, **values})
    reports: list[StepReport] = []
    adapted.load(start)
    losses = fit(adapted, examples, SFT, settings, on_step=reports.append)
    return losses, adapted.values(), reports


def gradients_of(adapted: AdaptedModel, run: Any) -> dict[str, torch.Tensor]:
    """Return the gradients of the one backward pass that `run` makes, before they are clipped."""
    gradients: dict[str, torch.Tensor] = {}
    hooks = [
        parameter.register_hook(lambda gradient, name=name: gradients.update({name: gradient.clone()}))
        for name, parameter in adapter_parameters(adapted).items()
    ]
    run()
    for hook in hooks:
        hook.remove()
    return gradients


# The oracle


def test_loss_gradients_ids_and_labels_are_those_of_trls_trainer(
    adapted: AdaptedModel, start: Arrays, rows: list[Example], encoded: list[EncodedRow], tmp_path: Path
) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    losses: list[float] = []
    ours = gradients_of(adapted, lambda: losses.extend(train(adapted, start, encoded, batch_size=len(encoded))[0]))
    other = make_model()
    other.load(start)
    columns = [{"prompt": alpaca(row.prompt[0].text), "completion": " " + row.response} for row in rows]
    trainer = SFTTrainer(
        model=other.model,
        processing_class=other.tokenizer,
        train_dataset=Dataset.from_list(columns),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=len(rows),
            completion_only_loss=True,
            max_length=512,
            bf16=False,
            activation_checkpointing=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
    )
    (batch,) = trainer.get_train_dataloader()
    whole = batch["attention_mask"].bool()
    theirs = {
        (tuple(ids[mask].tolist()), tuple(labels[mask].tolist()))
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], whole, strict=True)
    }
    assert theirs == {
        (tuple(row.ids.tolist()), tuple(np.where(row.supervised, row.ids, IGNORED).tolist())) for row in sides(encoded)
    }
    their_gradients = gradients_of(other, trainer.train)
    assert losses == pytest.approx([trainer.state.log_history[0]["loss"]], rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in their_gradients.values())
    assert min(float(gradient.abs().max()) for gradient in their_gradients.values()) > 1e-5
    assert farthest(ours, their_gradients) <= 1e-5 * largest


def test_three_steps_are_those_of_a_loop_written_by_hand(
    adapted: AdaptedModel, start: Arrays, encoded: list[EncodedRow]
) -> None:
    batches = [encoded[0:2], encoded[2:4], encoded[4:6]]
    losses, adapter, _ = train(
        adapted, start, [row for batch in batches for row in batch], batch_size=2, max_grad_norm=0.5
    )
    other = make_model()
    other.load(start)
    parameters = adapter_parameters(other)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.0)
    expected, norms = [], []
    for batch in batches:
        # One row at a time and unpadded: the mean over the batch's tokens is then the sum over their number.
        conversations = sides(batch)
        num_tokens = sum(len(row.ids) - row.prompt_length for row in conversations)
        loss = torch.zeros(())
        for row in conversations:
            ids = torch.tensor(row.ids.astype(np.int64))
            logits = other.model(ids[None]).logits[0, row.prompt_length - 1 : -1]
            loss = loss + torch.nn.functional.cross_entropy(logits, ids[row.prompt_length :], reduction="sum")
        (loss / num_tokens).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item() / num_tokens)
    assert max(norms) > 0.5  # clipping was at work
    assert losses == pytest.approx(expected, rel=1e-5)
    assert farthest(adapter, other.values()) <= 1e-5


@pytest.mark.parametrize("micro_batch_size", [4, 2, 1, None])
def test_micro_batches_change_neither_losses_nor_adapter(
    adapted: AdaptedModel, start: Arrays, encoded: list[EncodedRow], micro_batch_size: int | None
) -> None:
    examples = (encoded * 4)[:24]
    losses, adapter, _ = train(adapted, start, examples)
    cut_losses, cut_adapter, _ = train(adapted, start, examples, micro_batch_size=micro_batch_size)
    assert len(losses) == 3
    assert cut_losses == pytest.approx(losses, rel=1e-5)
    assert farthest(adapter, cut_adapter) <= 1e-5


def test_weight_decay_and_clipping_reach_the_optimiser(
    adapted: AdaptedModel, start: Arrays, encoded: list[EncodedRow]
) -> None:
    _, plain, _ = train(adapted, start, encoded[:8], max_grad_norm=1e9)
    _, decayed, _ = train(adapted, start, encoded[:8], max_grad_norm=1e9, weight_decay=0.5)
    # AdamW (Loshchilov & Hutter 2019) takes lr x decay x w off, beside the gradient's step.
    shrunk = {name: plain[name] - np.float32(1e-3 * 0.5) * start[name] for name in plain}
    assert farthest(shrunk, decayed) <= 1e-6


# Logits of the supervised positions


def tiny_models() -> dict[str, torch.nn.Module]:
    small = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**small, **heads)),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
        # A cap this low bends every logit, so a path around it would show.
        "gemma2": Gemma2ForCausalLM(
            Gemma2Config(**small, **heads, head_dim=8, final_logit_softcapping=0.01, sliding_window=8)
        ),
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_supervised_logits_are_the_rows_of_the_full_ones(name: str) -> None:
    model = tiny_models()[name].eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 61, (3, 12), generator=generator)
    labels = ids.clone()
    labels[0, :5] = labels[1, :1] = labels[2, :11] = labels[1, 8:] = IGNORED
    with torch.no_grad():
        full = model(input_ids=ids).logits
        few, targets = supervised_logits(model, ids, labels)
        again = model(input_ids=ids).logits
    positions = [(row, at) for row in range(3) for at in range(11) if labels[row, at + 1] != IGNORED]
    assert few.shape == (len(positions), 61)
    assert targets.tolist() == [labels[row, at + 1].item() for row, at in positions]
    expected = torch.stack([full[row, at] for row, at in positions])
    torch.testing.assert_close(few, expected, rtol=0, atol=1e-6)
    assert torch.equal(again, full)  # the hook is gone
    if name == "gemma2":
        uncapped = copy.deepcopy(model)
        uncapped.config.final_logit_softcapping = None
        assert float(few.abs().max()) <= 0.01 < float(uncapped(input_ids=ids).logits.detach().abs().max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_large_logits_give_the_losses_and_gradients_of_torchs_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    values = (4 * torch.randn(23, 61, generator=generator)).to(dtype)
    targets = torch.randint(0, 61, (23,), generator=generator)
    outer = torch.rand(23, generator=generator)
    found = []
    for large in (10**9, 0):
        monkeypatch.setattr(likelihood, "LARGE_LOGITS", large)
        monkeypatch.setattr(likelihood, "PIECE", 5 * 61)
        logits = values.clone().requires_grad_()
        losses = likelihood.token_losses(logits, targets)
        (losses * outer).sum().backward()
        found.append((losses.detach(), logits.grad))
    (losses, gradient), (in_pieces, pieces_gradient) = found
    assert in_pieces.dtype == torch.float32
    torch.testing.assert_close(in_pieces, losses, rtol=0, atol=1e-6)
    torch.testing.assert_close(pieces_gradient, gradient, rtol=tolerance, atol=tolerance)


# Seeds, state and reports


def test_the_seed_decides_the_dropout_bit_for_bit(start: Arrays, encoded: list[EncodedRow]) -> None:
    adapted = make_model(dropout=0.1)
    _, one, _ = train(adapted, start, encoded[:8], batch_size=2, seed=5)
    _, same, _ = train(adapted, start, encoded[:8], batch_size=2, seed=5)
    _, other, _ = train(adapted, start, encoded[:8], batch_size=2, seed=6)
    assert same_bits(one, same)
    assert farthest(one, other) > 1e-5


def test_a_model_that_has_trained_others_trains_as_a_fresh_one(start: Arrays, encoded: list[EncodedRow]) -> None:
    shared = make_model(dropout=0.1)
    clients = [encoded[:4], encoded[4:8]]
    after_others = [train(shared, start, rows, batch_size=2, seed=client)[1] for client, rows in enumerate(clients)]
    fresh = [train(make_model(dropout=0.1), start, rows, batch_size=2, seed=k)[1] for k, rows in enumerate(clients)]
    assert all(same_bits(one, other) for one, other in zip(after_others, fresh, strict=True))


def test_training_changes_the_adapter_and_no_weight_of_the_base(
    adapted: AdaptedModel, start: Arrays, encoded: list[EncodedRow]
) -> None:
    def base() -> dict[str, torch.Tensor]:
        return {name: value for name, value in adapted.model.state_dict().items() if ".lora_" not in name}

    before = {name: value.clone() for name, value in base().items()}
    _, adapter, _ = train(adapted, start, encoded[:8])
    assert all(torch.equal(before[name], value) for name, value in base().items())
    assert all(not np.array_equal(adapter[name], start[name]) for name in start)


def test_every_step_tells_its_number_loss_and_tokens(
    adapted: AdaptedModel, start: Arrays, encoded: list[EncodedRow]
) -> None:
    losses, _, reports = train(adapted, start, encoded[:6], batch_size=2, micro_batch_size=1)
    lengths = [row.num_tokens for row in encoded[:6]]
    tokens = [sum(lengths[at : at + 2]) for at in (0, 2, 4)]
    assert reports == [StepReport(n + 1, losses[n], tokens[n]) for n in range(3)]


# Adapters in and out


def test_an_adapter_comes_out_as_it_went_in(adapted: AdaptedModel, start: Arrays) -> None:
    adapted.load(start)
    values = adapted.values()
    assert same_bits(values, start)
    next(iter(values.values()))[:] = 7  # a copy: the model does not see this
    assert same_bits(adapted.values(), start)


def test_an_adapter_with_other_names_is_an_error(adapted: AdaptedModel, start: dict[str, Array]) -> None:
    name = next(iter(start))
    lacking = {key: value for key, value in start.items() if key != name}
    for wrong in (lacking, start | {"stranger": start[name]}):
        with pytest.raises(KeyError, match="adapter names differ"):
            adapted.load(wrong)


def test_an_adapter_with_another_shape_is_an_error(adapted: AdaptedModel, start: dict[str, Array]) -> None:
    name = next(iter(start))
    for wrong in (start[name][:1], start[name].T.copy()):  # the first would broadcast in silence
        with pytest.raises((RuntimeError, ValueError, KeyError)):
            adapted.load(start | {name: wrong})


def test_a_fresh_adapter_changes_nothing_and_follows_its_seed() -> None:
    folder = find_base("builtin:tiny", revision=None, root=Path.cwd())
    first, same, other = (
        start_adapter(folder, make_config(), seed=seed, trust_remote_code=False)[0] for seed in (1, 1, 2)
    )
    assert same_bits(first, same)
    assert len(first) == 2 * len(TARGETS) * 2  # A and B of three matrices in each of two layers
    for name, array in first.items():
        if ".lora_B." in name:
            assert not array.any()
        else:
            assert not np.array_equal(array, other[name])
            bound = 1 / np.sqrt(array.shape[1])  # kaiming_uniform_(a=sqrt(5)), as in PEFT
            assert 0.9 * bound < abs(array).max() <= bound


def test_adamw_goes_on_from_kept_moments_as_if_it_had_not_stopped(adapted, encoded, start):
    whole, moments = train(adapted, start, encoded[:16])[1], Moments()
    settings = TrainSettings(
        batch_size=8,
        micro_batch_size=8,
        learning_rate=1e-3,
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        seed=0,
    )
    values = start
    for rows in (encoded[:8], encoded[8:16]):
        adapted.load(values)
        fit(adapted, rows, SFT, settings, moments=moments, on_step=lambda _: None)
        values = adapted.values()
    assert same_bits(values, whole)
    assert {array.item() for name, array in moments.arrays.items() if name.startswith("steps.")} == {2.0}
    assert not same_bits(train(adapted, train(adapted, start, encoded[:8])[1], encoded[8:16])[1], whole)
