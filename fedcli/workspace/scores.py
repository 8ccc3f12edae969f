"""Scores under eval/: what targets have on benchmarks, every item beside them, and answers that survive a kill."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedcli.errors import IntegrityError
from fedcli.workspace.history import read_checked, read_if_there, read_record
from fedcli.workspace.layout import Workspace
from fedcli.workspace.locks import hold, is_held
from fedcli.workspace.parsing import RecordT, sealed
from fedcli.workspace.publish import SHARED_MODE, explained, make_folder, publish_file
from fedcli.workspace.record import Finite, Natural, Record
from fedcli.workspace.records import FileEntry, file_entry
from fedcli.workspace.target_name import TargetName

MAX_ITEMS_BYTES = 2**32
_UNSCORED = ".unscored.json"
_ANEW = "Remove that file and score again: the answers are kept, and nothing is asked twice."


class ScoreEntry(Record):
    """A metric's value, its standard error, and its 95 % bootstrap interval; and what kind of metric it is."""

    value: Finite
    standard_error: Finite
    low: Finite
    high: Finite
    num_items: Natural
    unit: str
    higher_is_better: bool
    is_detail: bool


class ScoreRecord(Record):
    """A target's scores on a benchmark, and all that they depend on."""

    benchmark: str
    variant: str
    """What was asked for in place of the benchmark's own settings; "" for nothing."""
    target: str
    model: dict[str, Any]
    """What tells this model's answers from others': hashes of base and adapter, quantisation, template, number type."""
    settings: dict[str, Any]
    data: dict[str, str]
    """Where the questions came from, with the hash of local files."""
    scores: dict[str, ScoreEntry]
    awaits: str | None
    """What must still come (a judge, code execution); None where all is scored."""
    num_items: Natural
    num_unscored: Natural
    num_truncated: Natural = 0
    """Prompts that lost their beginning, for the model's context is too short."""
    notes: list[str]
    seconds: Finite
    num_generated_tokens: Natural
    tokens_per_second: Finite | None
    """Generated tokens; None where nothing was generated."""
    versions: dict[str, str]
    created: str
    items: FileEntry | None = None
    """The file of its items; None where there is none, and in records of versions that did not say."""

    @property
    def name(self) -> str:
        """The benchmark, and the variant behind an @."""
        return scored_name(self.benchmark, self.variant)

    @property
    def target_name(self) -> TargetName:
        """The target's kind and number."""
        return TargetName.parse(self.target)


class Failure(Record):
    """Why a benchmark could not be scored; `again` is the command with which a person tries again."""

    message: str
    hint: str
    exit_code: int
    again: str
    created: str


class Unscored(Record):
    """A benchmark that a round is to be scored on, and has no scores on: it is due, or it has failed.

    It is noted before the scoring begins, so that an interrupted one is known, and goes when there are scores.
    """

    round: int
    benchmark: str
    name: str
    """The benchmark, and the variant behind an @."""
    failure: Failure | None = None


def scored_name(benchmark: str, variant: str) -> str:
    """Return the name that a benchmark's scores have on disk."""
    return f"{benchmark}@{variant}" if variant else benchmark


def publish_scores(workspace: Workspace, record: ScoreRecord, items: Sequence[Mapping[str, Any]]) -> None:
    """Keep a target's scores, and its items (one JSON object each, with "item" and "marks") beside them."""
    path = workspace.scores(record.target, record.name)
    lines = "".join(json.dumps(item, ensure_ascii=False, sort_keys=True) + "\n" for item in items)
    workspace.store.delete(workspace.name(path))  # else a kill would leave new items beside the old record
    if items:
        record = record.model_copy(update={"items": file_entry(lines.encode())})
        workspace.store.put(workspace.name(path.with_suffix(".jsonl")), lines.encode())
    workspace.store.put(workspace.name(path), sealed(record))
    remove_unscored(workspace, record.target, record.name)


