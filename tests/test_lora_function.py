"""What a model computes beside a frozen adapter; and that `exact` keeps the mean of the clients' weights, as logits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.lora import dense
from support.models import TINY, load_plain, make_config

from fedcli import Federation
from fedcli.algos import Arrays
from fedcli.algos.lora import cut, joined
from fedcli.model.lora import AdaptedModel
from fedcli.workspace.history import Round
from fedcli.workspace.inbox import read_update
from fedcli.workspace.layout import ADAPTER_FILE

NUM_PROMPTS = 100
IDS = torch.arange(24).view(2, 12) * 7 % 500


@pytest.fixture(scope="module")
def adapted() -> AdaptedModel:
    """The built-in model with an adapter whose dropout is large."""
    return AdaptedModel(TINY, make_config(dropout=0.5), trust_remote_code=False)


def drawn(shapes: Arrays, seed: int, rank: int) -> dict[str, np.ndarray]:
    """Return random factors of a rank."""
    rng = np.random.default_rng(seed)
    sizes = {name: (rank, a.shape[1]) if "lora_A" in name else (a.shape[0], rank) for name, a in shapes.items()}
    return {name: rng.normal(scale=0.05, size=size).astype("f4") for name, size in sizes.items()}


def logits(adapted: AdaptedModel) -> torch.Tensor:
    """Return the logits of a few tokens."""
    adapted.model.eval()
    with torch.no_grad():
        return adapted.base(input_ids=IDS).logits


def test_a_frozen_adapter_adds_to_the_trained_one_as_one_of_both_ranks_does(adapted: AdaptedModel):
    start = adapted.values()
    own, frozen = drawn(start, 0, 4), drawn(start, 1, 7)
    adapted.load(own, {"base_delta": frozen})
    beside = logits(adapted)
    assert adapted.values().keys() == start.keys()
    adapted.load(joined(own, frozen))
    assert beside == pytest.approx(logits(adapted), abs=1e-5)
    adapted.load(own)
    alone = logits(adapted)
    assert (alone - beside).abs().max() > 0.01
    adapted.load(cut(own, 2))
    assert {array.shape[0] for name, array in adapted.values().items() if "lora_A" in name} == {2}
    zeros = {name: np.pad(array, [(0, full - size) for size, full in zip(array.shape, own[name].shape, strict=True)])
             for name, array in cut(own, 2).items()}  # fmt: skip
    of_two = logits(adapted)
    adapted.load(zeros)
    assert of_two == pytest.approx(logits(adapted), abs=1e-5)


def test_the_frozen_adapter_has_neither_gradients_nor_dropout(adapted: AdaptedModel):
    start = adapted.values()
    nothing = {
        name: np.zeros((4, a.shape[1]) if "lora_A" in name else (a.shape[0], 4), "f4") for name, a in start.items()
    }
    adapted.load(nothing, {"base_delta": drawn(start, 1, 4)})
    still = logits(adapted)
    adapted.start_training(has_dropout=True, has_checkpointing=False)
    loud = adapted.base(input_ids=IDS).logits
    assert loud.detach() == pytest.approx(still, abs=1e-5)
    loud.sum().backward()
    trained = {name for name, parameter in adapted.model.named_parameters() if parameter.grad is not None}
    assert trained
    assert not any("base_delta" in name for name in trained)
    adapted.load(start)
    assert not any("base_delta" in name for name, _ in adapted.model.named_parameters())


def mean_of_clients(found: Round, weights: dict[int, float]) -> dict[str, np.ndarray]:
    """Return the weighted mean of the weight changes that a round's clients ended with, dense."""
    total: dict[str, np.ndarray] = {}
    for client, weight in weights.items():
        update = read_update(found, client)
        for module, product in dense(found.with_delta(update.files[ADAPTER_FILE])).items():
            total[module] = total.get(module, 0) + weight * product
    return total


def answers(changes: dict[str, np.ndarray], scale: float, prompts: list[str]) -> list[torch.Tensor]:
    """Return the base's logits on prompts with these changes of its weights."""
    model, tokenizer = load_plain(TINY)
    model = model.double()  # so that what is seen is the stored factors' rounding alone
    with torch.no_grad():
        for module, change in changes.items():
            model.get_submodule(module).weight += torch.tensor(scale * change)
        return [model(**tokenizer(prompt, return_tensors="pt")).logits for prompt in prompts]


def apart(ours: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """Return the largest difference of any logit."""
    return max(float((one - other).abs().max()) for one, other in zip(ours, others, strict=True))


@pytest.mark.slow
def test_after_three_rounds_with_five_clients_exact_is_the_mean_of_the_clients_weights_and_factors_is_not(
    tmp_path: Path,
):
    differences = {}
    for lora in ("exact", "factors", "product"):
        settings = {
            "federation.rounds": 3,
            "train.steps": 4,
            "train.batch_size": 8,
            "adapter.rank": 4,
            "adapter.alpha": 8,
            "aggregation.lora": lora,
        } | ({"aggregation.max_rank": 48} if lora == "exact" else {})
        federation = Federation.create(tmp_path / lora, preset="demo", settings=settings)
        federation.run()
        state = Federation.open(tmp_path / lora).state
        last, before = state.head, state.round("2")
        rows = [json.loads(line) for line in (tmp_path / lora / "data/client-0.jsonl").read_text().splitlines()]
        prompts = [row["instruction"] + " " + row.get("input", "") for row in rows[:NUM_PROMPTS]]
        assert len(prompts) == NUM_PROMPTS
        weights = {entry.client: entry.weight for entry in last.manifest.aggregation.counted}
        assert len(weights) == 5
        wanted = answers(mean_of_clients(before, weights), 2.0, prompts)
        base = answers({}, 2.0, prompts)
        assert apart(wanted, base) > 0.1  # it learned
        differences[lora] = apart(answers(dense(last.whole_adapter()), 2.0, prompts), wanted)
        assert not federation.verify().violations
    print(differences)
    assert differences["exact"] < 1e-5
    assert differences["factors"] > 1e-3
    assert differences["product"] > 1e-3  # it is the best of its rank, and no adapter of this rank is the mean
