"""Trying what the protocol needs of a workspace's file system: rename, fsync, locks."""

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from fedcli.errors import BusyError, FedError
from fedcli.workspace.locks import hold
from fedcli.workspace.publish import TEMPORARY_PREFIX, publish_directory, sync


def probe_file_system(folder: Path) -> dict[str, str | None]:
    """Try each thing in a temporary folder of the workspace; return what is wrong with it by name, None where nothing.

    What a file system only pretends to do (an fsync that does not reach the disk) cannot be seen from here.
    """
    scratch = folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    try:
        scratch.mkdir()
    except OSError as error:
        return {"write": f"{folder}: {error.strerror}"}
    try:
        probes: dict[str, Callable[[Path], str | None]] = {"rename": _rename, "fsync": _fsync, "lock": _lock}
        return {name: _problem(probe, scratch) for name, probe in probes.items()}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _problem(probe: Callable[[Path], str | None], scratch: Path) -> str | None:
    try:
        return probe(scratch)
    except FedError as error:
        return error.message
    except OSError as error:
        return f"{error.strerror}: {error.filename}"


def _rename(scratch: Path) -> str | None:
    """The first of two publications under one name stands, whole; the second one loses."""
    final = scratch / "published"
    outcomes = [publish_directory(final, [("file", contents)], mode=0o644) for contents in (b"first", b"second")]
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
    path = scratch / "lock"
    with hold(path, "a probe"):
        try:
            with hold(path, "a probe"):
                return "a lock can be taken twice"
        except BusyError:
            return None
