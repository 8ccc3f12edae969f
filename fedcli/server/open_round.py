"""Opening rounds: round 0 from its start, round n + 1 from an aggregation."""

import time
from dataclasses import asdict, dataclass
from typing import Literal

from fedcli.config import Config
from fedcli.randomness import draw_cohort
from fedcli.server.communication_cost import cost_of, history_of
from fedcli.workspace.federation_state import Experiment, FederationState
from fedcli.workspace.history import publish_round
from fedcli.workspace.layout import ADAPTER_CONFIG_NAME, ADAPTER_FILE
from fedcli.workspace.records import Aggregation, Identity, Manifest, ModelRecord, Selection, TensorEntry, file_entry
from fedcli.workspace.train_record import train_record


@dataclass(frozen=True)
class Start:
    """Round 0 before it is published: its base model, its files and the tensors of its adapter."""

    model: ModelRecord
    files: dict[str, bytes]
    tensors: dict[str, TensorEntry]


def open_first_round(experiment: Experiment, identity: Identity, start: Start) -> FederationState:
    """Publish rounds/00000, unless another server was first, and return the federation as it stands then."""
    manifest = _manifest(
        experiment.config,
        workspace_id=identity.id,
        number=0,
        parent=None,
        model=start.model,
        tensors=start.tensors,
        files=start.files,
        aggregation=None,
    )
    publish_round(experiment.workspace, manifest, start.files)
    return FederationState.open(experiment.workspace)


def open_next_round(federation: FederationState, files: dict[str, bytes], aggregation: Aggregation) -> bool:
    """Publish the round behind the latest with its merged files; return False where another server was first."""
    previous = federation.head
    files = {**files, ADAPTER_CONFIG_NAME: previous.read(ADAPTER_CONFIG_NAME)}
    manifest = _manifest(
        federation.config,
        workspace_id=previous.manifest.workspace,
        number=previous.number + 1,
        parent=previous.sha256,
        model=previous.manifest.model,
        tensors=previous.manifest.tensors,
        files=files,
        aggregation=aggregation,
        previous=previous.manifest,
    )
    return publish_round(federation.workspace, manifest, files)


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
    update_files = [ADAPTER_FILE, *config.algorithm.update_files]
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
    return manifest.model_copy(update={"cost": cost_of(manifest, previous), "history": history_of(manifest, previous)})
