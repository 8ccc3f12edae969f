"""What may be carried from one store to another, file by file: what is there is never changed, but for a few rules."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from fedcli.observer import Observer
from fedcli.workspace.history import MAX_MANIFEST_BYTES
from fedcli.workspace.inbox import MAX_SIGNATURE_BYTES
from fedcli.workspace.parcels import Incomplete, Parcel
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.store import Store

MAX_SMALL_BYTES = 2**20
"""Of a file that may change: fedcli.yaml, a registration."""


@dataclass
class Carried:
    """What was carried from one place to another, and what was not, by name with the reason."""

    source: str
    target: str
    workspace: str
    is_first: bool = False
    """Whether the other place was empty, or a first copy that was interrupted."""
    carried: dict[str, int] = field(default_factory=dict)
    """How many, by kind."""
    num_bytes: int = 0
    arriving: dict[str, str] = field(default_factory=dict)
    """What is not whole where it comes from: a later call carries it."""
    differing: dict[str, str] = field(default_factory=dict)
    """What is there with other contents, which never change: a fork, or damage."""
    changed: dict[str, str] = field(default_factory=dict)
    """What may change, and has in both places, or nobody knows where."""
    left: dict[str, str] = field(default_factory=dict)
    """What is not carried on purpose: the other place has removed it, or set it aside."""
    ignored: list[str] = field(default_factory=list)
    """Names that are none of the protocol's, such as conflict copies and half-written files of other tools."""

    def count(self, kind: str, num_bytes: int) -> None:
        """Note that something of a kind was carried."""
        self.carried[kind] = self.carried.get(kind, 0) + 1
        self.num_bytes += num_bytes


class Judge(Protocol):
    """Tells which of two versions of a file that may change is the newer one, and remembers what both places have."""

    @property
    def replaces(self) -> bool:
        """Whether the source's takes the target's place wherever they differ."""

    def is_newer(self, name: str, ours: bytes, theirs: bytes | None) -> bool | None:
        """Return whether the source's is newer than the target's (None: it has none there); None: it cannot be told."""

    def agreed(self, name: str, contents: bytes) -> None:
        """Both places have these contents."""


@dataclass
class Carrier:
    """Carries single things from a store to another, and notes what came of it."""

    source: Store
    target: Store
    judge: Judge
    result: Carried
    observer: Observer

    def publish(self, kind: str, folder: str, read: Callable[[], Parcel]) -> bool:
        """Carry a published folder unless one stands there; return whether the same one is there now.

        It is read twice where it is not whole: `gc` may have removed what belonged to it meanwhile.
        """
        problem = ""
        for _ in range(2):
            try:
                parcel = read()
                if self.target.names(folder):
                    return self._is_same(parcel)
                self.observer.carrying(folder, parcel.num_bytes)
                if parcel.send(self.source, self.target):
                    self.result.count(kind, parcel.num_bytes)
                    return True
                return self._is_same(parcel)
            except Incomplete as incomplete:
                problem = str(incomplete)
        self.result.arriving[folder] = problem
        return False

    def _is_same(self, parcel: Parcel) -> bool:
        name = f"{parcel.folder}/{parcel.record_name}"
        theirs = self.read(self.target, name, MAX_MANIFEST_BYTES)
        if theirs != parcel.record:
            self.result.differing[name] = "it is not there, and the folder is" if theirs is None else "another is there"
        elif lost := parcel.missing_in(self.target):
            more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
            self.result.differing[parcel.folder] = (
                f"{lost[0]}{more} of its files is missing or cut short there: remove that folder, and carry it again"
            )
        return theirs == parcel.record

    def fixed(
        self,
        kind: str,
        name: str,
        limit: int,
        *,
        signature: str | None = None,
        fault: Callable[[bytes, bytes], str] | None = None,
    ) -> bool:
        """Carry a file that never changes, its signature first; return whether the same one is there now.

        `fault` tells what is wrong with the file and its signature: it would take the real one's place.
        """
        ours = self.read(self.source, name, limit)
        if ours is None:
            self.result.arriving[name] = "it is not there, or no file"
            return False
        theirs = self.read(self.target, name, limit)
        if theirs is None:
            self.observer.carrying(name, len(ours))
            put = self.target.put_new if signature is None else self._signed(name, ours, signature, fault)
            if put is None:
                return False
            if put(name, ours):
                self.result.count(kind, len(ours))
                return True
            theirs = self.read(self.target, name, limit)
        if theirs != ours:
            self.result.differing[name] = "another is there"
        return theirs == ours

    def _signed(
        self, name: str, contents: bytes, signature: str, fault: Callable[[bytes, bytes], str] | None
    ) -> Callable[[str, bytes], bool] | None:
        """Return what writes a file behind its signature; None where that is not right, or another lies there."""
        ours = self.read(self.source, signature, MAX_SIGNATURE_BYTES)
        if not ours:
            self.result.arriving[name] = f"{signature} is missing"
            return None
        if fault is not None and (problem := fault(contents, ours)):
            self.result.arriving[name] = problem
            return None
        if self.read(self.target, signature, MAX_SIGNATURE_BYTES) not in (None, ours):  # its writer may be at it
            self.result.differing[signature] = "another is there"
            return None
        return partial(self.target.put_new_signed, signature=ours)

    def changing(
        self, kind: str, name: str, *, first: tuple[str, bytes] | None = None, newer: bool | None = None
    ) -> None:
        """Carry a file that may change where this one is the newer; `first` is a file that is written before it.

        `newer` is what is known of it beforehand, None for nothing.
        """
        ours = self.read(self.source, name, MAX_SMALL_BYTES)
        if ours is None:
            return
        theirs = self.read(self.target, name, MAX_SMALL_BYTES)
        if theirs == ours:
            self.judge.agreed(name, ours)
            if first is not None and self.read(self.target, first[0], MAX_SIGNATURE_BYTES) != first[1]:
                self.target.put(*first)
            return
        if theirs is None and self.result.is_first:
            newer = True
        newer = self.judge.is_newer(name, ours, theirs) if newer is None else newer
        if newer is None:
            self.result.changed[name] = "both places have their own, and nothing tells which is newer"
        elif newer:
            self._replace(kind, name, ours, theirs, first)
        elif theirs is None:
            self.result.left[name] = "it was there, and has been removed since"

    def _replace(
        self, kind: str, name: str, ours: bytes, theirs: bytes | None, first: tuple[str, bytes] | None
    ) -> None:
        self.observer.carrying(name, len(ours))
        if first is not None:
            self.target.put(*first)
        if theirs is not None:
            self.target.put(name, ours)
        elif not self.target.put_new(name, ours):
            self.result.changed[name] = "another came there meanwhile"
            return
        self.judge.agreed(name, ours)
        self.result.count(kind, len(ours))

    def read(self, store: Store, name: str, limit: int) -> bytes | None:
        """Return a file; None where there is none, or what is no file, or may not be read."""
        try:
            return store.read(name, limit)
        except (FileNotFoundError, PermissionError, Refusal):
            return None
