"""What a user names a workspace by: a folder, or a URL."""

import errno
import os
import stat
from pathlib import Path

from fedcli.errors import WorkspaceError
from fedcli.printable import show_as
from fedcli.workspace.layout import CONFIG_NAME, STUDY_NAME, Workspace, remote_folder


def workspace_at(address: Path | str) -> Workspace:
    """Return the workspace at an address; nothing is asked of the disk or the store yet.

    Raises UsageError for a URL that names no place, RequirementError where the package for it is missing.
    """
    from fedcli.stores.url import is_url

    text = str(address)
    if not (isinstance(address, str) and is_url(text)):
        return Workspace(Path(text).absolute())
    from fedcli.stores.url import open_objects
    from fedcli.workspace.kept_entries import KeptEntries
    from fedcli.workspace.kept_objects import KeptObjects
    from fedcli.workspace.object_store import ObjectStore
    from fedcli.workspace.split_store import LOCAL, SplitStore
    from fedcli.workspace.store import DirectoryStore

    objects = open_objects(text)
    root = remote_folder(objects.address)
    show_as(str(root), objects.address, (*LOCAL, "server.lock"))
    remote = ObjectStore(objects, KeptObjects(_cache_folder()), KeptEntries(root / "enrolment.jsonl"))
    return Workspace(root, SplitStore(DirectoryStore(root), remote), objects.address)


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base).absolute() / "fedcli" / "objects"


def find_workspace(given: Path | str | None) -> Workspace:
    """Return the workspace that `given`, $FEDCLI_WORKSPACE or the nearest parent with a fedcli.yaml names.

    What is given may be a URL, of which nothing is asked yet.
    """
    named = given or os.environ.get("FEDCLI_WORKSPACE")
    if named:
        workspace = workspace_at(named)
        if not workspace.store.is_remote and not _holds_config(workspace.root):
            raise WorkspaceError(
                f"{workspace.root} is not a workspace: it holds no {CONFIG_NAME}",
                hint=f"Create one with `fedcli init {named}`.",
            )
        return workspace
    here = Path.cwd()
    for folder in (here, *here.parents):
        if _holds_config(folder):
            return Workspace(folder)
        if (folder / STUDY_NAME).is_file():
            raise WorkspaceError(
                f"{folder} is a study's folder, and no workspace",
                hint="See `fedcli study -h`, such as `fedcli study report`; each cell is a workspace: -w cells/"
                "PRESET/seed-S/LABEL.",
            )
    raise WorkspaceError(
        f"no workspace here: neither {here} nor a folder above it holds a {CONFIG_NAME}",
        hint="Create one with `fedcli init`, or name one with --workspace DIR.",
    )


def _holds_config(folder: Path) -> bool:
    """Return whether a folder holds a fedcli.yaml; raise WorkspaceError where the disk does not tell."""
    path = folder / CONFIG_NAME
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            return False
        hint = "Check the disk and the permissions, then run the command again."
        raise WorkspaceError(f"cannot look at {path}: {error.strerror}", hint=hint) from error
