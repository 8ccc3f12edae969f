"""Locks save work; they are not what makes the protocol correct (the rename is)."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from fedcli.errors import BusyError, WorkspaceError
from fedcli.workspace.publish import PRIVATE_FOLDER_MODE, explained, make_folder

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@contextmanager
def hold(path: Path, purpose: str, *, folder_mode: int | None = PRIVATE_FOLDER_MODE) -> Iterator[None]:
    """Hold the lock file at `path` (flock: the kernel frees it when its holder dies); raise BusyError if it is taken.

    The file names its holder (host, pid, boot, start time, SLURM job), so that the error can say who it is. It is for
    its own user alone: who can read it could hold it for ever. A folder made for it has `folder_mode`, None for the
    umask's.
    """
    from filelock import FileLock, Timeout  # a command that only looks is not to wait for this import

    make_folder(path.parent, folder_mode)
    lock = FileLock(path, timeout=0, mode=0o600, fallback_to_soft=False)
    with explained(path):
        while not lock.is_locked:
            try:
                lock.acquire()
            except Timeout as error:
                if is_held(path):  # else somebody only asked
                    raise BusyError(
                        f"another process is busy with {purpose}: {_holder(path)}",
                        hint="Nothing to do: let it finish, or run this again later.",
                    ) from error
            except NotImplementedError as error:
                raise WorkspaceError(
                    f"the file system of {path} has no locks (flock)",
                    hint="Put the workspace on a file system that has them; on Lustre mount it with -o flock.",
                ) from error
    try:
        with explained(path):
            _name_holder(path)
        yield
    finally:
        with suppress(OSError):  # of closing a file that holds nothing; what failed before it is to be told
            lock.release()


def is_held(path: Path) -> bool:
    """Return whether some process holds a lock; one of another user, which cannot be told, is taken for held.

    It asks by taking the lock shared: that fails where a holder has it, and only there.
    """
    try:
        with path.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except (PermissionError, BlockingIOError):
        return True
    return False


def _name_holder(path: Path) -> None:
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "boot": _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else None,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }
    path.chmod(0o600)  # where an earlier version made it
    path.write_text(json.dumps(holder) + "\n")


def _holder(path: Path) -> str:
    """Return what the lock file says of its holder; it may be mid-write."""
    try:
        holder = json.loads(path.read_text())
        job = f", SLURM job {holder['slurm_job']}" if holder["slurm_job"] else ""
        return f"pid {holder['pid']} on {holder['host']}{job}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has not named itself yet"
