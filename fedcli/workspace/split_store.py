"""A store in two places: a workspace elsewhere keeps scores, reports, jobs and a simulation's rows on this machine."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedcli.workspace.store import Folder, Store

LOCAL = ("baselines", "cron", "data", "eval", "logs", "private", "report", "slurm")
"""What of a workspace elsewhere lies on this machine."""


class SplitStore(Store):
    """Names that begin with one of LOCAL lie in one store, all others in the other."""

    def __init__(self, local: Store, remote: Store) -> None:
        self.local = local
        self.remote = remote
        self.is_remote = remote.is_remote

    def _of(self, name: str) -> Store:
        return self.local if name.partition("/")[0] in LOCAL else self.remote

    def read(self, name: str, limit: int) -> bytes:
        return self._of(name).read(name, limit)

    def read_kept(self, name: str, limit: int, digest: str) -> bytes:
        return self._of(name).read_kept(name, limit, digest)

    def kept(self, digest: str) -> bytes | None:
        return self.remote.kept(digest)

    def keep(self, digest: str, contents: bytes) -> None:
        self.remote.keep(digest, contents)

    def fetch_ahead(self, names: Sequence[str]) -> None:
        self.remote.fetch_ahead([name for name in names if self._of(name) is self.remote])

    def forget(self) -> None:
        self.remote.forget()

    def uncached(self) -> Store:
        return SplitStore(self.local, self.remote.uncached())

    def names(self, folder: str) -> list[str]:
        found = self._of(folder).names(folder)
        return sorted({*found, *(name for name in self.local.names("") if name in LOCAL)}) if not folder else found

    def files(self, name: str) -> dict[str, int]:
        return self._of(name).files(name)

    def exists(self, name: str) -> bool:
        return self._of(name).exists(name)

    def existing(self, names: Sequence[str]) -> set[str]:
        local = [name for name in names if self._of(name) is self.local]
        remote = [name for name in names if self._of(name) is self.remote]
        return self.local.existing(local) | self.remote.existing(remote)

    def modified(self, name: str) -> float:
        return self._of(name).modified(name)

    def version(self, name: str) -> object:
        return self._of(name).version(name)

    def versions(self, names: Sequence[str]) -> list[object]:
        if all(self._of(name) is self.remote for name in names):
            return self.remote.versions(names)
        return [self.version(name) for name in names]

    def put_new(self, name: str, contents: bytes) -> bool:
        return self._of(name).put_new(name, contents)

    def put_new_signed(self, name: str, contents: bytes, signature: bytes) -> bool:
        return self._of(name).put_new_signed(name, contents, signature)

    def put(self, name: str, contents: bytes) -> None:
        self._of(name).put(name, contents)

    def publish(self, folder: str, files: Iterable[tuple[str, bytes]], record: tuple[str, bytes]) -> bool:
        return self._of(folder).publish(folder, files, record)

    def set_aside(self, folder: str) -> bool:
        return self._of(folder).set_aside(folder)

    def delete(self, name: str) -> None:
        self._of(name).delete(name)

    @contextmanager
    def opened(self, folder: str) -> Iterator[Folder]:
        with self._of(folder).opened(folder) as opened:
            yield opened

    def sweep(self, folder: str) -> None:
        self._of(folder).sweep(folder)

    def sweep_abandoned(self) -> None:
        self.local.sweep_abandoned()
        self.remote.sweep_abandoned()

    def link_to(self, name: str) -> Path | None:
        return self._of(name).link_to(name)

    def is_hidden(self, folder: str) -> bool:
        return self._of(folder).is_hidden(folder)
