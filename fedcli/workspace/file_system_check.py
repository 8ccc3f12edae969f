"""Trying what the protocol needs of a workspace's file system: rename, fsync, locks."""

import shutil
from pathlib import Path

from fedcli.errors import BusyError, FedError
from fedcli.workspace.locks import hold
from fedcli.workspace.publish import publish_directory, sync, temporary_in


def probe_file_system(folder: Path) -> dict[str, str | None]:
    """Try each thing in a temporary folder of the workspace; return what is wrong with it by name, None where nothing.

    What a file system only pretends to do (an fsync that does not reach the disk) cannot be seen from here.
    """
    scratch = temporary_in(folder)
    try:
        scratch.mkdir()
    except OSError as error:
        return {"write": f"{folder}: {error.strerror}"}
    found: dict[str, str | None] = {}
    try:
        for name, probe in {"rename": _rename, "fsync": _fsync, "lock": _lock}.items():
            try:
                found[name] = probe(scratch)
            except FedError as error:
                found[name] = error.message
            except OSError as error:
                found[name] = f"{error.strerror}: {error.filename}"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
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
