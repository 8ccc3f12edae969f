"""A workspace in an object store or on an SFTP server: what a rename is on a disk, a create-only write is there.

A published folder is there once its record is: it is created last, and of two that race one stands. Its other files lie
where the record's hash leads (object_keys.py); what others put plainly beside the record is found, too.
"""

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import PurePosixPath

from fedcli.errors import DeniedError, FedError
from fedcli.stores.calls import AT_ONCE, at_once
from fedcli.stores.objects import Objects, TooLargeError, UnlistableError
from fedcli.workspace.kept_entries import KeptEntries
from fedcli.workspace.kept_objects import KeptObjects
from fedcli.workspace.layout import IDENTITY_NAME
from fedcli.workspace.object_folder import ObjectFolder
from fedcli.workspace.object_keys import (
    ATTEMPT,
    SIGNED_FOLDERS,
    attempt_key,
    attempt_name,
    key_below,
    record_of,
    without_attempt,
)
from fedcli.workspace.parsing import sha256
from fedcli.workspace.publish import ABANDONED_SECONDS, DISCARDED_PREFIX
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.store import Folder, Store

_MOST_RECORD_BYTES = 2**28
_ENROLMENT = "enrolment"
_MOST_AHEAD = 64 * 1024
_MOST_ASIDE = 64
_LARGEST_ASIDE = 2**32


