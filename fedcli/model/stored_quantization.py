"""Bases whose weights are stored quantised: which of them can be trained here, as their files alone tell."""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from fedcli.model.base_files import LAYER, Fault, Weights, some

PACKAGES: dict[str, tuple[str, ...]] = {
    **{"bitsandbytes": ("bitsandbytes",), "gptq": ("optimum", "gptqmodel"), "awq": ("gptqmodel",)},
    **{"aqlm": ("aqlm",), "hqq": ("hqq",), "eetq": ("kernels",), "quanto": ("optimum-quanto",)},
    **{"torchao": ("torchao",), "compressed-tensors": ("compressed-tensors",), "sinq": ("sinq",)},
    **{"fouroversix": ("fouroversix",), "fp_quant": ("fp-quant",), "mxfp4": ()},
}
"""Methods that can be trained on, and the packages that each needs; as transformers' quantizers say."""
UNTRAINED = (
    *("auto-round", "bitnet", "fbgemm_fp8", "fp8", "gemma", "gguf", "higgs", "metal", "mxfp8", "nvfp4", "quark"),
    *("spqr", "vptq"),
)
"""Methods of which transformers runs the weights and gives no gradient through them, or not in float32 (fp8)."""
_STORED = re.compile(r"(^|[._])(weight|qweight|weight_packed|w_q|weight_int8|weight_q)$")
_OUTSIDE = re.compile(r"(^|\.)(embed\w*|wte|word_embeddings|lm_head|head)\.")
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
_PLAIN = "Name the base that it was made of, and set model.quantization to int8 or nf4 to save memory."


def quantization_of(config: Mapping[str, Any]) -> str | None:
    """Return how a base's weights are stored, where its config.json says that they are quantised."""
    found = _settings(config)
    if found is None:
        return None
    if found.get("load_in_8bit") or found.get("load_in_4bit"):
        return "bitsandbytes"
    return str(found.get("quant_method") or "unknown")


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    inner = config.get("text_config")
    holders = (config, inner if isinstance(inner, Mapping) else {})  # the order in which transformers asks them
    found = (holder.get("quantization_config") for holder in holders)
    return next((settings for settings in found if isinstance(settings, Mapping) and settings), None)


def faults_of_quantization(folder: Path, config: Mapping[str, Any], weights: Weights) -> Iterator[Fault]:
    """Yield why a base that is stored quantised cannot be trained here."""
    method = quantization_of(config)
    if method is None:
        yield from _untold(folder, weights)
    elif method not in PACKAGES and method not in UNTRAINED:
        told = "does not say by which method" if method == "unknown" else f"names the method {method!r}, an unknown one"
        yield Fault(f"the base model {folder} is stored quantised, and its config.json {told}", _PLAIN)
    elif method in UNTRAINED and not _trains_online(config):
        yield Fault(f"the base model {folder} is stored quantised by {method}, on which nothing can be trained", _PLAIN)
    elif missing := [package for package in PACKAGES.get(method, ()) if not _is_installed(package)]:
        yield Fault(
            f"the base model {folder} is stored quantised by {method}, which needs a package that is not installed: "
            f"{', '.join(missing)}",
            f"Install it: pip install {' '.join(missing)}. Or name the base that it was made of.",
        )


def _trains_online(config: Mapping[str, Any]) -> bool:
    """Return whether a BitNet keeps weights that are quantised while it computes, which can be trained on."""
    found = _settings(config) or {}
    return found.get("linear_class") == "autobitlinear" and found.get("quantization_mode") == "online"


def _untold(folder: Path, weights: Weights) -> Iterator[Fault]:
    """Yield a fault where weights are whole numbers, or scaled floats of 8 bits, which are taken as they are."""
    scaled = any(re.search(r"scale(_inv|s)?$", name) for name in weights.names)
    odd = sorted(
        name
        for name, kind in weights.kinds.items()
        if (LAYER.match(name) or _OUTSIDE.search(name))
        and _STORED.search(name)
        and len(weights.shapes[name]) > 1
        and (kind in _INTEGERS or (kind.startswith(("F8", "F4")) and scaled))
    )
    if odd:
        yield Fault(
            f"the base model {folder} is stored quantised, and its config.json has no quantization_config: "
            f"{_counted(odd)} {weights.kinds[odd[0]]} ({some(odd)})",
            "Fetch the model again with its own config.json. " + _PLAIN,
        )


def _counted(names: Sequence[str]) -> str:
    return "1 weight is of the type" if len(names) == 1 else f"{len(names)} weights are of the type"


def _is_installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True
