"""enrolment/: who takes part, and under which keys; entries are only ever added, each names the hash of the one before.

What lies there is believed once `fedcli.trust` has checked who signed it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

from fedcli.errors import ArrivingError, IntegrityError
from fedcli.workspace.layout import Workspace, round_name
from fedcli.workspace.parsing import parse_record, sealed, sha256
from fedcli.workspace.record import Finite, Natural, Record, Sha256
from fedcli.workspace.records import EnrolmentHead, PublicKeys
from fedcli.workspace.refusal import Refusal

Action = Literal["server", "enrol", "leave", "revoke"]
MAX_ENTRY_BYTES = 64 * 1024
_RESTORE = "Restore enrolment/ from a backup: entries are never changed."


class EnrolmentEntry(Record):
    """enrolment/00000.json and on: the server's keys (also new ones), or that a client takes part, left or must go."""

    arrives = True
    protocol: Literal[1] = 1
    workspace: str
    number: Natural
    parent: Sha256 | None
    action: Action
    client: Natural | None = None
    keys: PublicKeys | None = None
    proof: str | None = None
    """Of a client's new keys: the old one's signature of their fingerprint."""
    time: Finite
    """In seconds since 1970 by the server's clock."""


@dataclass(frozen=True)
class StoredEntry:
    """An entry as it lies on disk, and what lies beside it as its signatures."""

    path: Path
    entry: EnrolmentEntry
    sha256: str
    signature: bytes


@dataclass(frozen=True)
class Member:
    """A client that takes part: its keys, and the hash of the entry that enrolled it under them."""

    keys: PublicKeys
    entry: str


@dataclass(frozen=True)
class Enrolment:
    """The chain, up to some entry."""

    entries: tuple[StoredEntry, ...] = ()

    @property
    def head(self) -> EnrolmentHead | None:
        """The last entry; None of an empty chain."""
        return EnrolmentHead(number=len(self.entries) - 1, sha256=self.entries[-1].sha256) if self.entries else None

    def up_to(self, head: EnrolmentHead | None) -> "Enrolment | None":
        """Return the chain as it was at an entry; None where that is not in it."""
        if head is None:
            return Enrolment()
        found = Enrolment(self.entries[: head.number + 1])
        return found if found.head == head else None

    @cached_property
    def server(self) -> PublicKeys | None:
        """The server's keys."""
        keys = [stored.entry.keys for stored in self.entries if stored.entry.action == "server"]
        return keys[-1] if keys else None

    @cached_property
    def members(self) -> dict[int, Member]:
        """Who takes part."""
        return {client: member for client, member in self._clients.items() if isinstance(member, Member)}

    @cached_property
    def gone(self) -> dict[int, Action]:
        """Who takes part no more, and why."""
        return {client: action for client, action in self._clients.items() if not isinstance(action, Member)}

    def keys_since(self, client: int, head: EnrolmentHead | None) -> list[PublicKeys]:
        """Return the keys of one that takes part, and those from which it went on to them since an entry, newest first.

        New keys of a revoked one that an operator enrolled, which no old key signed, have none before them.
        """
        found: list[PublicKeys] = []
        for entry in (stored.entry for stored in reversed(self.entries) if stored.entry.client == client):
            if entry.keys is None:
                break
            found.append(entry.keys)
            if entry.proof is None or head is None or entry.number <= head.number:
                break
        return found

    @cached_property
    def _clients(self) -> "dict[int, Member | Action]":
        found: dict[int, Member | Action] = {}
        for stored in self.entries:
            entry = stored.entry
            if entry.client is not None:
                enrols = entry.action == "enrol" and entry.keys is not None
                found[entry.client] = Member(entry.keys, stored.sha256) if enrols and entry.keys else entry.action
        return found


_KNOWN: WeakKeyDictionary[Workspace, Enrolment] = WeakKeyDictionary()


def read_enrolment(workspace: Workspace, *, anew: bool = False) -> Enrolment:
    """Read the chain, of which what this process has read before is read again only `anew`; empty where there is none.

    Raises IntegrityError where it is damaged or an entry is missing.
    """
    known = Enrolment() if anew else _KNOWN.get(workspace, Enrolment())
    if more := tuple(_read(workspace, known, is_complete=anew)):
        known = Enrolment((*known.entries, *more))
    _KNOWN[workspace] = known
    return known


def forget_enrolment(workspace: Workspace) -> None:
    """Let the next look at a chain read all of it."""
    _KNOWN.pop(workspace, None)


def _read(workspace: Workspace, known: Enrolment, *, is_complete: bool) -> Iterator[StoredEntry]:
    """Yield the entries that follow; with `is_complete` none may stand behind one that is missing."""
    number, parent = len(known.entries), None if known.head is None else known.head.sha256
    while (contents := _contents(workspace, path := _path(workspace, number))) is not None:
        entry = parse_record(EnrolmentEntry, contents, path)
        if (entry.number, entry.parent) != (number, parent):
            raise IntegrityError(f"{path} does not follow the entry before it", hint=_RESTORE)
        signature = _contents(workspace, path.with_suffix(".sig"))
        parent = sha256(contents)
        yield StoredEntry(path, entry, parent, signature or b"")
        number += 1
    names = workspace.store.names("enrolment") if is_complete else []
    entries = [name for name in names if re.fullmatch(r"[0-9]{5,}\.(json|sig)", name)]  # others are tools' own
    if later := [name for name in entries if name > f"{round_name(number)}.sig"]:
        raise ArrivingError(f"{path} is missing, and {later[0]} stands", hint=f"Wait until it is copied. {_RESTORE}")


def _contents(workspace: Workspace, path: Path) -> bytes | None:
    try:
        return workspace.store.read(workspace.name(path), MAX_ENTRY_BYTES)
    except FileNotFoundError:
        return None
    except Refusal as refusal:
        raise IntegrityError(f"{path} is damaged: {refusal.reason}", hint=_RESTORE) from refusal


def write_entry(workspace: Workspace, entry: EnrolmentEntry, contents: bytes, signature: bytes) -> None:
    """Append an entry: first its signature, which alone means nothing, then the entry, if its name is free."""
    path = _path(workspace, entry.number)
    if not workspace.store.put_new_signed(workspace.name(path), contents, signature):
        raise IntegrityError(
            f"{path} stands there already",
            hint="Another server was first: run the command again. `fedcli verify` tells whether it is the server's.",
        )


def entry_bytes(entry: EnrolmentEntry) -> bytes:
    """Return an entry as it is stored."""
    return sealed(entry)


def _path(workspace: Workspace, number: int) -> Path:
    return workspace.enrolment / f"{round_name(number)}.json"