class ObjectStore(Store):
    """A workspace's files in an object store; nobody owns them: signatures tell whose they are."""

    is_remote = True

    def __init__(self, objects: Objects, kept: KeptObjects | None = None, entries: KeptEntries | None = None) -> None:
        self.objects = objects
        self._kept = kept
        self._entries = entries
        self._has_fetched = False
        self._ahead: dict[str, bytes] = {}  # by key, what is to be read next
        self._is_closed: dict[str, bool] = {}  # inboxes: whether this user may read nothing there
        self._hashes: dict[str, str] = {}  # of records that never change: what leads to their files

    def read(self, name: str, limit: int) -> bytes:
        if self._entries is None or not name.startswith(f"{_ENROLMENT}/"):
            contents = self._read(name, limit)
            if self._entries is not None and name == IDENTITY_NAME:
                self._entries.open(sha256(contents))
            return contents
        if (kept := self._entries.get(name)) is not None and len(kept) <= limit:
            return kept
        if self._entries.is_empty and not self._has_fetched:
            self._has_fetched = True
            self._fetch_entries()
        contents = self._read(name, limit)
        self._entries.keep(name, contents)
        return contents

    def _fetch_entries(self) -> None:
        """Fetch all entries at once, and then all signatures."""
        records = [f"{_ENROLMENT}/{name}" for name in self.names(_ENROLMENT) if name.endswith(".json")]
        self.fetch_ahead(records)
        for record in records:
            if (contents := self._ahead.get(record)) is not None:
                self._remember(record, contents)
        self.fetch_ahead([f"{record.removesuffix('.json')}.sig" for record in records])

    def fetch_ahead(self, names: Sequence[str]) -> None:
        """Fetch small files at once, which are then read once each without a request."""
        keys = [key for key in map(self._key, names) if key not in self._ahead]

        def fetched(key: str) -> bytes | None:
            try:
                return self.objects.get(key, _MOST_AHEAD)
            except (FileNotFoundError, TooLargeError, FedError):
                return None  # whoever reads it is told why

        found = zip(keys, at_once([partial(fetched, key) for key in keys], AT_ONCE), strict=True)
        self._ahead |= {key: contents for key, contents in found if contents is not None}

    def _read(self, name: str, limit: int) -> bytes:
        record = record_of(name)
        if record is not None and name != record:
            with suppress(FileNotFoundError):
                return self._get(self._key(name), limit)
        contents = self._get(name, limit)
        if name == record or PurePosixPath(name).parts[0] in SIGNED_FOLDERS:
            self._remember(name, contents)
        return contents

    def read_kept(self, name: str, limit: int, digest: str) -> bytes:
        """Return a file by its SHA-256, from this machine's cache where it is there."""
        if (kept := self.kept(digest)) is not None and len(kept) <= limit:
            return kept
        contents = self.read(name, limit)
        if sha256(contents) == digest:
            self.keep(digest, contents)
        return contents

    def kept(self, digest: str) -> bytes | None:
        return None if self._kept is None else self._kept.get(digest)

    def keep(self, digest: str, contents: bytes) -> None:
        if self._kept is not None:
            self._kept.keep(digest, contents)

    def forget(self) -> None:
        if self._entries is not None:
            self._entries.forget()

    def uncached(self) -> Store:
        return ObjectStore(self.objects)

    def _get(self, key: str, limit: int) -> bytes:
        if (contents := self._ahead.pop(key, None)) is not None and len(contents) <= limit:
            return contents
        try:
            return self.objects.get(key, limit)
        except TooLargeError as error:
            raise Refusal("size", f"{key} has {error.num_bytes} bytes, at most {limit} are allowed") from error

    def names(self, folder: str) -> list[str]:
        if record_of(folder) is not None:
            return sorted({path.partition("/")[0] for path in self.files(folder)})
        found = [name for name in self.objects.names(folder) if not ATTEMPT.fullmatch(name)]
        while folder == "rounds" and found and not self._is_begun(f"rounds/{found[-1]}"):
            found.pop()
        return found

    def _is_begun(self, folder: str) -> bool:
        """Return whether more is there of a folder than attempts to publish it."""
        record = record_of(folder)
        return record is None or self.objects.head(record) is not None or bool(self.names(folder))

    def files(self, name: str) -> dict[str, int]:
        """List what is below a folder, of published ones what their record stands for."""
        start = f"{name}/" if name else ""
        found = self.objects.below(name)
        if not found:
            keys = [self._key(name), name] if name else []
            there = [entry for entry in self.objects.heads(keys) if entry is not None]
            return {".": there[0].num_bytes} if there else {}
        attempts: dict[str, str] = {}
        files: dict[str, int] = {}
        for path, num_bytes in sorted(found.items()):
            logical, attempt = without_attempt(start + path)
            if attempt is not None and (record := record_of(logical)) is not None:
                if record not in attempts:
                    attempts[record] = self._attempt(record)
                if attempt != attempts[record]:
                    continue
            path = logical.removeprefix(start)
            if attempt is not None or path not in files:
                files[path] = num_bytes
        return files

    def _attempt(self, record: str) -> str:
        """Return the name of the folder of a record's files; "" where there is no record."""
        if record in self._hashes:
            return self._hashes[record]
        try:
            contents = self._get(record, _MOST_RECORD_BYTES)
        except (FileNotFoundError, Refusal):  # one of too many bytes leads to no files
            return ""
        self._remember(record, contents)
        return attempt_name(contents)

    def _remember(self, record: str, contents: bytes) -> None:
        """Keep the hash of a record that nobody replaces: updates may be set aside, and sent again."""
        if not record.startswith("inbox/"):
            self._hashes[record] = attempt_name(contents)

    def exists(self, name: str) -> bool:
        record = record_of(name)
        if record is None or name == record:
            return self._is_there(name)
        if name == str(PurePosixPath(record).parent):
            return self._is_seen(record)
        return any(entry is not None for entry in self.objects.heads([self._key(name), name]))

    def _is_there(self, name: str) -> bool:
        """Return whether there is an object; of a name without a suffix also whether there is a folder."""
        if self.objects.head(name) is not None:
            return True
        return not PurePosixPath(name).suffix and bool(self.objects.names(name))

    def _key(self, name: str) -> str:
        """Return where a file lies: below its attempt's folder where its record is there."""
        record = record_of(name)
        attempt = "" if record is None or name == record else self._attempt(record)
        return key_below(name, record, attempt) if record is not None and attempt else name

    def existing(self, names: Sequence[str]) -> set[str]:
        records = [record_of(name) or name for name in names]
        try:
            there = [entry is not None for entry in self.objects.heads(records)]
            self._is_closed |= dict.fromkeys(map(_inbox_of, records), False)
        except DeniedError:
            there = at_once([partial(self._is_seen, record) for record in records], AT_ONCE)
        return {name for name, is_there in zip(names, there, strict=True) if is_there}

    def _is_seen(self, record: str) -> bool:
        """Return whether a record is there; of one that may not be read a list of its folder tells."""
        try:
            is_there = self.objects.head(record) is not None
        except DeniedError:
            self._is_closed[_inbox_of(record)] = True
            folder, _, name = record.rpartition("/")
            try:
                return name in self.objects.names(folder)
            except UnlistableError:
                return True  # something is there, and whoever may read it finds out what
        self._is_closed[_inbox_of(record)] = False
        return is_there

    def is_hidden(self, folder: str) -> bool:
        """Return whether nothing in an inbox may be read: that is told of what is not there, too."""
        inbox = _inbox_of(f"{folder}/-")
        if inbox not in self._is_closed:
            self._is_seen(f"{folder}/-")
        return self._is_closed[inbox]

    def modified(self, name: str) -> float:
        entry = self.objects.head(record_of(name) or name)
        if entry is None:
            raise FileNotFoundError(name)
        return entry.modified

    def version(self, name: str) -> object:
        entry = self.objects.head(name)
        return None if entry is None else entry.version

    def versions(self, names: Sequence[str]) -> list[object]:
        return [None if entry is None else entry.version for entry in self.objects.heads(names)]

    def put_new(self, name: str, contents: bytes) -> bool:
        return self.objects.create(name, contents)

    def put_new_signed(self, name: str, contents: bytes, signature: bytes) -> bool:
        """Write the signature where the contents' hash leads: another server's is not in the way."""
        sign = PurePosixPath(name).with_suffix(".sig")
        if self.objects.head(name) is not None:
            return False
        self.objects.put(attempt_key(str(sign), name, contents), signature)
        return self.objects.create(name, contents)

    def put(self, name: str, contents: bytes) -> None:
        self.objects.put(name, contents)

    def publish(self, folder: str, files: Iterable[tuple[str, bytes]], record: tuple[str, bytes]) -> bool:
        """Put the files that are not there yet, as after a kill, and create the record."""
        name, contents = f"{folder}/{record[0]}", record[1]
        if record_of(folder) != name:
            raise ValueError(f"{folder} is no folder that a record {record[0]} publishes")
        if self.objects.head(name) is not None:
            return False
        found: dict[str, bytes] = {}
        for path, data in files:
            key = attempt_key(f"{folder}/{path}", name, contents)
            there = self.objects.head(key)
            if there is not None and there.num_bytes == len(data):
                found[key] = data
            else:
                self.objects.put(key, data)
        is_new = self.objects.create(name, contents)
        for key, data in found.items() if is_new else ():
            if self.objects.head(key) is None:  # whoever set the last one aside was removing it
                self.objects.put(key, data)
        return is_new

    def set_aside(self, folder: str) -> bool:
        """Copy a folder, then remove its record, then the rest: killed between, it is done again.

        Of what a party has put there beside an update's few files of bounded size no copy is made.
        """
        record = record_of(folder)
        if record is None or self.objects.head(record) is None:
            return False
        path = PurePosixPath(folder)
        aside = path.with_name(f"{DISCARDED_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}")
        for name, num_bytes in sorted(self.files(folder).items())[:_MOST_ASIDE]:
            if num_bytes <= _LARGEST_ASIDE:
                self.objects.put(f"{aside}/{name}", self.read(f"{folder}/{name}", _LARGEST_ASIDE))
        self.delete(folder)
        return True

    def delete(self, name: str) -> None:
        """Remove a file or a folder; of a published one the record first, without which the rest means nothing."""
        record = record_of(name)
        below = {f"{name}/{path}" for path in self.objects.below(name)} - {record}
        # listed before the record is removed: from then on its party may put the next ones
        if record is not None and name == str(PurePosixPath(record).parent):
            self.objects.delete(record)
        elif record is not None and name != record and (key := self._key(name)) != name:
            self.objects.delete(key)
        for key in below:
            self.objects.delete(key)
        if not below:
            self.objects.delete(name)

    @contextmanager
    def opened(self, folder: str) -> Iterator[Folder]:
        record = record_of(folder)
        contents = None
        if record is not None:
            with suppress(FileNotFoundError):
                contents = self._get(record, _MOST_RECORD_BYTES)
        if contents is None and not self.names(folder):
            raise FileNotFoundError(folder)
        yield ObjectFolder(self, self.objects, folder, record, contents)

    def sweep(self, folder: str) -> None:
        """Remove attempts that lost, and of those that have no record the ones that a day has passed."""
        self._sweep(folder, older_than=ABANDONED_SECONDS)
        self.objects.sweep_temporary(folder, ABANDONED_SECONDS)

    def sweep_abandoned(self) -> None:
        for folder in ("rounds", "inbox"):
            self._sweep(folder, older_than=ABANDONED_SECONDS)
        self.objects.sweep_temporary("", ABANDONED_SECONDS)

    def _sweep(self, folder: str, *, older_than: float) -> None:
        start = f"{folder}/" if folder else ""
        try:
            found = self.objects.below(folder)
        except UnlistableError:  # what lies beside such a key is swept all the same
            with suppress(UnlistableError):
                for name in self.objects.names(folder):
                    self._sweep(start + name, older_than=older_than)
            return
        attempts: dict[str, dict[str, list[str]]] = {}
        for path in found:
            logical, attempt = without_attempt(start + path)
            if attempt is not None and (record := record_of(logical)) is not None:
                attempts.setdefault(record, {}).setdefault(attempt, []).append(start + path)
        for record, keys_of in attempts.items():
            if record.removeprefix(start) in found and len(keys_of) == 1:
                continue  # its own, most likely, and not worth a request for each round there ever was
            own = self._attempt(record)
            for key in (key for attempt, keys in keys_of.items() if attempt != own for key in keys):
                entry = None if own else self.objects.head(key)
                if entry is None or time.time() - entry.modified > older_than:
                    with suppress(DeniedError):  # whose key may not delete leaves that to whoever may
                        self.objects.delete(key)


def _inbox_of(name: str) -> str:
    """Return the inbox that a file lies in, of others the folder at the top."""
    return "/".join(name.split("/")[:2])
