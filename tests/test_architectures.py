"""Bases of many architectures, by default LoRA's usual layers: their losses are those of transformers' plain models.

Each is a tiny random base of the architecture's own configuration, with its own dropouts on. A client trains a step of
each of two rounds; each loss is computed again of the merged weights, W + (alpha / r) B A, row by row and so without
padding, by a plain `AutoModelForCausalLM` in evaluation mode. The merged model that is exported gives the same logits.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.models import TINY
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedcli import Federation
from fedcli.data.encoding import Encoder
from fedcli.model.base import load_tokenizer
from fedcli.model.library_logging import quiet_libraries
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
SIZES: dict[str, Any] = {
    "vocab_size": 900, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT: dict[str, Any] = {
    "vocab_size": 900, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS = GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
STATES = {
    "vocab_size": 900, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
QV, QKV = ["q_proj", "v_proj"], ["query_key_value"]

KINDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama": (GROUPED, QV),
    "qwen2": (GROUPED | {"attention_dropout": 0.1}, QV),
    "qwen3": (GROUPED | {"head_dim": 8}, QV),
    "qwen3_moe": (EXPERTS | {"head_dim": 8}, QV),
    "mistral": (GROUPED | {"sliding_window": 8}, QV),
    "mixtral": (GROUPED | {"num_local_experts": 4, "router_jitter_noise": 0.3}, QV),
    "gemma": (GROUPED | {"head_dim": 8}, QV),
    "gemma2": (GROUPED | {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 0.05}, QV),
    "gemma3_text": (GROUPED | {"head_dim": 8, "sliding_window": 8}, QV),
    "phi": (SIZES | {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.1}, ["fc1", "fc2", *QV]),
    "phi3": (GROUPED | {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.1}, ["qkv_proj"]),
    "gpt2": (GPT, ["c_attn"]),
    "gptj": (GPT | {"rotary_dim": 4, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}, QV),
    "gpt_neo": (
        SIZES | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8,
                 "attention_dropout": 0.1, "resid_dropout": 0.1, "embed_dropout": 0.1}, QV,
    ),
    "gpt_neox": (SIZES | {"hidden_dropout": 0.1, "attention_dropout": 0.1}, QKV),
    "gpt_bigcode": (GPT, ["c_attn"]),
    "codegen": (GPT | {"rotary_dim": 4, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}, ["qkv_proj"]),
    "opt": (
        SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.3, "activation_dropout": 0.1,
                 "attention_dropout": 0.1}, QV,
    ),
    "bloom": (SIZES | {"n_layer": 2, "n_head": 4, "hidden_dropout": 0.1, "attention_dropout": 0.1}, QKV),
    "falcon": (SIZES | {"hidden_dropout": 0.1, "attention_dropout": 0.1}, QKV),
    "mpt": (
        {"vocab_size": 900, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, "emb_pdrop": 0.1,
         "resid_pdrop": 0.1}, ["Wqkv"],
    ),
    "starcoder2": (GROUPED | {"residual_dropout": 0.1, "embedding_dropout": 0.1, "attention_dropout": 0.1}, QV),
    "stablelm": (GROUPED | {"hidden_dropout": 0.1, "attention_dropout": 0.1}, QV),
    "cohere": (GROUPED | {"logit_scale": 0.1}, QV),
    "cohere2": (GROUPED | {"sliding_window": 8}, QV),
    "granite": (GROUPED | {"logits_scaling": 3.0, "attention_dropout": 0.1}, QV),
    "granitemoe": (GROUPED | {"num_local_experts": 4}, QV),
    "olmo": (GROUPED, QV),
    "olmo2": (GROUPED, QV),
    "olmoe": (EXPERTS | {"attention_dropout": 0.1}, QV),
    "smollm3": (GROUPED, QV),
    "glm": (GROUPED | {"head_dim": 8, "attention_dropout": 0.1}, QV),
    "glm4": (GROUPED | {"head_dim": 8}, QV),
    "glm4_moe": (GROUPED | {"head_dim": 8, "n_routed_experts": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
                            "num_experts_per_tok": 2}, QV),
    "nemotron": (GROUPED | {"hidden_dropout": 0.1}, QV),
    "deepseek_v3": (
        SIZES | LATENT | {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
                 "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16},
        ["kv_a_proj_with_mqa", "kv_b_proj", "q_a_proj", "q_b_proj"],
    ),
    "persimmon": (SIZES | {"hidden_dropout": 0.1, "attention_dropout": 0.1}, QKV),
    "gpt_oss": (GROUPED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
                "attention_dropout": 0.1}, QV),
    "ernie4_5": (GROUPED, QV),
    "exaone4": (GROUPED | {"sliding_window": 8, "sliding_window_pattern": 2}, QV),
    "jamba": (GROUPED | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4,
              "use_mamba_kernels": False}, QV),
    "lfm2": (GROUPED | {"layer_types": ["conv", "full_attention"]}, QV),
    "mamba": (STATES, ["in_proj"]),
    "mamba2": (STATES | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}, ["in_proj"]),
    "rwkv": (
        {"vocab_size": 900, "hidden_size": 32, "num_hidden_layers": 3, "rescale_every": 1, "context_length": 128,
         "bos_token_id": 1, "eos_token_id": 2}, ["key", "output", "receptance", "value"],
    ),
}  # fmt: skip
IN_DEFAULT_SUITE = "opt"
"""Its dropout is no module, it drops whole layers, and its positions come from the attention mask."""


def make(folder: Path, kind: str, **changes: Any) -> Path:
    """Save a random tiny base with the built-in tokenizer; its weights are large enough that dropout would show."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**KINDS[kind][0] | changes)
    with quiet_libraries():
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "conv" not in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder / name)
    return folder


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
    pairs = list(
        encoder.encode([Preference((Turn("user", row["prompt"]),), row["chosen"], row["rejected"]) for row in PAIRS], 128)
    )
    assert len({row.length for row in examples}) == len({side.ids.size for row in pairs for side in row.sides}) / 2 == 3
    plain = merge(base, None)

    federation = create(folder / "sft", base, "sft")
    settings = json.loads((folder / "sft/rounds/00000/adapter/adapter_config.json").read_text())
    assert settings["target_modules"] == KINDS[kind][1]
    for number, (adapter, loss) in enumerate(first_losses(federation)):
        assert loss == pytest.approx(sft_loss(merge(base, adapter), examples), abs=1e-5), number
        if number:
            assert abs(loss - sft_loss(plain, examples)) > 1e-3
            assert all(float(np.abs(array).max()) > 0 for array in adapter.values()), "each layer that is adapted learns"

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