def note_unscored(workspace: Workspace, record: Unscored) -> None:
    """Keep that a round is to be scored on a benchmark, or why that failed."""
    path = _unscored(workspace, str(TargetName.of_round(record.round)), record.name)
    workspace.store.put(workspace.name(path), record.to_bytes())


def read_unscored(workspace: Workspace) -> list[Unscored]:
    """Return what rounds have still to be scored on, and what failed, by round; raise IntegrityError on damage."""
    return _read_all(workspace, Unscored, hint="Remove that file: what is due is noted again.")


def remove_unscored(workspace: Workspace, target: str, name: str) -> None:
    """Forget that a target is to be scored on a benchmark, or that it failed."""
    workspace.store.delete(workspace.name(_unscored(workspace, target, name)))


def has_note(workspace: Workspace, target: str, name: str) -> bool:
    """Return whether a target has scores on a benchmark (with its variant), is to be scored on it, or has failed."""
    paths = (workspace.scores(target, name), _unscored(workspace, target, name))
    return any(workspace.store.exists(workspace.name(path)) for path in paths)


def _unscored(workspace: Workspace, target: str, name: str) -> Path:
    return workspace.eval / target / f"{name}{_UNSCORED}"


def read_scores(workspace: Workspace) -> list[ScoreRecord]:
    """Return all scores; raise IntegrityError for a damaged file."""
    return _read_all(workspace, ScoreRecord, hint=_ANEW)


def _read_all(workspace: Workspace, kind: type[RecordT], *, hint: str) -> list[RecordT]:
    found = [read_record(workspace, kind, path, hint=hint) for path in _files_of(workspace, kind)]
    return [record for record in found if record is not None]  # one that is gone was removed meanwhile


def score_files(workspace: Workspace) -> list[Path]:
    """Return the files of all scores."""
    return _files_of(workspace, ScoreRecord)


def _files_of(workspace: Workspace, kind: type[Record]) -> list[Path]:
    names = workspace.store.names
    paths = [workspace.eval / target / name for target in names("eval") for name in names(f"eval/{target}")]
    return [path for path in paths if _kind_of(path) is kind]


def _kind_of(path: Path) -> type[Record] | None:
    """Return what a file of a target's folder holds; None for all but scores and notes of what is unscored."""
    if path.suffix != ".json" or path.name.startswith("."):
        return None
    return Unscored if path.name.endswith(_UNSCORED) else ScoreRecord


def unfinished_targets(workspace: Workspace) -> set[str]:
    """Return the targets that are being or to be scored, were interrupted, or whose answers wait for a judge."""
    found = {record.target for record in read_scores(workspace) if record.awaits is not None}
    found |= {str(TargetName.of_round(note.round)) for note in read_unscored(workspace) if note.failure is None}
    for folder in workspace.eval.glob("*/"):
        logs = [path for path in folder.glob("*.answers.jsonl") if path.stat().st_size]
        answered = {path.name.removesuffix(".answers.jsonl") for path in logs}
        scored = {path.stem.partition("@")[0] for path in folder.glob("*.json") if _kind_of(path) is ScoreRecord}
        if answered - scored or any(map(is_held, folder.glob(".*.lock"))):
            found.add(folder.name)
    return found


def read_score(workspace: Workspace, target: str, name: str) -> ScoreRecord | None:
    """Return a target's scores on a benchmark (with its variant), or None where there are none."""
    return read_record(workspace, ScoreRecord, workspace.scores(target, name), hint=_ANEW)


def read_items(workspace: Workspace, target: str, name: str) -> Iterator[dict[str, Any]]:
    """Yield a target's items of a benchmark, with "item", "marks" and what was said; none where none are kept."""
    path = workspace.scores(target, name).with_suffix(".jsonl")
    contents = read_if_there(workspace, path, MAX_ITEMS_BYTES)
    try:
        yield from map(json.loads, (contents or b"").splitlines())
    except ValueError as error:
        raise IntegrityError(f"{path} is damaged: {error}", hint=_ANEW) from error


