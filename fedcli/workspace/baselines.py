"""Baseline adapters under baselines/, and how far an interrupted one came."""

from collections.abc import Mapping
from dataclasses import dataclass

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedcli.algos import Array, Arrays
from fedcli.errors import IntegrityError
from fedcli.workspace.history import MAX_RECORD_BYTES, read_checked, read_whole
from fedcli.workspace.layout import ADAPTER_NAME, Home, Workspace
from fedcli.workspace.parsing import parse_record, sealed, sha256
from fedcli.workspace.publish import publish_file
from fedcli.workspace.record import Finite, Record, Sha256
from fedcli.workspace.records import FileEntry, TensorEntry, file_entry
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.tensors import decode
from fedcli.workspace.train_records import TrainRecord

BASELINE_RECORD = "baseline.json"


class BaselineRecord(Record):
    """What a baseline is: the manifest it started from, its first round's settings, the mean loss of its last round."""

    name: str
    start: Sha256
    train: TrainRecord
    last_loss: Finite
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Progress:
    """The adapter after some rounds of a baseline, and the mean loss of the last of them."""

    rounds_done: int
    adapter: Arrays
    last_loss: float


def baseline_name(client: int | None) -> str:
    """Return the name of a client's baseline, or of the pooled one."""
    return "pooled" if client is None else f"alone-{client}"


def published_baselines(workspace: Workspace) -> list[str]:
    """Return the names of the complete baselines."""
    return [name for name in workspace.store.names("baselines") if not name.startswith(".")]


def read_baseline_record(workspace: Workspace, name: str) -> BaselineRecord | None:
    """Return what a complete baseline says of itself, or None where there is none such."""
    path = workspace.baseline(name) / BASELINE_RECORD
    if not workspace.store.exists(f"baselines/{name}"):
        return None
    return parse_record(BaselineRecord, read_whole(workspace, path, MAX_RECORD_BYTES), path)


def read_baseline(workspace: Workspace, name: str, tensors: Mapping[str, TensorEntry]) -> "dict[str, Array] | None":
    """Return a complete baseline's adapter, or None where there is none such; raise IntegrityError on damage."""
    record = read_baseline_record(workspace, name)
    if record is None:
        return None
    folder = workspace.baseline(name)
    contents = {file: read_checked(workspace, folder / file, entry) for file, entry in record.files.items()}
    try:
        return decode(contents[ADAPTER_NAME], tensors)
    except (KeyError, Refusal) as error:
        raise IntegrityError(
            f"{folder} does not hold an adapter of this federation: {error}",
            hint="Remove that folder and train the baseline again.",
        ) from error


def publish_baseline(workspace: Workspace, record: BaselineRecord, files: Mapping[str, bytes]) -> None:
    """Publish a baseline's files with one rename, and a record that lists their hashes."""
    listed = record.model_copy(update={"files": {name: file_entry(contents) for name, contents in files.items()}})
    workspace.store.publish(f"baselines/{record.name}", files.items(), (BASELINE_RECORD, sealed(listed)))


def save_progress(home: Home, plan: BaselineRecord, progress: Progress) -> None:
    """Keep an unfinished baseline in a private folder."""
    metadata = {
        "plan": sha256(plan.to_bytes()),
        "rounds_done": str(progress.rounds_done),
        "last_loss": str(progress.last_loss),
    }
    publish_file(home.baseline_progress, save(dict(progress.adapter), metadata), mode=0o600)


def read_progress(home: Home, plan: BaselineRecord) -> Progress | None:
    """Return an unfinished baseline, or None where there is none with this plan."""
    try:
        with safe_open(home.baseline_progress, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("plan") != sha256(plan.to_bytes()):
                return None
            adapter = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
            return Progress(int(metadata["rounds_done"]), adapter, float(metadata["last_loss"]))
    except (FileNotFoundError, SafetensorError):
        return None


def clear_progress(home: Home) -> None:
    """Remove what a finished baseline no longer needs."""
    home.baseline_progress.unlink(missing_ok=True)
