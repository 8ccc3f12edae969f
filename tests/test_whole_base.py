"""A base model whose config.json and weights do not belong together is refused, and a whole one of any kind is not."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.processes import SMALL, fedcli, settings
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fedcli.errors import RequirementError
from fedcli.model.base import find_base
from fedcli.model.inspection import inspect
from fedcli.model.library_logging import quiet_libraries
from fedcli.model.loading import load_base, load_shapes, load_whole
from fedcli.model.lora import lora_config
from fedcli.model.merged import write_merged

TINY = find_base("builtin:tiny", revision=None, root=Path.cwd())
LLAMA: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100,
}  # fmt: skip
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64}
NEOX: dict[str, Any] = {name: size for name, size in LLAMA.items() if name != "num_key_value_heads"}
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA | {"head_dim": 8},
    "mistral": LLAMA,
    "mixtral": LLAMA | {"num_local_experts": 4},
    "gemma2": LLAMA | {"head_dim": 8},
    "phi": NEOX,
    "phi3": LLAMA | {"pad_token_id": 0},
    "gpt2": GPT,
    "gptj": GPT | {"rotary_dim": 4},
    "gpt_neox": NEOX,
    "opt": NEOX | {"ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100, "state_size": 4},
}

Weights = dict[str, torch.Tensor]


def make(folder: Path, kind: str = "llama", *, is_tied: bool = False, **options: Any) -> Path:
    """Save a random tiny base."""
    config = CONFIG_MAPPING[kind](**KINDS[kind], tie_word_embeddings=is_tied)
    with quiet_libraries():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder, **options)
    return folder


def rewrite(folder: Path, change: Callable[[Weights], Weights], **config: Any) -> Path:
    """Change a base's weights and its config.json."""
    save_file(
        change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"}
    )  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def load_all(folder: Path) -> None:
    """Load a base's shapes, and its weights: they must agree on whether it is whole.

    What an inspection of the files finds wrong must be wrong; it may leave something to transformers.
    """
    suspects = [fault for fault in inspect(folder).faults if "no tokenizer" not in fault.message]
    with quiet_libraries():
        try:
            load_shapes(folder, revision=None, trust_remote_code=False)
        except RequirementError:
            with pytest.raises(RequirementError, match="do not belong together"):
                load_whole(folder, device_map="cpu")
            raise
        load_whole(folder, device_map="cpu")
    assert suspects == []


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_base_is_accepted(kind: str, is_tied: bool, tmp_path: Path) -> None:
    load_all(make(tmp_path / "base", kind, is_tied=is_tied))


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_a_base_is_accepted_and_refused_alike_in_each_layout(is_tied: bool, tmp_path: Path) -> None:
    whole = make(tmp_path / "base", is_tied=is_tied)
    sharded = make(tmp_path / "sharded", is_tied=is_tied, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    pickled = Path(shutil.copytree(whole, tmp_path / "pickled"))
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    for folder in (whole, sharded, pickled, TINY):
        load_all(folder)
    for folder in (sharded, pickled):
        config = folder / "config.json"
        config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
        with pytest.raises(RequirementError, match=r"9 missing \(model.layers.2.input_layernorm.weight, "):
            load_all(folder)


def test_what_transformers_passes_over_by_itself_is_no_fault(tmp_path: Path) -> None:
    """Buffers of old checkpoints, names without the model's prefix, and heads of other tasks."""
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "v_head.summary.weight": torch.ones(1, 32)}
    load_all(rewrite(make(tmp_path / "llama"), lambda weights: weights | old))
    masks = {"transformer.h.0.attn.bias": torch.ones(64, 64), "transformer.h.0.attn.masked_bias": torch.ones(1)}
    load_all(rewrite(make(tmp_path / "gptj", "gptj"), lambda weights: weights | masks))
    bare = make(tmp_path / "gpt2", "gpt2", is_tied=True)
    load_all(rewrite(bare, lambda weights: {name.removeprefix("transformer."): each for name, each in weights.items()}))


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "_orig_mod.", "model.module.", "policy."])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_weights_under_another_prefix_are_refused_by_both_names(kind: str, prefix: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "base", kind)
    rewrite(folder, lambda weights: {prefix + name: each for name, each in weights.items()})
    with pytest.raises(RequirementError, match=rf"\d+ missing \(lm_head.weight, .*unexpected \({prefix}"):
        load_all(folder)


BROKEN: dict[str, tuple[Callable[[Weights], Weights], dict[str, Any], str]] = {
    "a layer is missing": (
        lambda weights: {name: each for name, each in weights.items() if ".layers.1." not in name},
        {},
        r"9 missing \(model.layers.1.input_layernorm.weight, ",
    ),
    "a layer more in config.json": (dict, {"num_hidden_layers": 3}, r"9 missing \(model.layers.2."),
    "a layer fewer in config.json": (dict, {"num_hidden_layers": 1}, r"9 unexpected \(model.layers.1."),
    "no output head": (
        lambda weights: {name: each for name, each in weights.items() if not name.startswith("lm_head")},
        {},
        r"1 missing \(lm_head.weight\)",
    ),
    "a single norm": (
        lambda weights: {name: each for name, each in weights.items() if name != "model.norm.weight"},
        {},
        r"1 missing \(model.norm.weight\)",
    ),
    "another vocabulary": (
        dict,
        {"vocab_size": 120},
        r"2 of another shape \(lm_head.weight is \[100, 32\] instead of \[120, 32\]",
    ),
    "biases that config.json does not know": (
        lambda weights: weights | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)},
        {},
        r"1 unexpected \(model.layers.0.self_attn.q_proj.bias\)",
    ),
    "norms that the architecture has not": (
        lambda weights: weights | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)},
        {},
        r"1 unexpected \(model.layers.0.self_attn.q_norm.weight\)",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_base_whose_config_and_weights_differ_is_refused_with_names(fault: str, tmp_path: Path) -> None:
    change, config, message = BROKEN[fault]
    with pytest.raises(RequirementError, match=message):
        load_all(rewrite(make(tmp_path / "base"), change, **config))


