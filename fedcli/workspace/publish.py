"""Publication: write beside, fsync, rename. What has its final name is complete; a rename is the only commit point."""

import errno
import fcntl
import os
import re
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path, PurePosixPath

from fedcli.errors import DeniedError, WorkspaceError

TEMPORARY_PREFIX = ".tmp-"
DISCARDED_PREFIX = ".discarded-"
SHARED_MODE = 0o644
"""What everybody who shares the workspace reads: explicit, because a umask of 077 would hide it."""
DROPPED_FOLDER_MODE = 0o750
"""A client's inbox: its own user's, and the group's that the server reads it as."""
SHARED_FOLDER_MODE = 0o755
PRIVATE_FOLDER_MODE = 0o700
PRIVATE_MODE = 0o600
"""Rows: nobody but their user reads them."""
_FOLDER_MODE = 0o775
"""What the umask is taken from: whatever it is, only the user and the group write in a folder."""

ABANDONED_SECONDS = 24 * 3600
"""Nobody writes for so long at what has a temporary name, and adds nothing to it."""
_LOCKED = "f"
"""The 13th digit of a temporary name whose writer holds a lock on it; in those of earlier versions it is 4."""
_TEMPORARY_NAME = re.compile(re.escape(TEMPORARY_PREFIX) + "[0-9a-f]{32}")

_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_CURES = {
    errno.ENOSPC: "Free some space on that disk and run the command again; nothing is lost.",
    errno.EDQUOT: "Your disk quota is used up: free some space and run the command again; nothing is lost.",
    errno.EFBIG: "A limit on file sizes is in force (ulimit -f): raise it and run the command again; nothing is lost.",
    errno.EROFS: "The file system is mounted read-only: mount it writable and run the command again.",
    errno.EXDEV: "No folder of a lower layer of an overlay can be renamed: use a copy of the workspace.",
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM), "Ask the workspace's owner for write permission there, then run the command again."
    ),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "A file stands where a folder is needed: name another place."),
}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a WorkspaceError that names the path and the cure."""
    try:
        yield
    except OSError as error:
        kind = DeniedError if error.errno in _DENIED else WorkspaceError
        raise kind(
            f"cannot write {error.filename or path}: {error.strerror}",
            hint=_CURES.get(error.errno or 0, "Check the disk, then run the command again; nothing is lost."),
        ) from error


def publish_directory(final: Path, files: Iterable[tuple[str, bytes]]) -> bool:
    """Make `final` appear with all of `files` (relative POSIX name, contents) at once; return whether it is ours.

    False means that somebody else's directory already stands there. Raises WorkspaceError where the disk refuses.
    """
    folders: list[Path] = []
    with explained(final), temporary_folder(final.parent, mode=SHARED_FOLDER_MODE) as temporary:
        for name, contents in files:
            for parent in reversed(PurePosixPath(name).parents):
                if (folder := temporary / parent) not in folders:
                    if folder != temporary:
                        os.mkdir(folder)
                        os.chmod(folder, SHARED_FOLDER_MODE)
                    folders.append(folder)
            _write(temporary / name, contents, SHARED_MODE)
        for folder in reversed(folders):
            sync(folder)
        ours = os.lstat(temporary).st_ino
        try:
            os.rename(temporary, final)
        except OSError as error:
            # Over NFS a rename that was done can be reported as failed: what stands there decides.
            if not _is_inode(final, ours):
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                return False
        sync(final.parent)
        return _is_inode(final, ours)


def is_free(final: Path) -> bool:
    """Return whether nothing stands that a new folder would be written over: an empty folder is nothing."""
    with explained(final):
        return not os.path.lexists(final) or (final.is_dir() and not os.listdir(final))


def check_free(final: Path) -> None:
    """Raise WorkspaceError where a folder's name is not free."""
    if not is_free(final):
        raise WorkspaceError(
            f"{final} exists already, and nothing is written over", hint="Name another folder, or remove that one."
        )


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a folder to fill, which then becomes `final` at once, durably; an error leaves nothing.

    Raises WorkspaceError where something else stands there meanwhile, or the disk refuses.
    """
    make_folder(final.parent)
    with explained(final), temporary_folder(final.parent) as temporary:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                os.chmod(Path(folder) / name, SHARED_MODE)  # safetensors makes its files for their owner alone
                sync(Path(folder) / name)
            sync(Path(folder))
        check_free(final)
        ours = os.lstat(temporary).st_ino
        try:
            os.rename(temporary, final)
        except OSError:
            if not _is_inode(final, ours):  # else it was done, and reported as failed
                raise
        try:
            sync(final.parent)
        except OSError:
            os.rename(final, temporary)  # so that the next call finds the name free
            raise


def publish_file(final: Path, contents: bytes | memoryview, *, mode: int = SHARED_MODE) -> None:
    """Replace one file whole, durably."""
    with explained(final):
        make_folder(final.parent)
        with _temporary_file(final.parent, contents, mode) as temporary:
            os.rename(temporary, final)
        sync(final.parent)


def publish_new_file(final: Path, contents: bytes) -> bool:
    """Write one file whole, durably; return False, and change nothing, where something stands there."""
    with explained(final):
        make_folder(final.parent)
        with _temporary_file(final.parent, contents, SHARED_MODE) as temporary:
            ours = os.lstat(temporary).st_ino
            try:
                os.link(temporary, final)
            except OSError as error:
                if isinstance(error, FileExistsError) or _is_inode(final, ours):
                    return _is_inode(final, ours)
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                if os.path.lexists(final):  # without hard links there is no more than a look
                    return False
                os.rename(temporary, final)
        sync(final.parent)
        return True


def make_folder(folder: Path, mode: int | None = None) -> None:
    """Make a folder and its missing parents, durably; `mode` holds whatever the umask is, without it the umask does."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with explained(folder):
        try:
            os.mkdir(folder, _FOLDER_MODE if mode is None else mode)
            if mode is not None:
                os.chmod(folder, mode | (os.stat(folder).st_mode & stat.S_ISGID))
        except FileExistsError:
            return
        sync(folder.parent)


