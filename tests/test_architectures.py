"""Bases of many architectures, by default LoRA's usual layers: their losses are those of transformers' plain models.

Each is a tiny random base of the architecture's own configuration, with its own dropouts on. A client trains a step of
each of two rounds; each loss is computed again of the merged weights, W + (alpha / r) B A, row by row and so without
padding, by a plain `AutoModelForCausalLM` in evaluation mode. The merged model that is exported gives the same logits.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.architectures import KINDS, make
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedcli import Federation
from fedcli.data.encoding import Encoder
from fedcli.model.library_logging import quiet_libraries
from fedcli.model.loading import load_tokenizer
from fedcli.tasks.conversation import Preference, Turn, instruct

ROWS = [
    {"instruction": "Give the alert level.", "input": "the bank soars", "output": "green"},
    {"instruction": "Tell a story of a wet harbour.", "input": "", "output": "The storm howls, and the wind climbs."},
    {"instruction": "Name it", "input": "", "output": "red"},
]
PAIRS = [
    {"prompt": row["instruction"], "chosen": row["output"], "rejected": f"not {row['output']} at all"[: 9 + 4 * number]}
    for number, row in enumerate(ROWS)
]
BETA, RANK, ALPHA = 0.5, 4, 8
IN_DEFAULT_SUITE = "opt"
"""Its dropout is no module, it drops whole layers, and its positions come from the attention mask."""


def create(folder: Path, base: Path, task: str, **more: object) -> Federation:
    """Make a federation of one client, whose step sees all rows."""
    rows = folder.with_name(f"{task}.jsonl")
    rows.write_text("".join(json.dumps(row) + "\n" for row in (ROWS if task == "sft" else PAIRS)))
    settings = {
        "task": task, "model.base": str(base), "data.source": str(rows), "adapter.rank": RANK, "adapter.alpha": ALPHA,
        "adapter.dropout": 0.0 if task == "sft" else 0.2, "train.steps": 1, "train.batch_size": len(ROWS),
        "train.learning_rate": 0.02, "train.max_length": 128, "train.beta": BETA, "federation.clients": 1,
        "federation.rounds": 2,
    }  # fmt: skip
    return Federation.create(folder, preset="defaults", settings=settings | more)


def merge(base: Path, adapter: dict[str, np.ndarray] | None) -> PreTrainedModel:
    """Return transformers' plain model, with an adapter added to its weights by hand."""
    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if hasattr(model.config, "rescale_every"):
        model.config.rescale_every = 0
    modules = dict(model.named_modules())
    for name in adapter or ():
        if ".lora_A." in name:
            product = torch.tensor(adapter[name.replace("lora_A", "lora_B")] @ adapter[name]) * (ALPHA / RANK)
            module = modules[name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")]
            module.weight.data += product.T if isinstance(module, Conv1D) else product
    return model


@torch.no_grad()
def losses_of(model: PreTrainedModel, encoded: list[Any]) -> list[list[tuple[float, int]]]:
    """Return -log p of each side of each row, and its number of tokens: of all logits, one row at a time."""
    found = []
    for row in encoded:
        sides = []
        for side in row.sides:
            ids = torch.tensor(side.ids.astype(np.int64))[None]
            labels = ids[0].masked_fill(~torch.tensor(side.supervised), -100)[1:]
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
            sides.append((float(cross_entropy(logits.double(), labels, reduction="sum")), int((labels >= 0).sum())))
        found.append(sides)
    return found


def sft_loss(model: PreTrainedModel, encoded: list[Any]) -> float:
    losses = [side for row in losses_of(model, encoded) for side in row]
    return sum(loss for loss, _ in losses) / sum(number for _, number in losses)


def dpo_loss(model: PreTrainedModel, reference: PreTrainedModel, encoded: list[Any]) -> float:
    rows = zip(losses_of(model, encoded), losses_of(reference, encoded), strict=True)
    margins = [(before[0][0] - now[0][0]) - (before[1][0] - now[1][0]) for now, before in rows]
    return float(-logsigmoid(BETA * torch.tensor(margins, dtype=torch.float64)).mean())


def first_losses(federation: Federation) -> Iterator[tuple[dict[str, np.ndarray], float]]:
    """Let the client train the open round and merge it, twice; yield what each started from, and its first loss."""
    for _ in range(2):
        adapter = dict(federation.round().adapter())
        training = federation.client(0).train().training
        assert training is not None
        federation.server.aggregate()
        yield adapter, training.losses[0]


def check(kind: str, folder: Path) -> None:
    base = make(folder / "base", kind)
    tokenizer = load_tokenizer(base, trust_remote_code=False)
    encoder = Encoder(tokenizer, "alpaca")
    examples = list(encoder.encode([instruct(row["instruction"], row["output"], row["input"]) for row in ROWS], 128))
    preferences = [Preference((Turn("user", row["prompt"]),), row["chosen"], row["rejected"]) for row in PAIRS]
    pairs = list(encoder.encode(preferences, 128))
    assert len({row.length for row in examples}) == len({side.ids.size for row in pairs for side in row.sides}) / 2 == 3
    plain = merge(base, None)

    federation = create(folder / "sft", base, "sft")
    settings = json.loads((folder / "sft/rounds/00000/adapter/adapter_config.json").read_text())
    assert settings["target_modules"] == KINDS[kind][1]
    for number, (adapter, loss) in enumerate(first_losses(federation)):
        assert loss == pytest.approx(sft_loss(merge(base, adapter), examples), abs=1e-5), number
        if number:
            assert abs(loss - sft_loss(plain, examples)) > 1e-3
            assert all(float(np.abs(array).max()) > 0 for array in adapter.values()), (
                "each layer that is adapted learns"
            )

    for number, (adapter, loss) in enumerate(first_losses(create(folder / "dpo", base, "dpo"))):
        assert loss == pytest.approx(dpo_loss(merge(base, adapter), plain, pairs), abs=1e-5), number
        if number == 0:
            assert loss == pytest.approx(np.log(2), abs=1e-6)
        else:
            assert abs(loss - np.log(2)) > 1e-3

    federation.export(folder / "out", merge=True)
    last = load_file(folder / "sft/rounds/00002/adapter/adapter_model.safetensors")
    ids = torch.tensor(examples[0].sides[0].ids.astype(np.int64))[None]
    with torch.no_grad():
        expected = merge(base, last)(input_ids=ids).logits
        found = merge(folder / "out", None)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(folder / "out").get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    "kind", [kind if kind == IN_DEFAULT_SUITE else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_losses_and_the_merged_model_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    check(kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sft", "dpo"])
@pytest.mark.parametrize("kind", ["opt", "gpt2", "bloom", "mixtral", "falcon"])
def test_gradient_checkpointing_leaves_the_losses_as_they_are(kind: str, task: str, tmp_path: Path) -> None:
    base = make(tmp_path / "base", kind)
    found = []
    for wanted in (False, True):
        more: dict[str, object] = {"train.gradient_checkpointing": wanted, "adapter.dropout": 0.0}
        found.append([loss for _, loss in first_losses(create(tmp_path / str(wanted), base, task, **more))])
    assert found[1] == pytest.approx(found[0], abs=1e-5)
