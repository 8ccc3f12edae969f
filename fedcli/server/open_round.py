"""Opening rounds: round 0 from its start, round n + 1 from an aggregation."""

import time
from dataclasses import asdict
from typing import Literal

from fedcli.config import Config
from fedcli.randomness import draw_cohort
from fedcli.server.communication_cost import cost_of, history_of
from fedcli.server.initial_adapter import Start
from fedcli.workspace.history import Round, read_head, read_identity
from fedcli.workspace.layout import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_FILE,
    CONTROL_DELTA_FILE,
    MANIFEST,
    Workspace,
)
from fedcli.workspace.publish import SHARED_FOLDER_MODE, SHARED_MODE, make_folder, publish_directory
from fedcli.workspace.records import (
    Aggregation,
    Manifest,
    ModelRecord,
    Schedule,
    Selection,
    TensorEntry,
    TrainRecord,
    file_entry,
)


def open_first_round(workspace: Workspace, config: Config, start: Start) -> Round:
    """Publish rounds/00000, unless another server was first, and return the latest round."""
    manifest = _manifest(
        config,
        workspace_id=read_identity(workspace).id,
        number=0,
        parent=None,
        model=start.model,
        tensors=start.tensors,
        files=start.files,
        aggregation=None,
    )
    _publish(workspace, manifest, start.files)
    return read_head(workspace)


def open_next_round(
    workspace: Workspace, previous: Round, config: Config, files: dict[str, bytes], aggregation: Aggregation
) -> bool:
    """Publish the round behind `previous` with its merged files; return False where another server was first."""
    files = {**files, ADAPTER_CONFIG_NAME: previous.read(ADAPTER_CONFIG_NAME)}
    manifest = _manifest(
        config,
        workspace_id=previous.manifest.workspace,
        number=previous.number + 1,
        parent=previous.sha256,
        model=previous.manifest.model,
        tensors=previous.manifest.tensors,
        files=files,
        aggregation=aggregation,
        previous=previous.manifest,
    )
    return _publish(workspace, manifest, files)


def train_record(config: Config, number: int, rounds: int) -> TrainRecord:
    """Return what a client must obey in a round, as fedcli.yaml has it now."""
    train = config.train
    return TrainRecord(
        steps=train.steps,
        batch_size=train.batch_size,
        micro_batch_size=train.micro_batch_size,
        max_length=train.max_length,
        learning_rate=train.learning_rate_of(number, rounds),
        schedule=Schedule(learning_rate=train.learning_rate, learning_rate_min=train.learning_rate_min, rounds=rounds),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        beta=train.beta if config.task == "dpo" else None,
        gradient_checkpointing=train.gradient_checkpointing,
        template=config.data.template,
        seed=config.federation.seed,
    )


def _publish(workspace: Workspace, manifest: Manifest, files: dict[str, bytes]) -> bool:
    make_folder(workspace.rounds, SHARED_FOLDER_MODE)
    contents = [*files.items(), (MANIFEST, manifest.to_bytes())]
    return publish_directory(workspace.round(manifest.round), contents, mode=SHARED_MODE)


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
    previous: Manifest | None = None,
) -> Manifest:
    """Shape a round's manifest from fedcli.yaml as it stands now."""
    federation = config.federation
    rounds = max(federation.rounds, number)
    state: Literal["open", "finished"] = "finished" if number >= federation.rounds else "open"
    is_open = state == "open"
    everybody = list(range(federation.clients))
    drawn = draw_cohort(federation.seed, number, everybody, federation.cohort_size) if is_open else []
    is_selection = len(drawn) > federation.num_counted
    update_files = [ADAPTER_FILE, CONTROL_DELTA_FILE] if config.algorithm.uses_control else [ADAPTER_FILE]
    manifest = Manifest(
        workspace=workspace_id,
        round=number,
        rounds=rounds,
        state=state,
        parent=parent,
        task=config.task,
        algorithm=asdict(config.algorithm),
        cohort=sorted(drawn),
        update_files=update_files,
        model=model,
        train=train_record(config, number, rounds),
        files={name: file_entry(contents) for name, contents in files.items()},
        tensors=tensors,
        aggregation=aggregation,
        selection=Selection(order=drawn, count=federation.num_counted) if is_selection else None,
        opened=time.time() if is_open and federation.deadline is not None else None,
    )
    return manifest.model_copy(
        update={"cost": cost_of(manifest, previous), "history": history_of(manifest, previous)},
    )
