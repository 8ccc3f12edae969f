"""Reading files that other processes wrote: never through a link, never a FIFO, never more than expected."""

import errno
import hashlib
import io
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedcli.errors import WorkspaceError
from fedcli.workspace.refusal import Refusal

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_REFUSED = (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EACCES)
"""A link, a file for a folder, a FIFO or socket, what only its owner may read: all other errors are the machine's."""
_PIECE = 2**18
"""Bytes that are read, and hashed, at once."""


@contextmanager
def opened_folder(name: str | Path, *, parent: int | None = None) -> Iterator[int]:
    """Open a directory (below the open directory `parent`), yield its descriptor, and close it.

    Raises FileNotFoundError, Refusal(symlink) or Refusal(not_regular), WorkspaceError where this machine is in trouble.
    """
    descriptor = _open(name, _FOLDER_FLAGS, parent)
    try:
        yield descriptor
    finally:
        _close(descriptor)


def owner_of(descriptor: int, name: str | Path) -> int:
    """Return the user id that an open file or directory belongs to; raise WorkspaceError where it cannot be told."""
    try:
        return os.fstat(descriptor).st_uid
    except OSError as error:
        raise _trouble(name, error) from error


def read_file(name: str | Path, *, limit: int, parent: int | None = None, owner: int | None = None) -> bytes:
    """Read a regular file of at most `limit` bytes whole.

    Raises FileNotFoundError or Refusal: symlink, not_regular, owner (another user id than `owner`) or size; and
    WorkspaceError where this machine is in trouble.
    """
    with _opened_file(name, limit, parent, owner) as (file, size):
        contents = file.read(size + 1)
        if len(contents) > size:
            raise Refusal("size", f"{name} grew while it was read")
        return contents


def read_hashed(
    name: str | Path, buffer: memoryview, *, parent: int | None = None, owner: int | None = None
) -> tuple[memoryview, str]:
    """Read a regular file into a buffer that is larger than it; return the part that it fills, and its SHA-256.

    Each piece is hashed while the processor's cache has it. Raises as `read_file` does.
    """
    digest = hashlib.sha256()
    filled = 0
    with _opened_file(name, len(buffer) - 1, parent, owner) as (file, size):
        while count := file.readinto(buffer[filled : min(filled + _PIECE, size + 1)]):
            digest.update(buffer[filled : filled + count])
            filled += count
        if filled > size:
            raise Refusal("size", f"{name} grew while it was read")
    return buffer[:filled], digest.hexdigest()


def read_part(name: str | Path, start: int, end: int, *, parent: int | None = None, owner: int | None = None) -> bytes:
    """Read some bytes of a regular file, fewer where it ends before; raises as `read_file` does."""
    with _opened_file(name, sys.maxsize, parent, owner) as (file, _):
        file.seek(start)
        return file.read(end - start)


@contextmanager
def _opened_file(
    name: str | Path, limit: int, parent: int | None, owner: int | None
) -> Iterator[tuple[io.BufferedReader, int]]:
    """Open a regular file of at most `limit` bytes; yield it with its size."""
    descriptor = _open(name, _FILE_FLAGS, parent)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Refusal("not_regular", f"{name} is not a regular file")
        if owner is not None and status.st_uid != owner:
            raise Refusal("owner", f"{name} belongs to user {status.st_uid}, its folder to user {owner}")
        if status.st_size > limit:
            raise Refusal("size", f"{name} has {status.st_size} bytes, at most {limit} are allowed")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            yield file, status.st_size
    except OSError as error:
        raise _trouble(name, error) from error
    finally:
        _close(descriptor)


def _open(name: str | Path, flags: int, parent: int | None) -> int:
    try:
        return os.open(name, flags, dir_fd=parent)
    except FileNotFoundError:
        raise
    except OSError as error:
        if parent is None and isinstance(error, PermissionError):
            raise  # the server's own folders: nobody's update is at fault
        if error.errno not in _REFUSED:
            raise _trouble(name, error) from error
        with suppress(OSError):
            if stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                raise Refusal("symlink", f"{name} is a symbolic link") from error
        raise Refusal("not_regular", f"{name} cannot be opened: {error.strerror}") from error


def _close(descriptor: int) -> None:
    """Close what was only read: whatever the system says of it, nothing is lost."""
    with suppress(OSError):
        os.close(descriptor)


def _trouble(name: str | Path, error: OSError) -> WorkspaceError:
    return WorkspaceError(f"cannot read {name}: {error.strerror}", hint="Check this machine, then run it again.")