def remove_temporaries(folder: Path, *, older_than: float = 0) -> None:
    """Remove what killed processes of this package left half-written in a folder, where that may be; nothing else.

    Who holds no lock that keeps writers out spares what has a living writer, as far as locks tell; else what is not
    ABANDONED_SECONDS old. Each is renamed first: should its writer live after all, that one's own rename then fails,
    and it cannot publish what was emptied under its hands.
    """
    with suppress(OSError):  # such as a folder that several users share, or that is not there
        for entry in filter(lambda entry: _TEMPORARY_NAME.fullmatch(entry.name), folder.iterdir()):
            with suppress(OSError):
                if not older_than:
                    _remove_temporary(entry)
                elif _tells_by_lock(entry.name) and _remove_if_unlocked(entry):
                    pass
                elif time.time() - entry.lstat().st_mtime >= older_than:
                    _remove_temporary(entry)


def _remove_temporary(entry: Path) -> None:
    doomed = temporary_in(entry.parent)
    try:
        os.rename(entry, doomed)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        doomed = entry  # of a lower layer of an overlay, in which nobody writes
    shutil.rmtree(doomed, ignore_errors=True) if doomed.is_dir() else doomed.unlink()


def _remove_if_unlocked(entry: Path) -> bool:
    """Remove it if its writer has died, and return whether locks tell that on this file system.

    The lock is held meanwhile, so that a writer that begins takes another name.
    """
    descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # its writer lives
            return True
        except OSError:
            return False
        _remove_temporary(entry)
    finally:
        os.close(descriptor)
    return True


def temporary_in(folder: Path) -> Path:
    """Return a new temporary name in a folder; its digits tell that its writer holds a lock on it, and on which host.

    Only there do locks tell for certain whether the writer lives.
    """
    random = uuid.uuid4().hex
    return folder / f"{TEMPORARY_PREFIX}{random[:12]}{_LOCKED}{_host()}{random[21:]}"


def _host() -> str:
    return sha256(socket.gethostname().encode()).hexdigest()[:8]


def _tells_by_lock(name: str) -> bool:
    digits = name.removeprefix(TEMPORARY_PREFIX)
    return digits[12] == _LOCKED and digits[13:21] == _host()


@contextmanager
def temporary_folder(folder: Path, *, mode: int | None = None) -> Iterator[Path]:
    """Yield a new folder with a temporary name in `folder`, locked until it has been renamed or is removed.

    What killed processes left there goes first. `mode` holds whatever the umask is. Raises OSError.
    """
    remove_temporaries(folder, older_than=ABANDONED_SECONDS)
    descriptor = None
    while descriptor is None:
        path = temporary_in(folder)
        os.mkdir(path, _FOLDER_MODE)
        descriptor = _claimed(path)
    try:
        if mode is not None:
            os.chmod(path, mode)
        yield path
    finally:
        os.close(descriptor)
        shutil.rmtree(path, ignore_errors=True)


def _claimed(path: Path) -> int | None:
    """Open and lock a new folder; return None where somebody who sweeps was quicker."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError:
        os.rmdir(path)
        raise
    if _claim(descriptor, path):
        return descriptor
    os.close(descriptor)
    return None


@contextmanager
def _temporary_file(folder: Path, contents: bytes | memoryview, mode: int) -> Iterator[Path]:
    """Yield a new file with a temporary name, whole and fsynced, and locked until it has been renamed or is removed."""
    remove_temporaries(folder, older_than=ABANDONED_SECONDS)
    while True:
        path = temporary_in(folder)
        descriptor = os.open(path, _NEW, mode)
        try:
            lock = os.dup(descriptor)
            try:
                is_ours = _claim(lock, path)
                _fill(descriptor, contents, mode)
                if is_ours:
                    yield path
                    return
            finally:
                os.close(lock)
        finally:
            path.unlink(missing_ok=True)


def _claim(descriptor: int, path: Path) -> bool:
    """Lock what was just made; return False where somebody who sweeps the folder was quicker."""
    with suppress(OSError):  # without locks its age tells
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return _is_inode(path, os.fstat(descriptor).st_ino)


_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def _write(path: Path, contents: bytes, mode: int) -> None:
    """Write a new file and fsync it; close errors are raised too."""
    _fill(os.open(path, _NEW, mode), contents, mode)


def _fill(descriptor: int, contents: bytes | memoryview, mode: int) -> None:
    """Write a file, fsync and close it."""
    try:
        os.fchmod(descriptor, mode)
        rest = memoryview(contents)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Make a file that was written piece by piece, or a folder's list of names, durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_inode(path: Path, inode: int) -> bool:
    try:
        return os.lstat(path).st_ino == inode
    except FileNotFoundError:
        return False
