"""Where the protocol's files lie: what a store must do, and the first one, a directory."""

import os
import shutil
import stat
import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath

from fedcli.errors import DeniedError, WorkspaceError
from fedcli.workspace import publish
from fedcli.workspace.read import opened_folder, owner_of, read_file, read_hashed, read_part
from fedcli.workspace.refusal import Refusal

_OPEN_FOLDER_MODE = 0o3777
"""Everybody may make an entry and nobody another's away; entries get the server's group, which may read them."""
_OTHERS = ("clients", "inbox")
"""Where other users write: what they let nobody read is theirs, and no trouble of this machine."""
_FOLDER_MODES = {"rounds": publish.SHARED_FOLDER_MODE, "inbox": publish.DROPPED_FOLDER_MODE}
"""Of the folders that are published in; others are as the umask has it."""

_WRITTEN_FOLDER_MODES = dict.fromkeys(("clients", "enrolment", "attempts", "repair"), publish.SHARED_FOLDER_MODE)
"""Of the folders of signatures, which all may read, whatever the umask."""


class Store(ABC):
    """Files by name, a POSIX path below the workspace.

    What has its final name is whole. `put_new` and `publish` are the only commits: of two that race, the first wins.
    """

    is_remote = False
    """Whether it is elsewhere, and each look at it a request; then it knows no users."""

    @abstractmethod
    def read(self, name: str, limit: int) -> bytes:
        """Return a file of at most `limit` bytes; raise FileNotFoundError, or Refusal for anything else."""

    def read_kept(self, name: str, limit: int, digest: str) -> bytes:
        """Return a file that should have this SHA-256, from a copy on this machine where there is one."""
        return self.read(name, limit)

    def kept(self, digest: str) -> bytes | None:
        """Return this machine's copy of a file by its SHA-256; None where it has none."""
        return None

    def keep(self, digest: str, contents: bytes) -> None:
        """Keep a file that was made here of others, where copies are kept."""
        return None

    def fetch_ahead(self, names: Sequence[str]) -> None:
        """Fetch small files that are read next, where one after another would take long."""
        return None

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Return the names of what lies in a folder, sorted; none where there is no folder."""

    @abstractmethod
    def files(self, name: str) -> dict[str, int]:
        """Return all files below a folder by their paths in it, with their sizes; a file is found as "."."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Return whether anything has this name, be it a broken link."""

    def forget(self) -> None:
        """Let go of copies on this machine that were never checked: what was made of them was damaged."""
        return None

    def uncached(self) -> "Store":
        """Return the same store without copies on this machine."""
        return self

    def existing(self, names: Sequence[str]) -> set[str]:
        """Return those of some names that something has."""
        return {name for name in names if self.exists(name)}

    @abstractmethod
    def modified(self, name: str) -> float:
        """Return when a file was written, in seconds since 1970 by the store's clock."""

    def version(self, name: str) -> object:
        """Return what changes whenever a file is written; None where it cannot be told."""
        return self.modified(name) if self.exists(name) else None

    def versions(self, names: Sequence[str]) -> list[object]:
        """Return the versions of several files, None of those that are not there."""
        return [self.version(name) for name in names]

    @abstractmethod
    def put_new(self, name: str, contents: bytes) -> bool:
        """Write a file durably; return False, and change nothing, where the name is taken."""

    def put_new_signed(self, name: str, contents: bytes, signature: bytes) -> bool:
        """Write a record X.json behind X.sig, which alone means nothing; return False where the record is there."""
        if self.exists(name):
            return False
        self.put(f"{name.removesuffix('.json')}.sig", signature)
        return self.put_new(name, contents)

    @abstractmethod
    def put(self, name: str, contents: bytes) -> None:
        """Write a file durably in place of what has its name."""

    @abstractmethod
    def publish(self, folder: str, files: Iterable[tuple[str, bytes]], record: tuple[str, bytes]) -> bool:
        """Make a folder of files, by path and contents, appear with its record at once or not at all, durably.

        Returns False where the folder is there already: then that one stands.
        """

    @abstractmethod
    def set_aside(self, folder: str) -> bool:
        """Give a published folder a hidden name beside it, durably; return False where there is none."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file, or a folder and all that is in it; what is not there is no error."""

    @contextmanager
    def opened(self, folder: str) -> "Iterator[Folder]":
        """Open a folder that may be a stranger's; raise FileNotFoundError or Refusal."""
        if not self.exists(folder):
            raise FileNotFoundError(folder)
        yield Folder(self, folder)

    def sweep(self, folder: str) -> None:
        """Remove what killed processes of this package left half-written in a folder, which nobody else writes in."""
        return None

    def sweep_abandoned(self) -> None:
        """Remove what killed processes of this package left half-written anywhere, a day ago or earlier."""
        return None

    def owner(self, name: str) -> int | None:
        """Return whose user's a file or folder is; None where it is nobody's, or not there."""
        return None

    def is_open(self, folder: str) -> bool:
        """Return whether any user may write in a folder."""
        return False

    def is_hidden(self, folder: str) -> bool:
        """Return whether a folder is there and closed to this user."""
        return False

    def link_to(self, name: str) -> Path | None:
        """Return the link on the way to what has a name, in which nobody but the operator may have put one."""
        return None

    def claim(self, folder: str) -> bool:
        """Make a folder that only this user writes in; return False where it is another's."""
        return True

    def share(self, folder: str, *, multi_user: bool) -> None:
        """Make a folder, where several users share the workspace one that all of them may write in."""
        return None


