"""Stores of objects, in memory or on real servers of the loopback, and the process that dies at one of their calls."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedcli.stores.cloud import CloudObjects
from fedcli.stores.objects import Entry, Objects
from fedcli.stores.url import open_objects
from fedcli.workspace.address import workspace_at
from support.memory_store import Killed
from support.servers import azure_server, new_bucket, new_container, new_sftp_folder, s3_server, sftp_server

SERVERS = ("s3", "azure", "sftp")
"""Kinds of stores that a server of this machine has."""


def new_place(kind: str, patch: pytest.MonkeyPatch) -> str:
    """Return a URL at which nothing lies yet; from now on this process finds its server."""
    server = {"s3": s3_server, "azure": azure_server, "sftp": sftp_server}[kind]()
    patch.delenv("SSH_AUTH_SOCK", raising=False)  # its keys are of whoever runs the tests
    for name, value in server.environment.items():
        patch.setenv(name, value)
    if kind == "s3":
        return f"s3://{new_bucket(server.url)}/hospitals/study-1"
    if kind == "azure":
        return f"az://{new_container(server.url)}/hospitals/study-1"
    return f"{server.url}{new_sftp_folder()}/study-1"


def new_objects(kind: str, patch: pytest.MonkeyPatch) -> Objects:
    """Return a store in which nothing lies yet: "objects" is one in this process's memory, the others are servers'."""
    if kind == "objects":
        from obstore.store import MemoryStore

        return CloudObjects("memory://objects", MemoryStore())
    return open_objects(new_place(kind, patch))


def upload(folder: Path, url: str) -> str:
    """Put what of a workspace on disk is the protocol's where a URL says, and rows on this machine; return the URL."""
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    parts = ("fedcli.yaml", "workspace.json", "rounds", "inbox", "clients", "enrolment")
    files = {name.as_posix(): (folder / name).read_bytes() for name in names if name.parts[0] in parts}
    fill(open_objects(url), files)
    if (folder / "data").is_dir():
        shutil.copytree(folder / "data", workspace_at(url).root / "data")
    return url


def contents(objects: Objects, folder: str = "") -> dict[str, bytes]:
    """Return all objects by key."""
    return {key: objects.get(key, 2**30) for key in objects.below(folder)}


def fill(objects: Objects, files: Mapping[str, bytes]) -> Objects:
    """Put files into a store; return it."""
    for key, data in files.items():
        objects.put(key, data)
    return objects


class DyingObjects(Objects):
    """Another store's objects, of which the process that uses them dies before or after its `dies_at`-th change."""

    def __init__(self, objects: Objects, *, dies_at: int = 0, dies_after: bool = False) -> None:
        super().__init__(objects.address)
        self.objects = objects
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

    def get(self, key: str, limit: int) -> bytes:
        return self.objects.get(key, limit)

    def get_part(self, key: str, start: int, end: int) -> bytes:
        return self.objects.get_part(key, start, end)

    def head(self, key: str) -> Entry | None:
        return self.objects.head(key)

    def heads(self, keys: Sequence[str]) -> list[Entry | None]:
        return self.objects.heads(keys)

    def put(self, key: str, contents: bytes) -> None:
        with self._change():
            self.objects.put(key, contents)

    def create(self, key: str, contents: bytes) -> bool:
        with self._change():
            return self.objects.create(key, contents)

    def below(self, folder: str) -> dict[str, int]:
        return self.objects.below(folder)

    def names(self, folder: str) -> list[str]:
        return self.objects.names(folder)

    def delete(self, key: str) -> None:
        with self._change():
            self.objects.delete(key)
