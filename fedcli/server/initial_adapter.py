"""What a federation starts from: the base model's record and the first adapter."""

import json
import os
from pathlib import Path
from typing import Any

from fedcli.algos import Array
from fedcli.config.adapter_config import parse_outside_config
from fedcli.errors import ConfigError
from fedcli.parties.party import trusts_code
from fedcli.server.open_round import Start
from fedcli.workspace.federation_state import Experiment
from fedcli.workspace.layout import ADAPTER_CONFIG_FILE, ADAPTER_CONFIG_NAME, ADAPTER_FILE, ADAPTER_NAME
from fedcli.workspace.records import ModelRecord, TensorEntry
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.tensors import decode, encode, schema_of


def prepare_start(experiment: Experiment) -> Start:
    """Find the base model and make the adapter that LoRA starts from; writes nothing.

    Loads torch, for the shapes of the base model's layers. Raises ConfigError or RequirementError for a base model, a
    tokenizer, a template or target modules that will not do.
    """
    from fedcli.data.encoding import Encoder
    from fedcli.model.base import BUILTIN_PREFIX, find_base, fingerprint, is_path, load_tokenizer
    from fedcli.model.bitsandbytes import require_bitsandbytes, without_bitsandbytes
    from fedcli.model.lora import lora_config, start_adapter
    from fedcli.model.targets import find_targets

    config, root, adapter = experiment.config, experiment.workspace.root, experiment.config.adapter
    require_bitsandbytes(config.model.quantization)
    base, trust_remote_code = config.model.base, trusts_code(experiment)
    folder = find_base(base, revision=config.model.revision, root=root)
    Encoder(load_tokenizer(folder, trust_remote_code=trust_remote_code), config.data.template)
    local = base.startswith(BUILTIN_PREFIX) or is_path(base, root)
    with without_bitsandbytes(config.model.quantization == "none"):
        peft_config = lora_config(
            rank=adapter.rank,
            alpha=adapter.alpha,
            dropout=adapter.dropout,
            target_modules=find_targets(folder, adapter.target_modules, trust_remote_code=trust_remote_code),
            base=None if local else base,
        )
        arrays, num_parameters = start_adapter(
            folder, peft_config, seed=config.federation.seed, trust_remote_code=trust_remote_code
        )
    if adapter.init is not None:
        arrays = _read_adapter(root / os.path.expanduser(adapter.init), schema_of(arrays), peft_config)
    model = ModelRecord(
        base=folder.name if is_path(base, root) else base,  # no path of this machine
        revision=config.model.revision,
        fingerprint=fingerprint(folder),
        quantization=config.model.quantization,
        num_parameters=num_parameters,
    )
    text = json.dumps(peft_config, indent=1, sort_keys=True) + "\n"
    return Start(model, {ADAPTER_NAME: encode(arrays), ADAPTER_CONFIG_NAME: text.encode()}, schema_of(arrays))


def _read_adapter(folder: Path, schema: dict[str, TensorEntry], peft_config: dict[str, Any]) -> dict[str, Array]:
    """Read the adapter that adapter.init names; it must be of the shape that the adapter section gives."""
    try:
        found = parse_outside_config((folder / ADAPTER_CONFIG_FILE).read_bytes())
        contents = (folder / ADAPTER_FILE).read_bytes()
    except (OSError, ValueError) as error:
        inner = folder / Path(ADAPTER_NAME).parent
        hint = f"Name {inner}." if inner.is_dir() else "Name a folder in PEFT's layout, as rounds/00015/adapter."
        problem = (error.strerror or error) if isinstance(error, OSError) else error
        raise ConfigError(f"adapter.init: no adapter in {folder}: {problem}", hint=hint) from error
    if odd := [key for key in ("use_rslora", "use_dora") if found[key]]:
        raise ConfigError(f"adapter.init: {folder} uses {odd[0]}", hint="Start from an adapter of plain LoRA.")
    for key in ("r", "lora_alpha"):
        if found[key] != peft_config[key]:
            raise ConfigError(
                f"adapter.init: {folder} has {key} {found[key]!r}, the adapter section says {peft_config[key]!r}",
                hint="Give rank, alpha and target_modules the values of the adapter to start from.",
            )
    try:
        arrays = decode(contents, schema)
    except Refusal as refusal:
        raise ConfigError(
            f"adapter.init: the adapter in {folder} does not fit: {refusal.reason}",
            hint="Give rank, alpha and target_modules the values of the adapter to start from.",
        ) from refusal
    return {name: array.astype("float32") for name, array in arrays.items()}
