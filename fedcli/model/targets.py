"""The layers of a base model that LoRA adapts: named ones, all linear ones, or those that are usual for it."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from fedcli.errors import ConfigError, did_you_mean
from fedcli.model.loading import load_shapes
from fedcli.model.output_head import output_head

if TYPE_CHECKING:
    from torch import nn

Targets: TypeAlias = Sequence[str] | Literal["all-linear"] | None
"""Ends of layers' names; PEFT's word for all linear layers but the head; None: those that are usual for the base."""

_ATTENTION = (
    *(("q_proj", "v_proj"), ("query_key_value",), ("qkv_proj",), ("Wqkv",), ("c_attn",), ("W_pack",), ("wqkv",)),
    *(("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"), ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj")),
    *(("qkv",), ("att_proj",), ("query", "value"), ("query_proj", "value_proj"), ("q_lin", "v_lin"), ("wq", "wv")),
    *(("to_q", "to_v"), ("q", "v"), ("in_proj",)),
)
"""Names of the projections that LoRA usually adapts, in the order of preference; the last one is Mamba's."""
_TOWERS = ("vision", "visual", "image", "audio", "speech")
"""Parts of names of encoders that no text goes through."""
_IN_MIXERS = ("out_proj", "dt_proj")
"""Layers whose weights a Mamba mixer's kernels take without calling the layer, so that LoRA would change nothing."""
_OF_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Names that experts' layers had before transformers fused them."""


def find_targets(folder: Path, wanted: Targets, *, trust_remote_code: bool) -> list[str]:
    """Return the ends of names of the layers to adapt in the base model of a folder, whose shapes alone are loaded.

    Raises ConfigError where nothing is usual for it, RequirementError where it cannot be loaded.
    """
    if wanted is not None and wanted != "all-linear":
        return sorted(wanted)
    return targets_of(load_shapes(folder, revision=None, trust_remote_code=trust_remote_code), wanted)


def targets_of(model: "nn.Module", wanted: Targets) -> list[str]:
    """Return the ends of names of the layers to adapt in a model, which may lie on the meta device.

    Raises ConfigError where nothing is usual for it.
    """
    if wanted is not None and wanted != "all-linear":
        return sorted(wanted)
    layers = linear_layers(model)
    if wanted is None:
        ends = default_targets(_kind(model), layers)
        layers = [name for name in layers if _is_one_of(name, ends)]
    return _shortest(layers, [name for name, _ in model.named_modules()])


def default_targets(model_type: str, layers: Collection[str]) -> list[str]:
    """Return the ends of names that LoRA adapts by default: PEFT's table, else attention as its layers are named.

    `layers` are the full names of the model's linear layers. Raises ConfigError that lists them where none is known.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    usual = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    for ends in (*([usual] if isinstance(usual, list) else []), *_ATTENTION):
        if all(any(_is_one_of(name, [end]) for name in layers) for end in ends):
            return sorted(ends)
    inside = sorted({_end(name) for name in layers if "attn" in name.lower() or "attention" in name.lower()})
    if inside:
        return inside
    raise ConfigError(
        f"adapter.target_modules: no layers are usual for a base model of type {model_type!r}",
        hint=f"Name some of its linear layers, or all-linear. It has {_listed(layers)}.",
    )


def linear_layers(model: "nn.Module") -> list[str]:
    """Return the full names of the linear layers to choose from: not the head, no encoders, nothing that is unfit.

    Experts that are fused into one tensor are no linear layers.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    head, unfit = output_head(model), _unfit(model)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and module is not head
        and name not in ("lm_head", "embed_out")
        and name not in unfit
        and not any(tower in name for tower in _TOWERS)
    ]


def check_targets(model: "nn.Module", targets: Iterable[str]) -> None:
    """Raise ConfigError where a target names no matrix of the base model, or only such as LoRA would not change."""
    import torch
    from transformers.pytorch_utils import Conv1D

    matrices = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    unfit = _unfit(model)
    for target in targets:
        found = [name for name in matrices if _is_one_of(name, [target])]
        if not found:
            raise ConfigError(
                f"adapter.target_modules: the base model has no linear layer {target!r}",
                hint=_hint(model, target, matrices),
            )
        if unfit.keys() >= {*found}:
            raise ConfigError(
                f"adapter.target_modules: LoRA cannot adapt {target!r} of this base: {unfit[found[0]]}",
                hint=_hint(model, target, [name for name in matrices if name not in unfit]),
            )


def _hint(model: "nn.Module", target: str, matrices: Sequence[str]) -> str:
    """Return what to name instead: the usual layers where the target is another architecture's, else the nearest."""
    try:
        usual = default_targets(_kind(model), linear_layers(model))
    except ConfigError:
        usual = []
    if target in usual or not usual:
        return f"It has {_listed(matrices)}."
    leave_out = f"For this base {', '.join(usual)} are usual: leave adapter.target_modules out to adapt them"
    if any(target in ends for ends in _ATTENTION):
        return f"{leave_out}. It has {_listed(matrices)}."
    return f"{did_you_mean(target, {_end(name) for name in matrices})} {leave_out}."


def _kind(model: "nn.Module") -> str:
    return str(getattr(model.config, "model_type", ""))


def _unfit(model: "nn.Module") -> dict[str, str]:
    """Return the full names of what looks like a layer for LoRA and is none, each with the reason."""
    names = [name for name, _ in model.named_modules()]
    mixers = [name.removesuffix("conv1d") for name in names if name.endswith(".conv1d")]
    found = {
        f"{mixer}{layer}": "Mamba's kernels take its weights without it" for mixer in mixers for layer in _IN_MIXERS
    }
    fused = _of_fused_experts(model)
    reason = "the experts are fused into one tensor, and PEFT takes this name for a part of it"
    return found | {name: reason for name in names if _end(name) in fused}


def _of_fused_experts(model: "nn.Module") -> set[str]:
    """Return the names that PEFT takes for parts of fused experts, though other layers of the model may have them."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[*_OF_EXPERTS])
    convert_peft_config_for_transformers(config, model=model, conversions=None)
    return {*_OF_EXPERTS}.difference(config.target_modules or ())


def _is_one_of(name: str, ends: Iterable[str]) -> bool:
    """Return whether a layer's name ends with one of these, as PEFT reads a list of names."""
    return f".{name}".endswith(tuple(f".{end}" for end in ends))


def _end(name: str) -> str:
    return name.rpartition(".")[2]


def _shortest(chosen: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the shortest ends of the chosen names that no other module of the model has."""
    others = set(names) - set(chosen)
    for length in (1, 2, 3):
        ends = {".".join(name.split(".")[-length:]) for name in chosen}
        if not any(_is_one_of(name, ends) for name in others):
            return sorted(ends)
    return sorted(chosen)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted({_end(name) for name in names})) or "none"
