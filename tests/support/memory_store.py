"""A workspace's store in memory, which can die at every call that changes it."""

import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath

from fedcli.workspace.publish import DISCARDED_PREFIX, TEMPORARY_PREFIX
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.store import Store


class Killed(BaseException):
    """The process that used the store is dead: nothing of fedcli catches it."""


class MemoryStore(Store):
    """Files by name; a store dies before or after its `dies_at`-th change, as a process does that is killed."""

    def __init__(self, files: dict[str, bytes] | None = None, *, dies_at: int = 0, dies_after: bool = False) -> None:
        self.contents = dict(files or {})
        self._times = dict.fromkeys(self.contents, time.time())
        self._num_changes = 0
        self._dies_at = dies_at
        self._dies_after = dies_after

    @contextmanager
    def _change(self) -> Iterator[None]:
        self._num_changes += 1
        dies = self._num_changes == self._dies_at
        if dies and not self._dies_after:
            raise Killed
        yield
        if dies:
            raise Killed

    def _below(self, folder: str) -> dict[str, str]:
        """Return the names of files below a folder, by their paths in it."""
        start = f"{folder}/" if folder else ""
        return {name.removeprefix(start): name for name in self.contents if name.startswith(start)}

    def read(self, name: str, limit: int) -> bytes:
        if name not in self.contents:
            raise FileNotFoundError(name)
        if len(contents := self.contents[name]) > limit:
            raise Refusal("size", f"{name} has {len(contents)} bytes, at most {limit} are allowed")
        return contents

    def names(self, folder: str) -> list[str]:
        return sorted({path.partition("/")[0] for path in self._below(folder)})

    def files(self, name: str) -> dict[str, int]:
        if name in self.contents:
            return {".": len(self.contents[name])}
        return {path: len(self.contents[full]) for path, full in self._below(name).items()}

    def exists(self, name: str) -> bool:
        return name in self.contents or bool(self._below(name))

    def modified(self, name: str) -> float:
        return self._times[name]

    def put_new(self, name: str, contents: bytes) -> bool:
        is_new = not self.exists(name)
        if is_new:
            self.put(name, contents)
        return is_new

    def put(self, name: str, contents: bytes) -> None:
        with self._change():
            self.contents[name] = bytes(contents)
            self._times[name] = time.time()

    def publish(self, folder: str, files: Iterable[tuple[str, bytes]], record: tuple[str, bytes]) -> bool:
        attempt = str(PurePosixPath(folder).with_name(TEMPORARY_PREFIX + uuid.uuid4().hex))
        for name, contents in (*files, record):
            self.put(f"{attempt}/{name}", contents)
        if self.exists(folder):
            self.delete(attempt)
            return False
        with self._change():
            self._move(attempt, folder)
        return True

    def set_aside(self, folder: str) -> bool:
        if not self.exists(folder):
            return False
        path = PurePosixPath(folder)
        with self._change():
            self._move(folder, str(path.with_name(f"{DISCARDED_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}")))
        return True

    def _move(self, folder: str, other: str) -> None:
        for path, name in self._below(folder).items():
            self.contents[f"{other}/{path}"] = self.contents.pop(name)
            self._times[f"{other}/{path}"] = self._times.pop(name)

    def delete(self, name: str) -> None:
        for doomed in [name] if name in self.contents else [*self._below(name).values()]:
            with self._change():
                del self.contents[doomed]

    def sweep(self, folder: str) -> None:
        for name in self.names(folder):
            if name.startswith(TEMPORARY_PREFIX):
                self.delete(f"{folder}/{name}" if folder else name)
