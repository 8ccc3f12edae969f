"""adapter.target_modules: the layers that are adapted where it is left out, all-linear, or another architecture's."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from support.architectures import KINDS, make
from support.models import TINY
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from fedcli import Federation
from fedcli.config import parse_config
from fedcli.errors import ConfigError
from fedcli.model.library_logging import quiet_libraries
from fedcli.model.lora import lora_config, start_adapter
from fedcli.model.targets import check_targets, default_targets, find_targets, linear_layers, targets_of
from fedcli.server.create import presets


def shapes_of(kind: str) -> PreTrainedModel:
    with torch.device("meta"), quiet_libraries():
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**KINDS[kind][0]))


def adapted_layers(kind: str, targets: list[str] | str) -> set[str]:
    """Return the names of the layers that PEFT puts LoRA into."""
    with torch.device("meta"), quiet_libraries():
        model = get_peft_model(shapes_of(kind), LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    return {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize(
    "kind", [kind if kind == "mixtral" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_all_linear_names_what_peft_adapts_by_it(kind: str) -> None:
    names = targets_of(shapes_of(kind), "all-linear")
    found = adapted_layers(kind, names)
    if kind in ("mamba", "mamba2"):  # which PEFT refuses, as the kernels take out_proj's weights by themselves
        assert names == (["in_proj", "x_proj"] if kind == "mamba" else ["in_proj"])
        with pytest.raises(ValueError, match="incompatible"):
            adapted_layers(kind, "all-linear")
        return
    expected = adapted_layers(kind, "all-linear")
    if kind == "jamba":
        expected = {name for name in expected if not name.endswith(("mamba.out_proj", "mamba.dt_proj"))}
    if any(name.endswith("experts") for name in expected):
        expected = {name for name in expected if not name.endswith((".gate", "experts", "experts.base_layer"))}
    assert found == expected
    assert not any(name.endswith(("lm_head", "embed_out")) for name in found)


@pytest.mark.parametrize(
    "kind", ["gpt2", "phi3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama", "mamba", "gpt_neox"))]
)
def test_what_is_left_out_is_what_is_usual_for_the_base(kind: str) -> None:
    model = shapes_of(kind)
    assert targets_of(model, None) == default_targets(kind, linear_layers(model)) == KINDS[kind][1]


def test_an_entry_of_pefts_table_that_does_not_fit_the_layers_gives_way_to_what_is_there() -> None:
    assert default_targets("llama", ["layers.0.attn.qkv_proj", "layers.0.mlp.up"]) == ["qkv_proj"]
    assert default_targets("new", ["layers.0.attn.query", "layers.0.attn.value"]) == ["query", "value"]
    assert default_targets("new", ["layers.0.attention.mix", "layers.0.mlp.up"]) == ["mix"]


def test_an_architecture_with_nothing_usual_is_an_error_that_lists_its_linear_layers() -> None:
    with pytest.raises(ConfigError, match="no layers are usual for a base model of type 'new'") as caught:
        default_targets("new", ["blocks.0.up", "blocks.0.down"])
    assert caught.value.hint == "Name some of its linear layers, or all-linear. It has down, up."


def test_a_layer_that_the_head_or_another_module_is_named_like_gets_a_longer_name() -> None:
    model = shapes_of("llama")
    model.model.extra = torch.nn.Module()
    model.model.extra.q_proj = torch.nn.LayerNorm(4)
    assert targets_of(model, None) == ["self_attn.q_proj", "self_attn.v_proj"]


@pytest.mark.parametrize(
    ("kind", "target", "hint"),
    [
        ("gpt2", "q_proj", "For this base c_attn are usual: leave adapter.target_modules out"),
        ("gpt2", "query_key_value", "For this base c_attn are usual"),
        ("bloom", "v_proj", "For this base query_key_value are usual"),
        ("llama", "c_attn", "For this base q_proj, v_proj are usual"),
        ("llama", "q_prj", "Did you mean q_proj"),
        ("mamba", "q_proj", "For this base in_proj are usual"),
    ],
)
def test_a_layer_that_is_not_there_gets_the_hint_of_its_own_architecture(kind: str, target: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"has no linear layer '{target}'") as caught:
        check_targets(shapes_of(kind), [target])
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("target", ["out_proj", "dt_proj"])
def test_a_layer_that_mambas_kernels_take_the_weights_of_is_refused(target: str) -> None:
    with pytest.raises(ConfigError, match=f"LoRA cannot adapt '{target}'"):
        check_targets(shapes_of("mamba"), ["in_proj", target])


@pytest.mark.parametrize("target", ["gate_proj", "mlp.down_proj"])
def test_a_layer_whose_name_peft_takes_for_fused_experts_is_refused(target: str) -> None:
    with pytest.raises(ConfigError, match="the experts are fused into one tensor"):
        check_targets(shapes_of("deepseek_v3"), [target])


@pytest.mark.parametrize("given", ["[]", "q_proj", "[all-linear]", "['(a+)+$']", "[1]", "3", "{a: 1}"])
def test_a_list_that_names_no_layers_is_refused_in_plain_words(given: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.target_modules: ") as caught:
        parse_config(yaml.safe_load(f"adapter: {{target_modules: {given}}}"), tmp_path / "fedcli.yaml")
    assert not any(word in caught.value.message for word in ("Tuple", "Input", "valid", "literal"))


def test_weights_that_are_stored_transposed_start_from_the_bound_of_their_fan_in(tmp_path: Path) -> None:
    base = make(tmp_path / "base", "gpt2")
    targets = find_targets(base, "all-linear", trust_remote_code=False)
    config = lora_config(rank=64, alpha=8, dropout=0.0, target_modules=targets, base=None)
    arrays, _ = start_adapter(base, config, seed=0, trust_remote_code=False)
    fans = {"attn.c_attn": (32, 96), "attn.c_proj": (32, 32), "mlp.c_fc": (32, 128), "mlp.c_proj": (128, 32)}
    for layer, (fan_in, fan_out) in fans.items():
        start = f"base_model.model.transformer.h.0.{layer}"
        a, b = arrays[f"{start}.lora_A.weight"], arrays[f"{start}.lora_B.weight"]
        assert (a.shape, b.shape) == ((64, fan_in), (fan_out, 64))
        assert 0.98 / math.sqrt(fan_in) < float(np.abs(a).max()) <= 1 / math.sqrt(fan_in)


def test_a_workspace_of_an_earlier_version_whose_file_leaves_the_layers_out_goes_on(small: Path) -> None:
    path = small / "fedcli.yaml"
    document = yaml.safe_load(path.read_text())
    identity = json.loads((small / "workspace.json").read_text())
    assert identity["fixed"]["adapter"]["target_modules"] == document["adapter"].pop("target_modules")
    path.write_text(yaml.safe_dump(document))
    federation = Federation.open(small)
    assert federation.client(0).train().status == "submitted"
    document["adapter"]["target_modules"] = ["q_proj"]
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(ConfigError, match=r"adapter\.target_modules: was \['q_proj', 'v_proj'\], is now \['q_proj'\]"):
        Federation.open(small)


def test_the_demos_layers_are_all_linear_ones_of_the_built_in_base() -> None:
    for name in ("demo", "demo-dpo"):
        config = parse_config(yaml.safe_load(presets()[name].read_text()), presets()[name])
        assert config.adapter.target_modules == "all-linear"
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert find_targets(TINY, "all-linear", trust_remote_code=False) == names
