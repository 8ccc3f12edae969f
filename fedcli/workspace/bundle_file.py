"""Bundles: one file with a part of a workspace, for a stick or SFTP; a plain tar of regular files, read as a store.

A bundle is what `tarfile` writes as ustar, with nothing left open: each file mode 0644, of nobody, at time 0; the last
but one is bundle.json, which lists all others with their hashes, the last bundle.sig. The same contents are the same
bytes. What differs from that by a bit is refused.
"""

import hashlib
import io
import os
import re
import stat
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

from pydantic import Field, ValidationError

from fedcli.errors import IntegrityError, UsageError, WorkspaceError
from fedcli.workspace.inbox import MAX_SIGNATURE_BYTES
from fedcli.workspace.layout import WORKSPACE_ID
from fedcli.workspace.parcels import PLAIN_NAME
from fedcli.workspace.parsing import is_unchanged, parse_object, sealed, sha256
from fedcli.workspace.publish import explained, sync, temporary_folder
from fedcli.workspace.record import Finite, Natural, Record
from fedcli.workspace.records import FileEntry
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.store import Store

RECORD, SIGNATURE = "bundle.json", "bundle.sig"
MAX_RECORD_BYTES = 2**26
MOST_FILES = 10**6
_BLOCK = tarfile.BLOCKSIZE
_PIECE = 2**20
_NUMBER, _ID = r"\d{5,19}", r"(0|[1-9]\d{0,18})"
_NAME = re.compile(
    rf"fedcli\.yaml|workspace\.json|enrolment/{_NUMBER}\.(json|sig)|(attempts|repair)/round-{_NUMBER}-0\.(json|sig)"
    rf"|repair/round-{_NUMBER}-0-shares-[0-9a-f]{{64}}\.json|rounds/{_NUMBER}/(?P<round>.+)"
    rf"|clients/{_ID}\.(json|sig|leave)|clients/{_ID}\.acks/round-{_NUMBER}\.sig"
    rf"|inbox/{_ID}/(round-{_NUMBER}|repair-{_NUMBER}-0)/(?P<update>[^/]+)",
    re.ASCII,
)
"""What a bundle may hold."""


class BundleRecord(Record):
    """bundle.json: what a bundle is, and all other files in it."""

    protocol: Literal[1] = 1
    kind: Literal["round", "update"]
    workspace: str = Field(pattern=WORKSPACE_ID)
    round: Natural
    client: Natural | None
    """Whose an update bundle is."""
    files: dict[str, FileEntry]
    modified: dict[str, Finite]
    """Of files that may change, when they were written, by the clock of the place that they come from."""


