"""One file of several updates, read side by side, piece by piece: each is checked while it is read."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from fedcli.algos import Array, Arrays
from fedcli.algos.reducer import Stacks, filling
from fedcli.workspace.history import Round
from fedcli.workspace.inbox import StoredFile, Submission, origin_of, read_update
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.tensors import are_values, numbers


class SideBySide:
    """A file of several updates, for one pass: `stacks` read all of them from their beginnings to their ends.

    Then `faulty` tells whose file is not what its update.json says, or holds what no update may hold.
    """

    def __init__(self, base: Round, submissions: Sequence[Submission], name: str, origin: "Arrays | None") -> None:
        self._members = [_member(base, submission, name) for submission in submissions]
        self.stacks = Stacks(
            {tensor: entry.shape for tensor, entry in sorted(base.manifest.sent_tensors.items())},
            [
                filling(member.numbers, origin_of(each.record, name, origin))
                for member, each in zip(self._members, submissions, strict=True)
            ],
        )

    def faulty(self) -> list[int]:
        """Return the positions of the updates that are not whole, after a pass."""
        return [position for position, member in enumerate(self._members) if not member.is_whole()]


class _OnePass:
    """A file whose tensors lie in the order in which they are asked for: it is hashed on the way."""

    def __init__(self, base: Round, submission: Submission, name: str) -> None:
        self._base, self._client, self._name = base, submission.client, name
        self._spans = submission.spans[name]
        self._entry = submission.record.files[name]
        self._hash = hashlib.sha256()
        self._position = 0
        self._is_good = True

    def numbers(self, tensor: str, part: slice) -> Array:
        """Return a part of a flattened tensor; zeros from the first fault on."""
        span = self._spans[tensor].part(part)
        data = self._read(span.end)
        skipped = len(data) - (span.end - span.start)
        if self._is_good:
            with suppress(Refusal):
                found = numbers(data, span.moved(skipped))
                if are_values(found):
                    return found
            self._is_good = False
        return np.zeros(part.stop - part.start, np.float32)

    def is_whole(self) -> bool:
        """Return whether all of it has been read, and is what update.json says."""
        end = self._entry.bytes
        self._read(end)
        return self._is_good and not self._read_part(end, end + 1) and self._hash.hexdigest() == self._entry.sha256

    def _read(self, end: int) -> bytes:
        """Read on to a byte, and hash what is read; it may begin before what is asked for, with the header."""
        start, self._position = self._position, end
        data = self._read_part(start, end) if self._is_good else b""
        self._hash.update(data)
        self._is_good = self._is_good and len(data) == end - start
        return data

    def _read_part(self, start: int, end: int) -> bytes:
        workspace = self._base.workspace
        try:
            with workspace.store.opened(workspace.name(workspace.update(self._base.number, self._client))) as folder:
                return folder.read_part(self._name, start, end)
        except (FileNotFoundError, Refusal):
            self._is_good = False
            return b""


class _AnyOrder:
    """A file whose tensors lie in an order of their own: it is read and checked as a whole, then piece by piece."""

    def __init__(self, base: Round, submission: Submission, name: str) -> None:
        self._stored: StoredFile | None = None
        try:
            update = read_update(base, submission.client, reads_again=True)
        except Refusal:
            return
        if update is not None and update.sha256 == submission.sha256:
            self._stored = update.stored[name]

    def numbers(self, tensor: str, part: slice) -> Array:
        """Return a part of a flattened tensor; zeros where the file is faulty."""
        if self._stored is None:
            return np.zeros(part.stop - part.start, np.float32)
        return self._stored.numbers(tensor, part)

    def is_whole(self) -> bool:
        """Return whether the update was valid."""
        return self._stored is not None


def _member(base: Round, submission: Submission, name: str) -> _OnePass | _AnyOrder:
    spans = submission.spans[name]
    places = [spans[tensor].start for tensor in sorted(spans)]
    kind = _OnePass if places == sorted(places) else _AnyOrder
    return kind(base, submission, name)