class Folder:
    """A folder of one user, opened once: what is read is what stood there then."""

    owner: int | None = None

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name

    def names(self) -> list[str]:
        """Return the names of what lies in it, sorted."""
        return self._store.names(self._name)

    def read(self, name: str, limit: int) -> bytes:
        """Return a file of at most `limit` bytes; raise FileNotFoundError, or Refusal for anything else."""
        return self._store.read(f"{self._name}/{name}", limit)

    def read_part(self, name: str, start: int, end: int) -> bytes:
        """Return some bytes of a file, fewer where it ends before; raise as `read` does."""
        return self.read(name, sys.maxsize)[start:end]

    def read_hashed(self, name: str, buffer: memoryview) -> tuple[memoryview, str]:
        """Read a file into a buffer that is larger; return the part that it fills, and its SHA-256."""
        contents = self.read(name, len(buffer) - 1)
        buffer[: len(contents)] = contents
        return buffer[: len(contents)], sha256(contents).hexdigest()


@dataclass(frozen=True)
class DirectoryStore(Store):
    """A directory on a local disk, NFS, Lustre or GPFS; a rename is the commit (docs/PROTOCOL.md).

    Only an entry of the directory itself, such as inbox/, may be a link to elsewhere.
    """

    root: Path

    def read(self, name: str, limit: int) -> bytes:
        try:
            return read_file(self.root / name, limit=limit)
        except PermissionError as error:
            if PurePosixPath(name).parts[0] not in _OTHERS:
                raise
            raise Refusal("not_regular", f"{name} cannot be opened: {error.strerror}") from error

    def names(self, folder: str) -> list[str]:
        """List a folder; over NFS the listing may be old."""
        try:
            return sorted(os.listdir(self.root / folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def files(self, name: str) -> dict[str, int]:
        """Walk a folder; no link is followed."""
        top = self.root / name
        paths = top.rglob("*") if top.is_dir() and not top.is_symlink() else [top] * os.path.lexists(top)
        return {
            path.relative_to(top).as_posix(): path.lstat().st_size
            for path in paths
            if path.is_symlink() or not path.is_dir()
        }

    def exists(self, name: str) -> bool:
        path = self.root / name
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return False
        except OSError as error:
            hint = "Check the disk, then run the command again; nothing is lost."
            raise WorkspaceError(f"cannot look at {path}: {error.strerror}", hint=hint) from error
        return True

    def modified(self, name: str) -> float:
        return (self.root / name).stat().st_mtime

    def version(self, name: str) -> object:
        try:
            found = os.stat(self.root / name)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino

    def put_new(self, name: str, contents: bytes) -> bool:
        return publish.publish_new_file(self.root / name, contents)

    def put(self, name: str, contents: bytes) -> None:
        path = self.root / name
        if PurePosixPath(name).parts[0] in _OTHERS and (link := self.link_to(name)) is not None:
            raise DeniedError(f"{link} is a symbolic link", hint="Ask the server's operator to remove it.")
        publish.make_folder(path.parent, _WRITTEN_FOLDER_MODES.get(PurePosixPath(name).parts[0]))
        publish.publish_file(path, contents)

    def publish(self, folder: str, files: Iterable[tuple[str, bytes]], record: tuple[str, bytes]) -> bool:
        """Write beside and rename; through a link nothing is published: whoever made it would get the files."""
        if (link := self.link_to(folder)) is not None:
            raise WorkspaceError(f"{link} is a symbolic link", hint="Ask the server's operator to remove it.")
        publish.make_folder((self.root / folder).parent, _FOLDER_MODES.get(PurePosixPath(folder).parts[0]))
        return publish.publish_directory(self.root / folder, [*files, record])

    def set_aside(self, folder: str) -> bool:
        """Rename a folder; of a link on the way the link, for through it another's folder would be moved."""
        path = self.link_to(folder) or self.root / folder
        with publish.explained(path):
            try:
                os.lstat(path)
            except (FileNotFoundError, NotADirectoryError):
                return False
            os.rename(path, path.with_name(f"{publish.DISCARDED_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}"))
            publish.sync(path.parent)
        return True

    def delete(self, name: str) -> None:
        path = self.root / name
        if (link := self.link_to(name)) is not None:
            raise WorkspaceError(f"{link} is a symbolic link", hint="Nothing is removed through it: put back a folder.")
        with publish.explained(path), suppress(FileNotFoundError):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    @contextmanager
    def opened(self, folder: str) -> "Iterator[Folder]":
        """Open each folder below the one before; from the second on no link is followed."""
        first, *below = PurePosixPath(folder).parts
        with ExitStack() as stack:
            descriptor = stack.enter_context(opened_folder((self.root / first).resolve()))
            owners = []
            for part in below:
                descriptor = stack.enter_context(opened_folder(part, parent=descriptor))
                owners.append(owner_of(descriptor, part))
            yield _OpenedFolder(self.root / folder, descriptor, owners)

    def sweep(self, folder: str) -> None:
        publish.remove_temporaries(self.root / folder)

    def sweep_abandoned(self) -> None:
        for folder, _, _ in os.walk(self.root):
            publish.remove_temporaries(Path(folder), older_than=publish.ABANDONED_SECONDS)

    def owner(self, name: str) -> int | None:
        try:
            return os.stat(self.root / name, follow_symlinks="/" not in name).st_uid
        except FileNotFoundError:
            return None

    def is_open(self, folder: str) -> bool:
        return bool(os.stat(self.root / folder).st_mode & stat.S_IWOTH)

    def is_hidden(self, folder: str) -> bool:
        return self.exists(folder) and not os.access(self.root / folder, os.R_OK | os.X_OK)

    def claim(self, folder: str) -> bool:
        """Make a folder that the server, of the same group, may read."""
        path = self.root / folder
        publish.make_folder(path, publish.DROPPED_FOLDER_MODE)
        found = os.lstat(path)
        if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode):
            return False
        with publish.explained(path):  # a join that was killed may have left it as the umask has it
            os.chmod(path, publish.DROPPED_FOLDER_MODE | (found.st_mode & (stat.S_ISGID | 0o070)))
        return True

    def share(self, folder: str, *, multi_user: bool) -> None:
        """Make a folder; a shared one is sticky, and gives the server's own group to what is made in it."""
        path = self.root / folder
        publish.make_folder(path)
        if multi_user and self.owner(folder) == os.geteuid():
            with publish.explained(path):
                os.chown(path, -1, os.getegid())  # in a project's folder it has the group that all parties are in
                os.chmod(path, _OPEN_FOLDER_MODE)

    def link_to(self, name: str) -> Path | None:
        between = PurePosixPath(name).parents
        return next((path for name in between[:-2] if (path := self.root / name).is_symlink()), None)


class _OpenedFolder(Folder):
    def __init__(self, path: Path, descriptor: int, owners: list[int]) -> None:
        self._path = path
        self._descriptor = descriptor
        self._owners = owners
        self.owner = owners[0]

    def names(self) -> list[str]:
        try:
            return sorted(os.listdir(self._descriptor))
        except OSError as error:
            hint = "Check this machine, then run it again."
            raise WorkspaceError(f"cannot list {self._path}: {error.strerror}", hint=hint) from error

    def read(self, name: str, limit: int) -> bytes:
        return read_file(name, limit=limit, parent=self._descriptor, owner=self._checked_owner())

    def read_part(self, name: str, start: int, end: int) -> bytes:
        return read_part(name, start, end, parent=self._descriptor, owner=self._checked_owner())

    def read_hashed(self, name: str, buffer: memoryview) -> tuple[memoryview, str]:
        return read_hashed(name, buffer, parent=self._descriptor, owner=self._checked_owner())

    def _checked_owner(self) -> int:
        """Return the user that every folder and file must belong to."""
        for owner in self._owners:
            if owner != self.owner:
                raise Refusal("owner", f"the update belongs to user {owner}, the client's inbox to user {self.owner}")
        return self._owners[0]
