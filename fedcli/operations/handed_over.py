"""The adapter that an export hands over: a round's, as it is published, or a client's own, joined into one."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedcli.algos import Arrays
from fedcli.algos.lora import is_first_factor
from fedcli.config.adapter_config import AdapterConfig, at_rank, parse_adapter_config
from fedcli.errors import UsageError
from fedcli.scoring.own_adapters import OWN_PARTS, OwnAdapter
from fedcli.workspace.history import Round
from fedcli.workspace.layout import ADAPTER_CONFIG_FILE, ADAPTER_CONFIG_NAME, ADAPTER_FILE, adapter_name
from fedcli.workspace.parsing import sha256
from fedcli.workspace.tensors import encode

MOST_RANK = 8192
"""Of an adapter_config.json."""


@dataclass(frozen=True)
class Handed:
    """An adapter in PEFT's layout, and what its card says of it."""

    config: dict[str, Any]
    arrays: Callable[[], Arrays]
    files: Callable[[], dict[str, bytes]]
    digest: str
    """Of its adapter_model.safetensors."""
    whose: str = ""
    """Empty for everybody's."""
    notes: tuple[str, ...] = ()


def of_round(found: Round) -> Handed:
    """Return a round's adapter as it is published, or with base_delta/ as one, of both ranks together."""
    contents, terms = found.read(ADAPTER_CONFIG_NAME), found.manifest.lora

    def files() -> dict[str, bytes]:
        return {ADAPTER_FILE: found.read(adapter_name(found.cluster)), ADAPTER_CONFIG_FILE: contents}

    config = parse_adapter_config(contents, found.folder / ADAPTER_CONFIG_NAME)
    if terms is not None and terms.base_delta is not None:
        config = at_rank(config, config["r"] + terms.base_delta)
        text = json.dumps(config, indent=1, sort_keys=True) + "\n"
        weights = encode(found.whole_adapter())
        joined = {ADAPTER_FILE: weights, ADAPTER_CONFIG_FILE: text.encode()}
        return Handed(config, found.whole_adapter, partial(dict, joined), sha256(weights))
    return Handed(config, found.adapter, files, found.manifest.files[adapter_name(found.cluster)].sha256)


def of_client(found: Round, own: OwnAdapter) -> Handed:
    """Return a client's own adapter; others beside it (the global one, base_delta/) are joined with it."""
    config = parse_adapter_config(found.read(ADAPTER_CONFIG_NAME), found.folder / ADAPTER_CONFIG_NAME)
    arrays = own.joined()
    config = at_rank(config, next(array.shape[0] for name, array in arrays.items() if is_first_factor(name)))
    if config["r"] > MOST_RANK:
        raise UsageError(
            f"client {own.client}'s own adapter and what stands beside it, joined, have rank {config['r']}, and "
            f"{MOST_RANK} are allowed",
            hint="Use it in place: `fedcli chat --client N`, `fedcli eval NAME --client N`.",
        )
    contents = json.dumps(AdapterConfig.model_validate(config).model_dump(), sort_keys=True, indent=2).encode() + b"\n"
    weights = encode(arrays)
    notes = [
        f"This is client {own.client}'s own adapter ({own.kind}), and learnt from its rows more than from others'."
    ]
    if own.kind == "feddpa":
        notes.append(
            f"It is two adapters in one: the global one of round {own.round}, and {own.weight:g} times the client's."
        )
    if own.kind == OWN_PARTS:
        notes.append(f"A part of it is round {own.round}'s, the other the client's own.")
    files = {ADAPTER_FILE: weights, ADAPTER_CONFIG_FILE: contents}
    whose = f"client {own.client}'s own ({own.kind})"
    return Handed(config, partial(dict, arrays), partial(dict, files), sha256(weights), whose, tuple(notes))
