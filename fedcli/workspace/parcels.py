"""Published folders on their way to another store: one is whole once all that its record names lies in it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from fedcli.errors import FedError
from fedcli.stores.objects import UnlistableError
from fedcli.workspace.baselines import BASELINE_RECORD, BaselineRecord
from fedcli.workspace.history import MAX_MANIFEST_BYTES, MAX_RECORD_BYTES, prunable
from fedcli.workspace.inbox import MAX_SIGNATURE_BYTES, MAX_UPDATE_RECORD_BYTES
from fedcli.workspace.layout import (
    MANIFEST,
    MANIFEST_SIGNATURE,
    MASKED_FILE,
    PRUNED,
    SHARES_FILE,
    UPDATE_RECORD,
    UPDATE_SIGNATURE,
    Workspace,
)
from fedcli.workspace.parsing import parse_object, parse_record, sha256
from fedcli.workspace.records import FileEntry, Identity, Manifest, PrunedRecord
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.secure_files import MAX_BYTES
from fedcli.workspace.secure_records import ANSWER_RECORD, ANSWER_SIGNATURE, masked_schema
from fedcli.workspace.store import Store
from fedcli.workspace.tensors import largest_file

PLAIN_NAME = re.compile(r"(?!\.)[A-Za-z0-9_.\-]{1,200}(/(?!\.)[A-Za-z0-9_.\-]{1,200}){0,3}")
"""What a file of a published folder may be called: no way out of it, no hidden name."""


class Incomplete(Exception):
    """A published folder, or a record with its signature, is not whole yet, or not what its record says."""


@dataclass(frozen=True)
class Parcel:
    """A published folder as it is to be copied; `more` are small files of which the record gives no hash.

    `made` are small files that are written with it, and do not lie in it.
    """

    folder: str
    record_name: str
    record: bytes
    files: dict[str, FileEntry]
    more: dict[str, int]
    """By name, the most bytes that each may have."""
    made: tuple[tuple[str, bytes], ...] = ()

    @property
    def num_bytes(self) -> int:
        """The bytes of the files that the record lists, and of the record."""
        return len(self.record) + sum(entry.bytes for entry in self.files.values())

    def missing_in(self, target: Store) -> list[str]:
        """Return which files a store lacks, or has of another size, where the folder stands; of a pruned one none."""
        sizes = _sizes(target, self.folder)
        if PRUNED in sizes:
            return []
        return [name for name, entry in self.files.items() if sizes.get(name) != entry.bytes]

    def send(self, source: Store, target: Store) -> bool:
        """Publish it in another store, one file in memory at a time; return False where its name is taken there.

        Raises Incomplete where a file is missing, torn, another than the record says, or changes meanwhile; nothing
        has been published then.
        """
        sizes = _sizes(source, self.folder)
        for name, entry in self.files.items():
            if name not in sizes:
                raise Incomplete(f"{name} is missing")
            if sizes[name] != entry.bytes:
                raise Incomplete(f"{name} has {sizes[name]:,} of {entry.bytes:,} bytes")
        for name in self.more:
            if name not in sizes:
                raise Incomplete(f"{name} is missing")
        return target.publish(self.folder, self._contents(source), (self.record_name, self.record))

    def _contents(self, source: Store) -> Iterator[tuple[str, bytes]]:
        yield from self.made
        try:
            with source.opened(self.folder) as folder:
                for name, entry in self.files.items():
                    contents = folder.read(name, entry.bytes)
                    if len(contents) != entry.bytes or sha256(contents) != entry.sha256:
                        raise Incomplete(f"{name} does not have the hash that {self.record_name} gives")
                    yield name, contents
                    del contents
                for name, limit in self.more.items():
                    yield name, folder.read(name, limit)
                if folder.read(self.record_name, len(self.record)) != self.record:
                    raise Incomplete("it changed while it was copied")
        except FileNotFoundError as error:  # an OSError: the other store would take it for its own
            raise Incomplete(f"{error.filename or 'a file'} is missing") from error
        except Refusal as refusal:
            raise Incomplete(refusal.reason) from refusal


def round_parcel(workspace: Workspace, number: int, identity: Identity, *, with_weights: bool = True) -> Parcel:
    """Return a round; of one that `gc` has pruned what is left. Raises Incomplete where its record is not whole.

    Without `with_weights` it is left out what `gc` would remove, and PRUNED.json says so.
    """
    store, folder = workspace.store, workspace.name(workspace.round(number))
    contents = _record(store, folder, MANIFEST, MAX_MANIFEST_BYTES)
    manifest = read_manifest(workspace, number, contents, identity)
    files, more, made = {**manifest.files}, dict[str, int](), tuple[tuple[str, bytes], ...]()
    if manifest.enrolment is not None:
        more[MANIFEST_SIGNATURE] = MAX_SIGNATURE_BYTES
    pruned = _pruned(store, folder)
    if pruned is not None:
        there = store.files(folder)
        files = {name: entry for name, entry in files.items() if name in there or name not in pruned.files}
        more[PRUNED] = MAX_MANIFEST_BYTES
    elif not with_weights:
        gone = prunable(manifest)
        files = {name: entry for name, entry in files.items() if name not in gone}
        made = ((PRUNED, PrunedRecord(round=number, files=gone).to_bytes()),)
    return Parcel(folder, MANIFEST, contents, _plain(files), more, made)


def read_manifest(workspace: Workspace, number: int, contents: bytes, identity: Identity) -> Manifest:
    """Return a round's manifest; raise Incomplete where it is torn, or of another round or workspace."""
    try:
        manifest = parse_record(Manifest, contents, workspace.round(number) / MANIFEST)
    except FedError as error:
        raise Incomplete(error.message) from error
    if (manifest.round, manifest.workspace) != (number, identity.id):
        raise Incomplete(f"{MANIFEST} is of round {manifest.round} of workspace {manifest.workspace}")
    return manifest


