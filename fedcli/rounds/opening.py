"""Opening rounds: round 0 from the base model, round n + 1 from an aggregation."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from fedcli.algos import Array
from fedcli.config import Config
from fedcli.errors import ConfigError
from fedcli.randomness import draw_cohort
from fedcli.rounds.settings import read_running_config
from fedcli.workspace.history import Round, read_head, read_identity, read_round
from fedcli.workspace.layout import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_CONFIG_NAME,
    ADAPTER_FILE,
    ADAPTER_NAME,
    MANIFEST,
    Workspace,
)
from fedcli.workspace.publish import SHARED_MODE, make_folder, publish_directory
from fedcli.workspace.records import (
    Aggregation,
    Manifest,
    ModelRecord,
    Schedule,
    TensorEntry,
    TrainRecord,
    file_entry,
)
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.tensors import decode, encode, schema_of


def open_first_round(workspace: Workspace) -> Round:
    """Publish rounds/00000 unless it stands, and return the latest round.

    Loads torch, for the shapes of the base model's layers. The caller holds the server's lock.
    """
    config = read_running_config(workspace)
    if read_round(workspace, 0) is not None:
        return read_head(workspace)
    from fedcli.model.base import BUILTIN_PREFIX, find_base, fingerprint, is_path

    base = config.model.base
    folder = find_base(base, revision=config.model.revision, root=workspace.root)
    local = base.startswith(BUILTIN_PREFIX) or is_path(base, workspace.root)
    arrays, adapter_config = _start(config, folder, workspace.root, hub_id=None if local else base)
    files = {ADAPTER_NAME: encode(arrays), ADAPTER_CONFIG_NAME: adapter_config}
    manifest = _manifest(
        config,
        workspace_id=read_identity(workspace).id,
        number=0,
        parent=None,
        model=ModelRecord(
            base=folder.name if is_path(base, workspace.root) else base,
            revision=config.model.revision,
            fingerprint=fingerprint(folder),
            quantization=config.model.quantization,
        ),
        tensors=schema_of(arrays),
        files=files,
        aggregation=None,
    )
    _publish(workspace, manifest, files)
    return read_head(workspace)


def open_next_round(
    workspace: Workspace, previous: Round, config: Config, arrays: dict[str, Array], aggregation: Aggregation
) -> bool:
    """Publish the round behind `previous` with its aggregated adapter; return False where another server was first."""
    files = {ADAPTER_NAME: encode(arrays), ADAPTER_CONFIG_NAME: previous.read(ADAPTER_CONFIG_NAME)}
    manifest = _manifest(
        config,
        workspace_id=previous.manifest.workspace,
        number=previous.number + 1,
        parent=previous.sha256,
        model=previous.manifest.model,
        tensors=previous.manifest.tensors,
        files=files,
        aggregation=aggregation,
    )
    return _publish(workspace, manifest, files)


def train_record(config: Config, number: int, rounds: int) -> TrainRecord:
    """Return what a client must obey in a round, as fedcli.yaml has it now."""
    train = config.train
    return TrainRecord(
        steps=train.steps,
        batch_size=train.batch_size,
        micro_batch_size=train.micro_batch_size or train.batch_size,
        max_length=train.max_length,
        learning_rate=train.learning_rate_of(number, rounds),
        schedule=Schedule(learning_rate=train.learning_rate, learning_rate_min=train.learning_rate_min, rounds=rounds),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        template=config.data.template,
        seed=config.federation.seed,
    )


def _publish(workspace: Workspace, manifest: Manifest, files: dict[str, bytes]) -> bool:
    make_folder(workspace.rounds)
    contents = [*files.items(), (MANIFEST, manifest.to_bytes())]
    return publish_directory(workspace.round(manifest.round), contents, mode=SHARED_MODE)


def _start(config: Config, folder: Path, root: Path, *, hub_id: str | None) -> tuple[dict[str, Array], bytes]:
    """Return the arrays and the adapter_config.json that the federation starts from."""
    from fedcli.model.lora import lora_config, start_adapter

    adapter = config.adapter
    peft_config = lora_config(
        rank=adapter.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        base=hub_id,
    )
    arrays = start_adapter(
        folder, peft_config, seed=config.federation.seed, trust_remote_code=config.model.trust_remote_code
    )
    if adapter.init is not None:
        arrays = _read_adapter(root / Path(adapter.init).expanduser(), schema_of(arrays), peft_config)
    return arrays, json.dumps(peft_config, indent=1, sort_keys=True).encode() + b"\n"


def _read_adapter(folder: Path, schema: dict[str, TensorEntry], peft_config: dict[str, Any]) -> dict[str, Array]:
    """Read the adapter that adapter.init names; it must be of the shape that the adapter section gives."""
    try:
        found = json.loads((folder / ADAPTER_CONFIG_FILE).read_bytes())
        contents = (folder / ADAPTER_FILE).read_bytes()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"adapter.init: no adapter in {folder}: {error}", hint="Name a folder in PEFT's layout."
        ) from error
    for key in ("r", "lora_alpha"):
        if found.get(key) != peft_config[key]:
            raise ConfigError(
                f"adapter.init: {folder} has {key} {found.get(key)!r}, the adapter section says {peft_config[key]!r}",
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


def _manifest(
    config: Config,
    *,
    workspace_id: str,
    number: int,
    parent: str | None,
    model: ModelRecord,
    tensors: dict[str, TensorEntry],
    files: dict[str, bytes],
    aggregation: Aggregation | None,
) -> Manifest:
    """Shape a round's manifest from fedcli.yaml as it stands now."""
    federation = config.federation
    rounds = max(federation.rounds, number)
    state: Literal["open", "finished"] = "finished" if number >= federation.rounds else "open"
    cohort = (
        draw_cohort(federation.seed, number, list(range(federation.clients)), federation.cohort_size)
        if state == "open"
        else []
    )
    return Manifest(
        workspace=workspace_id,
        round=number,
        rounds=rounds,
        state=state,
        parent=parent,
        task=config.task,
        algorithm=asdict(config.algorithm),
        cohort=cohort,
        update_files=[ADAPTER_FILE],
        model=model,
        train=train_record(config, number, rounds),
        files={name: file_entry(contents) for name, contents in files.items()},
        tensors=tensors,
        aggregation=aggregation,
    )
