"""fedcli's cache: what can be made or fetched again."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedcli.errors import WorkspaceError


def cache_folder() -> Path:
    """Return where fedcli keeps what can be made again: $FEDCLI_CACHE, else fedcli in the user's cache folder."""
    if named := os.environ.get("FEDCLI_CACHE"):
        return Path(named).expanduser().absolute()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "fedcli"
    except RuntimeError as error:
        raise WorkspaceError("this user has no home folder", hint="Name a folder for it: FEDCLI_CACHE=DIR.") from error


@contextmanager
def writing_cache(folder: Path) -> Iterator[None]:
    """Turn what a disk raises into a WorkspaceError."""
    try:
        yield
    except OSError as error:
        raise WorkspaceError(
            f"cannot write fedcli's cache, {folder}: {error.strerror or error}",
            hint="Free some space or set its permissions right, or name another folder: FEDCLI_CACHE=DIR.",
        ) from error
