"""Baseline adapters under baselines/, and how far an interrupted one came."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedcli.algos import Arrays
from fedcli.workspace.history import read_checked, read_whole
from fedcli.workspace.layout import Workspace
from fedcli.workspace.publish import SHARED_MODE, make_folder, publish_directory, publish_file
from fedcli.workspace.records import FileEntry, Finite, Record, Sha256, file_entry, parse_record

BASELINE_RECORD = "baseline.json"


class BaselineRecord(Record):
    """What a baseline is: the manifest it started from, its rounds, and the mean loss of its last one."""

    name: str
    start: Sha256
    rounds: int
    last_loss: Finite | None
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Progress:
    """The adapter after some rounds of a baseline."""

    rounds_done: int
    adapter: Arrays


def is_published(workspace: Workspace, name: str) -> bool:
    """Return whether a baseline is complete."""
    return os.path.lexists(workspace.baseline(name))


def published_baselines(workspace: Workspace) -> list[str]:
    """Return the names of the complete baselines."""
    if not workspace.baselines.is_dir():
        return []
    return sorted(name for name in os.listdir(workspace.baselines) if not name.startswith("."))


def read_baseline(workspace: Workspace, name: str, file: str) -> bytes | None:
    """Return one of a baseline's files, or None where there is no such baseline; raise IntegrityError on damage."""
    if not is_published(workspace, name):
        return None
    folder = workspace.baseline(name)
    record = parse_record(BaselineRecord, read_whole(folder / BASELINE_RECORD, 2**24), folder / BASELINE_RECORD)
    return read_checked(folder / file, record.files[file])


def publish_baseline(workspace: Workspace, record: BaselineRecord, files: Mapping[str, bytes]) -> None:
    """Publish a baseline's files with one rename, and a record that lists their hashes."""
    make_folder(workspace.baselines)
    listed = record.model_copy(update={"files": {name: file_entry(contents) for name, contents in files.items()}})
    contents = [*files.items(), (BASELINE_RECORD, listed.to_bytes())]
    publish_directory(workspace.baseline(record.name), contents, mode=SHARED_MODE)


def save_progress(workspace: Workspace, client: int, start: str, progress: Progress) -> None:
    """Keep a client's unfinished baseline in its private folder; `start` is the hash of the manifest it began with."""
    metadata = {"rounds_done": str(progress.rounds_done), "start": start}
    publish_file(workspace.baseline_progress(client), save(dict(progress.adapter), metadata), mode=0o600)


def read_progress(workspace: Workspace, client: int, start: str) -> Progress | None:
    """Return a client's unfinished baseline, or None where there is none that began with this manifest."""
    try:
        with safe_open(workspace.baseline_progress(client), framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("start") != start:
                return None
            return Progress(int(metadata["rounds_done"]), {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (FileNotFoundError, SafetensorError):
        return None


def clear_progress(workspace: Workspace, client: int) -> None:
    """Remove what a finished baseline no longer needs."""
    workspace.baseline_progress(client).unlink(missing_ok=True)