def update_parcel(workspace: Workspace, base: Manifest, client: int, *, is_pruned: bool = False) -> Parcel:
    """Return a client's update of a round; of one whose round `gc` has pruned the record and its signature alone."""
    store, folder = workspace.store, workspace.name(workspace.update(base.round, client))
    contents = _record(store, folder, UPDATE_RECORD, MAX_UPDATE_RECORD_BYTES)
    limits = dict.fromkeys(base.update_files, largest_file(base.sent_tensors))
    if base.secure_aggregation is not None:
        limits = {MASKED_FILE: largest_file(masked_schema(base), 8), SHARES_FILE: MAX_BYTES}
    try:
        listed = parse_object(contents, UPDATE_RECORD).get("files")
        entries = listed.items() if isinstance(listed, dict) else ()
        files = {name: FileEntry.model_validate(entry) for name, entry in entries if name in limits}
    except (Refusal, ValidationError) as error:
        raise Incomplete(f"{UPDATE_RECORD} is not whole, or no record") from error
    for name in base.dropped_files:
        if name not in files:
            raise Incomplete(f"{UPDATE_RECORD} does not list {name}")
        if files[name].bytes > limits[name]:
            raise Incomplete(f"{name} has {files[name].bytes:,} bytes, at most {limits[name]:,} are allowed")
    more = {} if base.enrolment is None else {UPDATE_SIGNATURE: MAX_SIGNATURE_BYTES}
    if is_pruned:
        there = _sizes(store, folder)
        files = {name: entry for name, entry in files.items() if name in there}
    return Parcel(folder, UPDATE_RECORD, contents, files, more)


def _sizes(store: Store, folder: str) -> dict[str, int]:
    try:
        return store.files(folder)
    except UnlistableError as error:
        raise Incomplete(error.message) from error


def answer_parcel(workspace: Workspace, number: int, client: int) -> Parcel:
    """Return a client's answer to the repair of a round."""
    folder = workspace.name(workspace.answer(number, client))
    contents = _record(workspace.store, folder, ANSWER_RECORD, MAX_BYTES)
    return Parcel(folder, ANSWER_RECORD, contents, {}, {ANSWER_SIGNATURE: MAX_SIGNATURE_BYTES})


def baseline_parcel(workspace: Workspace, name: str) -> Parcel:
    """Return a baseline."""
    folder = workspace.name(workspace.baseline(name))
    contents = _record(workspace.store, folder, BASELINE_RECORD, MAX_RECORD_BYTES)
    try:
        record = parse_record(BaselineRecord, contents, workspace.baseline(name) / BASELINE_RECORD)
    except FedError as error:
        raise Incomplete(error.message) from error
    return Parcel(folder, BASELINE_RECORD, contents, _plain(record.files), {})


def _record(store: Store, folder: str, name: str, limit: int) -> bytes:
    """Return a folder's record, through no link; raise Incomplete where it is not there."""
    try:
        with store.opened(folder) as found:
            return found.read(name, limit)
    except FileNotFoundError as error:
        raise Incomplete(f"{name} is missing") from error
    except Refusal as refusal:
        raise Incomplete(refusal.reason) from refusal


def _pruned(store: Store, folder: str) -> PrunedRecord | None:
    try:
        return PrunedRecord.model_validate(parse_object(store.read(f"{folder}/{PRUNED}", MAX_MANIFEST_BYTES), PRUNED))
    except FileNotFoundError:
        return None
    except (Refusal, ValidationError) as error:
        raise Incomplete(f"{PRUNED} is not whole, or no record") from error


def _plain(files: dict[str, FileEntry]) -> dict[str, FileEntry]:
    """Return files as they are; raise Incomplete for a name that is none of a file in the folder."""
    for name in files:
        if not PLAIN_NAME.fullmatch(name):
            raise Incomplete(f"its record names {name[:80]!a}, which is no file of it")
    return files
