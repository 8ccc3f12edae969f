"""Trying what the protocol needs of a workspace's file system: rename, fsync, locks."""

import time
from contextlib import ExitStack
from pathlib import Path

from fedcli.errors import BusyError, FedError
from fedcli.quantities import describe_seconds
from fedcli.workspace.history import Round
from fedcli.workspace.locks import hold
from fedcli.workspace.publish import publish_directory, sync, temporary_folder

LARGEST_SKEW = 60.0
"""Seconds by which two clocks may differ before it is said."""


def probe_file_system(folder: Path) -> dict[str, str | None]:
    """Try each thing in a temporary folder of the workspace; return what is wrong with it by name, None where nothing.

    What a file system only pretends to do (an fsync that does not reach the disk) cannot be seen from here.
    """
    found: dict[str, str | None] = {}
    with ExitStack() as stack:
        try:
            scratch = stack.enter_context(temporary_folder(folder))
        except OSError as error:
            return {"write": f"{folder}: {error.strerror}"}
        for name, probe in {"rename": _rename, "fsync": _fsync, "lock": _lock, "clock": _clock}.items():
            try:
                found[name] = probe(scratch)
            except FedError as error:
                found[name] = error.message
            except OSError as error:
                found[name] = f"{error.strerror}: {error.filename}"
    return found


def _rename(scratch: Path) -> str | None:
    """The first of two publications under one name stands, whole; the second one loses."""
    final = scratch / "published"
    outcomes = [publish_directory(final, [("file", contents)]) for contents in (b"first", b"second")]
    if outcomes == [True, False] and (final / "file").read_bytes() == b"first":
        return None
    return "a directory can be renamed onto one that is not empty"


def _fsync(scratch: Path) -> None:
    """Files and directories can be fsynced."""
    (scratch / "synced").touch()
    sync(scratch / "synced")
    sync(scratch)


def _lock(scratch: Path) -> str | None:
    """A lock that is held cannot be taken."""
    with hold(scratch / "lock", "a probe"):
        try:
            with hold(scratch / "lock", "a probe"):
                return "a lock can be taken twice"
        except BusyError:
            return None


def _clock(scratch: Path) -> str | None:
    """A file that is written now has a time that is about this machine's."""
    (scratch / "written").touch()
    return describe_skew(time.time() - (scratch / "written").stat().st_mtime)


def describe_skew(seconds: float) -> str | None:
    """Return how far this machine's clock is ahead of the file system's, in words; None where that does not matter."""
    if abs(seconds) <= LARGEST_SKEW:
        return None
    which = "ahead of" if seconds > 0 else "behind"
    return f"this machine's clock is {describe_seconds(abs(seconds))} {which} the file system's"


def describe_clock(head: Round) -> str | None:
    """Return what is odd about the time at which a round was opened; None where nothing is.

    Its manifest's time is the file system's. A copy of the workspace may have a later one, so an earlier one tells
    nothing.
    """
    opened, now = head.manifest.opened, time.time()
    ahead = max(head.published, opened or 0.0) - now
    if ahead > LARGEST_SKEW:
        which = "this machine's clock is behind, or the server's was ahead"
        return f"round {head.number} was opened {describe_seconds(ahead)} from now: {which}"
    if opened is not None and opened - head.published > LARGEST_SKEW:
        skew = describe_seconds(opened - head.published)
        return f"the server's clock was {skew} ahead of the file system's when it opened round {head.number}"
    if opened == 0.0 or now < 0:
        return "a clock was before 1970: deadlines mean nothing"
    return None