HEAD = re.compile(r"^(lm_head|embed_out)\.")
CAUGHT_BY_FILES: dict[str, Callable[[Path, str], Path]] = {
    **{
        f"prefix {prefix}": lambda folder, layer, prefix=prefix: rewrite(
            folder, lambda weights: {prefix + name: each for name, each in weights.items()}
        )
        for prefix in ("module.", "base_model.model.", "_orig_mod.")
    },
    "no first layer": lambda folder, layer: rewrite(
        folder, lambda weights: {name: each for name, each in weights.items() if f"{layer}.0." not in name}
    ),
    "a layer more": lambda folder, layer: configure(folder, 1),
    "a layer fewer": lambda folder, layer: configure(folder, -1),
    "no head": lambda folder, layer: rewrite(
        folder, lambda weights: {name: each for name, each in weights.items() if not HEAD.search(name)}
    ),
}
"""Faults that every uniform architecture shows in its files."""


def configure(folder: Path, more: int) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (name,) = {"num_hidden_layers", "n_layer"} & config.keys()
    path.write_text(json.dumps(config | {name: config[name] + more}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("fault", CAUGHT_BY_FILES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_files_alone_show_what_is_wrong_in_every_architecture(kind: str, fault: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "base", kind)
    names = load_file(folder / "model.safetensors").keys()
    (layer,) = (f".{at}" for at in ("layers", "h") if any(f".{at}.0." in name for name in names))
    CAUGHT_BY_FILES[fault](folder, layer)
    assert "do not belong together" in inspect(folder).faults[0].message
    with pytest.raises(RequirementError):
        load_shapes(folder, revision=None, trust_remote_code=False)


@pytest.mark.parametrize("layout", [pytest.param("sharded safetensors", marks=pytest.mark.slow), "sharded .bin"])
def test_the_files_alone_show_a_missing_layer_in_shards(layout: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "base", max_shard_size="20KB")
    if layout == "sharded .bin":  # its index alone tells the names
        index = folder / "model.safetensors.index.json"
        document = json.loads(index.read_text())
        mapped = {name: file.replace(".safetensors", ".bin") for name, file in document["weight_map"].items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": mapped}))
        index.unlink()
        for path in folder.glob("*.safetensors"):
            torch.save(load_file(path), path.with_suffix(".bin"))
            path.unlink()
    assert [fault.message for fault in inspect(folder).faults if "no tokenizer" not in fault.message] == []
    configure(folder, 1)
    found = inspect(folder)
    assert len(found.missing) == 9
    assert found.missing[0] == "model.layers.2.input_layernorm.weight"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"vocab_size": "many"}, "vocab_size"),
        ({"layer_types": ["full_attention"]}, "must be equal to the number of `layer_types`"),
    ],
)
def test_a_config_json_that_contradicts_itself_is_one_sentence(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = rewrite(make(tmp_path / "base", "qwen2"), dict, **settings)
    with pytest.raises(RequirementError, match=rf"config.json cannot be used: .*{reason}") as error:
        load_shapes(folder, revision=None, trust_remote_code=False)
    assert "\n" not in error.value.message


@pytest.fixture
def headless(tmp_path: Path) -> Path:
    """The built-in base with a head of its own promised in config.json, and without its weights."""
    return rewrite(Path(shutil.copytree(TINY, tmp_path / "headless")), dict, tie_word_embeddings=False)


@pytest.mark.slow
def test_init_and_doctor_exit_with_8_and_name_what_is_missing(headless: Path, small: Path, tmp_path: Path) -> None:
    done = fedcli("init", "new", *settings(*SMALL, f"model.base={headless}"), cwd=tmp_path)
    assert done.returncode == 8
    assert "1 missing (lm_head.weight)" in done.stderr
    assert not (tmp_path / "new").exists()
    config = small / "fedcli.yaml"
    config.write_text(config.read_text().replace("base: builtin:tiny", f"base: {headless}"))
    done = fedcli("doctor", "--json", cwd=small)
    (finding,) = (each for each in json.loads(done.stdout)["findings"] if each["name"] == "base model")
    assert (done.returncode, finding["state"]) == (8, "failed")
    assert "1 missing (lm_head.weight)" in finding["detail"]
    assert "LOAD REPORT" not in done.stderr


def test_every_load_refuses_it(headless: Path, tmp_path: Path) -> None:
    config = lora_config(rank=4, alpha=8, dropout=0.0, target_modules=["q_proj"], base=None)
    with quiet_libraries(), pytest.raises(RequirementError, match=r"1 missing \(lm_head.weight\)"):
        load_base(headless, trust_remote_code=False)
    options = {"dtype": None, "max_shard_size": "5GB", "template": "alpaca", "trust_remote_code": False}
    with pytest.raises(RequirementError, match=r"1 missing \(lm_head.weight\)"):
        write_merged(headless, config, {}, tmp_path, **options)
