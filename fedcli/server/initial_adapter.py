"""What a federation starts from: the base model's record and the first adapter."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcli.algos import Array
from fedcli.config.adapter_config import parse_outside_config
from fedcli.errors import ConfigError, RequirementError
from fedcli.parties.party import trusts_code
from fedcli.server.open_round import Start
from fedcli.workspace.federation_state import Experiment
from fedcli.workspace.layout import ADAPTER_CONFIG_FILE, ADAPTER_CONFIG_NAME, ADAPTER_FILE, ADAPTER_NAME
from fedcli.workspace.records import ModelRecord, TensorEntry
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.tensors import decode, encode, schema_of

if TYPE_CHECKING:
    from fedcli.model.inspection import Inspection


def check_base(experiment: Experiment) -> "Inspection | None":
    """Return what the base model is; None where the hub would have to be asked for it. Loads no torch.

    Raises ConfigError or RequirementError for a base model that will not do, ConfigError where train.max_length or
    the adapter to start from do not suit it.
    """
    from fedcli.model.base import find_base, is_hub_id
    from fedcli.model.inspection import inspect

    settings, root = experiment.config.model, experiment.workspace.root
    try:
        folder = find_base(settings.base, revision=settings.revision, root=root, only_cached=True)
    except RequirementError:
        if not is_hub_id(settings.base, root):
            raise
        return None
    found = inspect(folder, trust_remote_code=trusts_code(experiment)).require()
    found.check_length(experiment.config.train.max_length)
    if experiment.config.adapter.init is not None:
        _read_files(root / os.path.expanduser(experiment.config.adapter.init))
    return found


def prepare_start(experiment: Experiment) -> Start:
    """Find the base model and make the adapter that LoRA starts from; writes nothing.

    Loads torch, for the shapes of the base model's layers. Raises ConfigError or RequirementError for a base model, a
    tokenizer, a template or target modules that will not do.
    """
    from fedcli.data.chat_template import asks_for_date, today
    from fedcli.data.encoding import Encoder
    from fedcli.model.base import find_base, fingerprint, is_hub_id, is_path
    from fedcli.model.bitsandbytes import require_bitsandbytes, without_bitsandbytes
    from fedcli.model.inspection import inspect
    from fedcli.model.loading import load_tokenizer
    from fedcli.model.lora import lora_config, start_adapter
    from fedcli.model.targets import find_targets

    config, root, adapter = experiment.config, experiment.workspace.root, experiment.config.adapter
    require_bitsandbytes(config.model.quantization)
    base, trust_remote_code = config.model.base, trusts_code(experiment)
    folder = find_base(base, revision=config.model.revision, root=root)
    inspection = inspect(folder, trust_remote_code=trust_remote_code).require()
    inspection.check_length(config.train.max_length)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    inspection.check_tokenizer(tokenizer)
    Encoder(tokenizer, config.data.template)
    with without_bitsandbytes(config.model.quantization == "none"):
        peft_config = lora_config(
            rank=adapter.global_rank,
            alpha=adapter.alpha,
            dropout=adapter.dropout,
            target_modules=find_targets(folder, adapter.target_modules, trust_remote_code=trust_remote_code),
            base=base if is_hub_id(base, root) else None,
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
    files = {ADAPTER_NAME: encode(arrays), ADAPTER_CONFIG_NAME: text.encode()}
    return Start(model, files, schema_of(arrays), today() if asks_for_date(tokenizer) else None)


def _read_files(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Return the settings of the adapter that adapter.init names, and its weights' file."""
    try:
        found = parse_outside_config((folder / ADAPTER_CONFIG_FILE).read_bytes())
        return found, (folder / ADAPTER_FILE).read_bytes()
    except (OSError, ValueError) as error:
        inner = folder / Path(ADAPTER_NAME).parent
        hint = f"Name {inner}." if inner.is_dir() else "Name a folder in PEFT's layout, as rounds/00015/adapter."
        problem = (error.strerror or error) if isinstance(error, OSError) else error
        raise ConfigError(f"adapter.init: no adapter in {folder}: {problem}", hint=hint) from error


def _read_adapter(folder: Path, schema: dict[str, TensorEntry], peft_config: dict[str, Any]) -> dict[str, Array]:
    """Read the adapter that adapter.init names; it must be of the shape that the adapter section gives."""
    found, contents = _read_files(folder)
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
