"""The built-in model with an adapter, rows for it, and how adapters are compared."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedcli.algos import Arrays
from fedcli.data.encoded import EncodedExample, EncodedRow
from fedcli.model.base import find_base
from fedcli.model.library_logging import quiet_libraries
from fedcli.model.lora import AdaptedModel, lora_config
from fedcli.tasks.conversation import Example, Preference, Turn, instruct

TINY = find_base("builtin:tiny", revision=None, root=Path.cwd())
TARGETS = ("q_proj", "v_proj", "down_proj")


def load_plain(folder: Path) -> tuple[Any, Any]:
    """Return a model and its tokenizer as transformers alone loads them."""
    with quiet_libraries():
        return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def examples_of(rows: Sequence[Mapping[str, str]]) -> list[Example]:
    """Return what rows of the demo teach."""
    return [instruct(row["instruction"], row["output"], row["input"]) for row in rows]


def preference(prompt: str, chosen: str, rejected: str) -> Preference:
    """Return a pair of answers to one prompt."""
    return Preference((Turn("user", prompt),), chosen, rejected)


def make_config(dropout: float = 0.0) -> dict[str, Any]:
    """Return the configuration of a small adapter."""
    return lora_config(rank=4, alpha=8, dropout=dropout, target_modules=TARGETS, base=None)


def make_model(dropout: float = 0.0) -> AdaptedModel:
    """Return the built-in model with an adapter."""
    return AdaptedModel(TINY, make_config(dropout), trust_remote_code=False)


def adapter_parameters(adapted: AdaptedModel) -> dict[str, torch.nn.Parameter]:
    """Return the trainable parameters by the names that an adapter's file has."""
    return {
        name.replace(".default.", "."): parameter
        for name, parameter in adapted.model.named_parameters()
        if ".lora_" in name
    }


def farthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest difference between two adapters."""
    assert one.keys() == other.keys()
    return max(float(abs(one[name] - other[name]).max()) for name in one)


def same_bits(one: Arrays, other: Arrays) -> bool:
    """Return whether two adapters are the same bit for bit."""
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


def sides(rows: Iterable[EncodedRow]) -> list[EncodedExample]:
    """Return the conversations of encoded rows, one after another."""
    return [side for row in rows for side in row.sides]