@dataclass(frozen=True)
class ItemMarks:
    """What the items of a record have: marks by metric and item, and the clusters of those that are in one."""

    marks: dict[str, dict[str, Any]] = field(default_factory=dict)
    clusters: dict[str, str] = field(default_factory=dict)


def check_items(workspace: Workspace, record: ScoreRecord) -> None:
    """Raise IntegrityError where the items of a record are not those that it was made of, as far as it says which."""
    if record.items is not None:
        path = workspace.scores(record.target, record.name).with_suffix(".jsonl")
        try:
            read_checked(workspace, path, record.items)
        except IntegrityError as error:
            error.hint = _ANEW
            raise


def read_marks(workspace: Workspace, record: ScoreRecord) -> ItemMarks:
    """Return the marks of a record's items; none for a benchmark that is made of others."""
    check_items(workspace, record)
    found = ItemMarks()
    for item in read_items(workspace, record.target, record.name):
        if item.get("cluster") is not None:
            found.clusters[item["item"]] = item["cluster"]
        for metric, mark in item["marks"].items():
            found.marks.setdefault(metric, {})[item["item"]] = mark
    return found


class AnswerLog:
    """Answers by key in an append-only .jsonl; a line that a kill has torn is skipped, and asked again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Any] = {}
        make_folder(path.parent)
        with explained(path):
            contents = path.read_bytes() if path.exists() else b""
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, SHARED_MODE)
            for line in contents.splitlines():
                try:
                    entry = json.loads(line)
                    self._known[entry["key"]] = entry["answer"]
                except (ValueError, KeyError, TypeError):
                    continue
        self._is_torn = bool(contents) and not contents.endswith(b"\n")

    def get(self, key: str) -> Any | None:
        """Return the answer to a key, or None."""
        return self._known.get(key)

    def add(self, key: str, value: object) -> None:
        """Keep an answer; raise WorkspaceError where the disk refuses (then nothing of it is kept)."""
        line = json.dumps({"key": key, "answer": value}, ensure_ascii=False).encode() + b"\n"
        rest = memoryview(b"\n" + line if self._is_torn else line)
        self._is_torn = True
        with explained(self._path):
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        self._is_torn = False
        self._known[key] = value

    def close(self) -> None:
        """Make what was added durable."""
        with explained(self._path):
            try:
                os.fsync(self._descriptor)
            finally:
                os.close(self._descriptor)


def share_answers(workspace: Workspace, other: Workspace, target: str) -> None:
    """Let a target have what it answered in another workspace, and judges said of that, where it has nothing yet.

    Keys are hashes of what was asked and of who was: an answer that does not fit is never looked at.
    """
    for kept in sorted((other.eval / target).glob("*.jsonl")):
        mine = workspace.eval / target / kept.name
        if kept.name.endswith((".answers.jsonl", ".judgments.jsonl")) and not mine.exists():
            make_folder(mine.parent)
            publish_file(mine, kept.read_bytes())


def hold_scoring(workspace: Workspace, target: str, name: str) -> AbstractContextManager[None]:
    """Hold the lock of scoring a target on a benchmark, in a folder that is open to all who may see the workspace."""
    return hold(workspace.eval_lock(target, name), f"{name} of {target}", folder_mode=None)


def opened_log(path: Path) -> AbstractContextManager[AnswerLog]:
    """Open an answer log, and make it durable at the end, whatever happens in the block."""
    return closing(AnswerLog(path))


def publish_table(workspace: Workspace, files: Mapping[str, str]) -> list[Path]:
    """Write tables of scores beside the targets' folders, by file name; return their paths."""
    for name, text in files.items():
        workspace.store.put(f"eval/{name}", text.encode())
    return [workspace.eval / name for name in files]