@dataclass
class Bundle(Store):
    """An open bundle: files by name, of which each is read where it lies, and has the hash that bundle.json gives."""

    file: BinaryIO
    path: Path
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By name, where a file begins, and its bytes."""
    record: BundleRecord | None = None
    record_bytes: bytes = b""
    signature: bytes = b""
    is_remote = True  # nobody on this machine owns what is in it

    def read(self, name: str, limit: int) -> bytes:
        if name not in self.places:
            raise FileNotFoundError(2, "no such file in the bundle", name)
        begin, num_bytes = self.places[name]
        if num_bytes > limit:
            raise Refusal("size", f"{name} has {num_bytes} bytes, at most {limit} are allowed")
        self.file.seek(begin)
        contents = self.file.read(num_bytes)
        if self.record is not None and sha256(contents) != self.record.files[name].sha256:
            raise Refusal("hash", f"{name} has changed since the bundle was opened")
        return contents

    def names(self, folder: str) -> list[str]:
        return sorted({path.partition("/")[0] for path in self.files(folder) if path != "."})

    def files(self, name: str) -> dict[str, int]:
        if name in self.places:
            return {".": self.places[name][1]}
        start = f"{name}/" if name else ""
        found = ((path, place) for path, place in self.places.items() if path.startswith(start))
        return {path.removeprefix(start): num_bytes for path, (_, num_bytes) in found}

    def exists(self, name: str) -> bool:
        return bool(self.files(name))

    def modified(self, name: str) -> float:
        return 0.0 if self.record is None else self.record.modified.get(name, 0.0)

    def put_new(self, name: str, contents: bytes) -> bool:
        if name in self.places:
            return False
        self.put(name, contents)
        return True

    def put(self, name: str, contents: bytes) -> None:
        """Append a file, while the bundle is written."""
        if self.record is not None:
            raise self._refusal()
        try:
            header = _header(name, len(contents))
        except ValueError as error:
            hint = "Use `fedcli sync` for it."
            raise WorkspaceError(f"{name} does not fit into a bundle: {error}", hint=hint) from error
        self.file.seek(0, io.SEEK_END)
        self.file.write(header)
        self.places[name] = (self.file.tell(), len(contents))
        self.file.write(contents)
        self.file.write(bytes(-len(contents) % _BLOCK))

    def publish(self, folder: str, files: Iterable[tuple[str, bytes]], record: tuple[str, bytes]) -> bool:
        for name, contents in (*files, record):
            self.put(f"{folder}/{name}", contents)
        return True

    def set_aside(self, folder: str) -> bool:
        raise self._refusal()

    def delete(self, name: str) -> None:
        raise self._refusal()

    def _refusal(self) -> WorkspaceError:
        return WorkspaceError(f"{self.path} is a bundle, which never changes", hint="Name a folder to write to.")

    def entries(self) -> dict[str, FileEntry]:
        """Return all files with their hashes, one piece in memory at a time."""
        found = {}
        for name, (begin, num_bytes) in self.places.items():
            self.file.seek(begin)
            digest, left = hashlib.sha256(), num_bytes
            while left and (piece := self.file.read(min(left, _PIECE))):
                digest.update(piece)
                left -= len(piece)
            found[name] = FileEntry(sha256=digest.hexdigest(), bytes=num_bytes)
        return found


@contextmanager
def new_bundle(path: Path) -> Iterator[Bundle]:
    """Yield an empty bundle to fill, which becomes the file once it is `sealed_as`; an error leaves nothing.

    Raises UsageError where something stands there that is no bundle.
    """
    path = path.absolute()
    if os.path.lexists(path) and not _is_bundle(path):
        raise UsageError(f"{path} exists, and is no bundle", hint="Nothing is written over: name another file.")
    with explained(path), temporary_folder(path.parent) as folder:
        with (folder / "bundle").open("xb+") as file:
            bundle = Bundle(file, path)
            yield bundle
            assert bundle.record is not None
            file.flush()
            os.fsync(file.fileno())
        os.rename(folder / "bundle", path)
        sync(path.parent)


def seal_bundle(bundle: Bundle, record: BundleRecord, signature: bytes) -> None:
    """End a bundle that was filled with the record of what is in it, and its signature where there is one."""
    contents = sealed(record)
    bundle.put(RECORD, contents)
    if signature:
        bundle.put(SIGNATURE, signature)
    for name in (RECORD, SIGNATURE):
        bundle.places.pop(name, None)
    bundle.file.seek(0, io.SEEK_END)
    bundle.file.write(bytes(2 * _BLOCK))
    bundle.file.write(bytes(-bundle.file.tell() % tarfile.RECORDSIZE))
    bundle.record, bundle.record_bytes, bundle.signature = record, contents, signature


@contextmanager
def opened_bundle(path: Path) -> Iterator[Bundle]:
    """Open a bundle and check all of it but who signed it; raise IntegrityError with what is wrong first.

    Raises WorkspaceError where there is no such file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise WorkspaceError(f"cannot read {path}: {error.strerror}", hint="Name a bundle's file.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise WorkspaceError(f"{path} is no regular file", hint="Name a bundle's file.")
    with os.fdopen(descriptor, "rb") as file:
        bundle = Bundle(file, path)
        _index(bundle)
        record = _read_record(bundle)
        if [*record.files] != sorted(bundle.places):
            _refuse(bundle, "it holds other files than bundle.json lists")
        if any(record.files[name].bytes != num_bytes for name, (_, num_bytes) in bundle.places.items()):
            _refuse(bundle, "a file in it has another size than bundle.json says")
        if bundle.entries() != record.files:
            _refuse(bundle, "a file in it does not have the hash that bundle.json gives")
        bundle.record = record
        yield bundle


def _index(bundle: Bundle) -> None:
    """Find all files; every header must be the very one that `put` writes, and the end what `seal_bundle` does."""
    bundle.file.seek(0, io.SEEK_END)
    end, position = bundle.file.tell(), 0
    while True:
        bundle.file.seek(position)
        block = bundle.file.read(_BLOCK)
        if len(block) < _BLOCK:
            _refuse(bundle, "it is cut short")
        if not any(block):
            break
        name, num_bytes = _parse_header(bundle, block)
        begin = position + _BLOCK
        position = begin + num_bytes + -num_bytes % _BLOCK
        if name in bundle.places:
            _refuse(bundle, f"it holds {name} twice")
        if position > end:
            _refuse(bundle, "it is cut short")
        if len(bundle.places) > MOST_FILES:
            _refuse(bundle, f"it holds more than {MOST_FILES:,} files")
        bundle.file.seek(begin + num_bytes)
        if any(bundle.file.read(-num_bytes % _BLOCK)):
            _refuse(bundle, "there is something between its files")
        bundle.places[name] = (begin, num_bytes)
    size = position + 2 * _BLOCK
    size += -size % tarfile.RECORDSIZE
    bundle.file.seek(position)
    if end < size:
        _refuse(bundle, "it is cut short")
    if end != size or any(bundle.file.read(size - position)):
        _refuse(bundle, "something follows its end")


def _parse_header(bundle: Bundle, block: bytes) -> tuple[str, int]:
    try:
        found = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        is_ours = found.isreg() and block == _header(found.name, found.size)
    except (tarfile.HeaderError, ValueError):
        is_ours = False
    if not is_ours:
        _refuse(bundle, "it holds something that no bundle does")
    name = found.name
    match = _NAME.fullmatch(name)
    inner = None if match is None else (match["round"] or match["update"])
    if name not in (RECORD, SIGNATURE) and (match is None or (inner and not PLAIN_NAME.fullmatch(inner))):
        _refuse(bundle, f"it holds {name[:80]!a}, which no bundle does")
    if any(last in bundle.places for last in ((SIGNATURE,) if name == SIGNATURE else (RECORD, SIGNATURE))):
        _refuse(bundle, f"{name} stands behind its end")
    return name, found.size


def _header(name: str, num_bytes: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = num_bytes
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def _read_record(bundle: Bundle) -> BundleRecord:
    """Take bundle.json and its signature out of the files, and return what it says."""
    try:
        bundle.record_bytes = bundle.read(RECORD, MAX_RECORD_BYTES)
        if SIGNATURE in bundle.places:
            bundle.signature = bundle.read(SIGNATURE, MAX_SIGNATURE_BYTES)
        document = parse_object(bundle.record_bytes, RECORD)
        record = BundleRecord.model_validate(document)
    except (FileNotFoundError, Refusal, ValidationError):
        _refuse(bundle, f"{RECORD} is missing, or no record of one")
    if not is_unchanged(document):
        _refuse(bundle, f"{RECORD} has changed: its contents do not have the checksum that it names")
    for name in (RECORD, SIGNATURE):
        bundle.places.pop(name, None)
    return record


def _is_bundle(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            bundle = Bundle(file, path)
            _index(bundle)
            return RECORD in bundle.places
    except (OSError, IntegrityError):
        return False


def _refuse(bundle: Bundle, problem: str) -> NoReturn:
    raise IntegrityError(
        f"{bundle.path} is refused: {problem}", hint="Let it be made and copied again; nothing was taken from it."
    )
