"""Reading files that other processes wrote: never through a link, never a FIFO, never more than expected."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedcli.errors import WorkspaceError
from fedcli.workspace.refusal import Refusal

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextmanager
def opened_folder(name: str | Path, *, parent: int | None = None) -> Iterator[int]:
    """Open a directory (below the open directory `parent`), yield its descriptor, and close it.

    Raises FileNotFoundError, Refusal(symlink) or Refusal(not_regular).
    """
    try:
        descriptor = os.open(name, _FOLDER_FLAGS, dir_fd=parent)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _odd(name, parent, error, "directory") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_text(path: Path) -> str:
    """Read a text file of the workspace's owner; raise WorkspaceError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WorkspaceError(f"cannot read {path}: {error}", hint="Mend the file or its permissions.") from error


def read_file(name: str | Path, *, limit: int, parent: int | None = None, owner: int | None = None) -> bytes:
    """Read a regular file of at most `limit` bytes whole.

    Raises FileNotFoundError or Refusal: symlink, not_regular, owner (another user id than `owner`) or size.
    """
    try:
        descriptor = os.open(name, _FILE_FLAGS, dir_fd=parent)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _odd(name, parent, error, "regular file") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Refusal("not_regular", f"{name} is not a regular file")
        if owner is not None and status.st_uid != owner:
            raise Refusal("owner", f"{name} belongs to user {status.st_uid}, its folder to user {owner}")
        if status.st_size > limit:
            raise Refusal("size", f"{name} has {status.st_size} bytes, at most {limit} are allowed")
        with os.fdopen(os.dup(descriptor), "rb") as file:
            contents = file.read(min(limit, status.st_size) + 1)
    finally:
        os.close(descriptor)
    if len(contents) > status.st_size:
        raise Refusal("size", f"{name} grew while it was read")
    return contents


def _odd(name: str | Path, parent: int | None, error: OSError, wanted: str) -> Refusal | WorkspaceError:
    """Say why something could not be opened: what lies there is odd, or this machine is in trouble."""
    if error.errno not in (errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ENXIO):
        return WorkspaceError(f"cannot read {name}: {error.strerror}", hint="Check this machine, then run it again.")
    with suppress(OSError):
        if stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            return Refusal("symlink", f"{name} is a symbolic link")
    return Refusal("not_regular", f"{name} is not a readable {wanted}: {error.strerror}")
