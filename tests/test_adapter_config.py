"""adapter_config.json: what fedcli writes is read, and nothing else reaches PEFT."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from support.processes import fedcli

from fedcli.config.adapter_config import parse_adapter_config, parse_outside_config
from fedcli.errors import IntegrityError
from fedcli.model.lora import lora_config

OWN = lora_config(rank=4, alpha=8, dropout=0.05, target_modules=["q_proj", "self_attn.v_proj"], base="some/model-1.5")
PEFT: dict[str, Any] = json.loads(
    json.dumps(LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict(), default=list)
)
"""All that PEFT writes."""


def test_what_fedcli_writes_is_read_as_it_is() -> None:
    for changes in ({}, {"base_model_name_or_path": None}, {"r": 8192}, {"lora_alpha": 0.5}, {"lora_dropout": 0}):
        assert parse_adapter_config(json.dumps(OWN | changes).encode(), "it") == OWN | changes


ATTACKS: list[dict[str, Any]] = [
    {"target_modules": "(a+)+$"},
    {"target_modules": "all-linear"},
    {"target_modules": ["(a+)+$"]},
    {"target_modules": []},
    {"target_modules": ["q_proj"] * 1001},
    {"target_modules": ["q" * 201]},
    {"target_modules": [1]},
    {"r": 10**9},
    {"r": 0},
    {"r": True},
    {"r": "4"},
    {"r": 4.0},
    {"lora_alpha": float("nan")},
    {"lora_alpha": float("inf")},
    {"lora_alpha": -1},
    {"lora_dropout": 1.0},
    {"lora_dropout": -0.1},
    {"bias": "all"},
    {"task_type": "SEQ_CLS"},
    {"peft_type": "IA3"},
    {"inference_mode": False},
    {"base_model_name_or_path": "../../elsewhere"},
    {"layer_replication": [[0, 2], [0, 2]]},
    {"megatron_config": {}, "megatron_core": "os"},
    {"layers_pattern": "(a+)+$", "layers_to_transform": [0]},
    {"rank_pattern": {"(a+)+$": 2}},
    {"modules_to_save": ["lm_head"]},
    {"use_dora": True},
    {"init_lora_weights": "pissa"},
    {"auto_mapping": {"parent_library": "os"}},
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: f"{attack}"[:40])
def test_a_rounds_file_with_anything_else_is_refused(attack: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError, match=f"round 3 is not what fedcli writes: {next(iter(attack))}"):
        parse_adapter_config(json.dumps(OWN | attack).encode(), "round 3")


@pytest.mark.parametrize("contents", [b"", b"[]", b"{", b"\xff", b"[" * 10**5, b"{}", b"null", b'{"r": ' * 10**5])
def test_a_file_that_is_no_such_object_is_refused(contents: bytes) -> None:
    with pytest.raises(IntegrityError, match="it is not what fedcli writes"):
        parse_adapter_config(contents, "it")
    with pytest.raises(ValueError, match=r"its adapter_config.json"):
        parse_outside_config(contents)


def test_a_message_does_not_repeat_a_long_value() -> None:
    with pytest.raises(IntegrityError) as error:
        parse_adapter_config(json.dumps(OWN | {"x" * 10**6: "y" * 10**6}).encode(), "it")
    assert len(error.value.message) < 500


def test_an_adapter_that_peft_wrote_is_read_with_its_defaults() -> None:
    alike = [
        {},
        {"peft_version": "0.9.0", "revision": "main", "fan_in_fan_out": True, "inference_mode": True},
        {"init_lora_weights": False, "task_type": None, "base_model_name_or_path": "/somewhere/else"},
        {"a_key_of_tomorrow": None, "another": {}},
    ]
    for changes in alike:
        assert parse_outside_config(json.dumps(PEFT | changes).encode()) == {
            **OWN,
            "base_model_name_or_path": None,
            "lora_dropout": 0.0,
            "target_modules": ["q_proj"],
            "use_rslora": False,
            "use_dora": False,
        }


OTHERS: list[tuple[str, Any]] = [
    ("layer_replication", [[0, 2], [0, 2]]),
    ("megatron_core", "os"),
    ("megatron_config", {"tensor": 2}),
    ("rank_pattern", {"q": 8}),
    ("alpha_pattern", {"(a+)+$": 8}),
    ("layers_to_transform", [0]),
    ("layers_pattern", "h"),
    ("exclude_modules", "(a+)+$"),
    ("modules_to_save", ["lm_head"]),
    ("init_lora_weights", "pissa"),
    ("trainable_token_indices", [1]),
    ("lora_bias", True),
    ("a_key_of_tomorrow", 1),
    ("target_modules", "(a+)+$"),
    ("r", 10**9),
    ("bias", "all"),
    ("peft_type", "IA3"),
]


@pytest.mark.parametrize(("key", "value"), OTHERS)
def test_an_adapter_from_elsewhere_that_needs_more_is_refused_by_the_keys_name(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"adapter_config.json.* {key}"):
        parse_outside_config(json.dumps(PEFT | {key: value}).encode())


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "PiSSA"])
def test_an_adapter_whose_start_changed_its_base_is_refused_with_the_reason(start: str) -> None:
    with pytest.raises(ValueError, match=rf"init_lora_weights to {start}: that start changes the base model's own"):
        parse_outside_config(json.dumps(PEFT | {"init_lora_weights": start}).encode())


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_an_adapter_whose_start_left_its_base_as_it_was_is_read(start: Any) -> None:
    assert parse_outside_config(json.dumps(PEFT | {"init_lora_weights": start}).encode())["r"] == 4


@pytest.mark.slow
def test_training_and_export_of_a_forged_round_exit_with_7(small: Path) -> None:
    """The file's hash in the manifest is right: whoever publishes a round can write both."""
    path = small / "rounds/00000/adapter/adapter_config.json"
    contents = json.dumps(json.loads(path.read_bytes()) | {"target_modules": "(a|a)+$"}).encode()
    manifest = path.parents[1] / "manifest.json"
    record = json.loads(manifest.read_bytes())
    record["files"]["adapter/adapter_config.json"] = {
        "sha256": hashlib.sha256(contents).hexdigest(),
        "bytes": len(contents),
    }
    for each, forged in ((path, contents), (manifest, json.dumps(record).encode())):
        each.chmod(0o644)
        each.write_bytes(forged)
    for arguments in (["client", "train", "--id", 0], ["export", "out"], ["export", "out", "--merge"]):
        done = fedcli(*arguments, cwd=small)
        assert (done.returncode, "target_modules" in done.stderr) == (7, True), done.stderr
    assert not (small / "out").exists()
