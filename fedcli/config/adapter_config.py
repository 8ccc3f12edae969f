"""adapter_config.json: the keys that fedcli writes, bounded, and nothing else.

PEFT obeys whatever key such a file holds: a string of target_modules is a regular expression that may run for ever,
megatron_core names a module to import, layer_replication copies layers. So no file reaches PEFT: what was checked does.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from fedcli.config.sections import ModuleName
from fedcli.errors import IntegrityError

_HubId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]+(/[A-Za-z0-9_.\-]+)?$", max_length=200)]
_UNREAD = {"auto_mapping", "fan_in_fan_out", "peft_version", "revision"}
"""Keys that change nothing here; fan_in_fan_out PEFT itself sets as the layer needs."""
_DEFAULTS = {
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal", "mica"),
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
}
"""PEFT's defaults that are not empty; the others of init_lora_weights only say how training began."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starts (some with an ending: pissa_niter_16) that take something out of the base's own weights."""


class AdapterConfig(BaseModel):
    """The contents of an adapter_config.json that fedcli writes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    peft_type: Literal["LORA"] = "LORA"
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    base_model_name_or_path: _HubId | None = None
    inference_mode: Literal[True] = True
    r: Annotated[int, Field(ge=1, le=8192)]
    lora_alpha: Annotated[float, Field(gt=0)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: Annotated[list[ModuleName], Field(min_length=1, max_length=1000)]
    bias: Literal["none"] = "none"


class _OutsideConfig(AdapterConfig):
    """What an adapter from elsewhere may say as well: how its product is scaled and added to the base's weights."""

    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False


def parse_adapter_config(contents: bytes, where: object) -> dict[str, Any]:
    """Return what a round's adapter_config.json holds; raise IntegrityError where fedcli would not have written it."""
    try:
        return AdapterConfig.model_validate(from_json(contents)).model_dump()
    except ValueError as error:
        raise IntegrityError(
            f"{where} is not what fedcli writes: {_first_fault(error)}",
            hint="Do not train with this workspace: ask who opened the round.",
        ) from error


def at_rank(settings: Mapping[str, Any], rank: int, **changed: Any) -> dict[str, Any]:
    """Return an adapter's settings at another rank and the same scale, alpha / r."""
    return {**settings, "r": rank, "lora_alpha": settings["lora_alpha"] / settings["r"] * rank, **changed}


def parse_outside_config(contents: bytes) -> dict[str, Any]:
    """Return the settings of an adapter from elsewhere, which PEFT wrote with all of its keys.

    Raises ValueError for a key that has another value than PEFT's default and changes the adapter.
    """
    try:
        document = from_json(contents)
    except ValueError as error:
        raise ValueError(f"its adapter_config.json is not JSON: {error}") from error
    if not isinstance(document, Mapping):
        raise ValueError("its adapter_config.json is no JSON object")
    settings: dict[str, Any] = {}
    for key, value in document.items():
        if key in _OutsideConfig.model_fields:
            settings[key] = value
        elif key == "init_lora_weights" and str(value).lower().startswith(_CHANGES_BASE):
            raise ValueError(
                f"its adapter_config.json sets init_lora_weights to {str(value)[:40]}: that start changes the base "
                "model's own weights, and the adapter belongs to those alone (PEFT's save_pretrained makes plain LoRA "
                "of it with path_initial_model_for_weight_conversion)"
            )
        elif key not in _UNREAD and value not in (None, False, {}, [], *_DEFAULTS.get(key, ())):
            raise ValueError(f"its adapter_config.json sets {key}, which fedcli does not support")
    settings |= {"base_model_name_or_path": None, "inference_mode": True}
    if settings.get("task_type") is None:
        settings["task_type"] = "CAUSAL_LM"
    try:
        return _OutsideConfig.model_validate(settings).model_dump()
    except ValidationError as error:
        raise ValueError(f"its adapter_config.json: {_first_fault(error)}") from error


def _first_fault(error: ValueError) -> str:
    """Return what is wrong, without the value, which may be of any length."""
    if not isinstance(error, ValidationError):
        return str(error)
    fault = error.errors(include_input=False, include_url=False, include_context=False)[0]
    key = ".".join(map(str, fault["loc"])) or "it"
    return f"{key[:100]}: {fault['msg'][:200]}"
