"""The folder of a report: its own earlier files are replaced, and nothing else is touched."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedcli.errors import WorkspaceError
from fedcli.workspace.publish import explained, make_folder, publish_file, remove_temporaries

PAGE_NAME = "report.html"


def publish_report(
    folder: Path, page: bytes, pictures: Mapping[str, bytes], names: Sequence[str], is_ours: Callable[[bytes], bool]
) -> Path:
    """Write the page and its pictures (PNGs by name) in place of an earlier report's; return the page's path.

    `names` are those that pictures of a report may have. Raises WorkspaceError where the folder holds anything that no
    report wrote.
    """
    path = folder / PAGE_NAME
    own = {f"{name}.png" for name in names}
    with explained(folder):
        standing = {name for name in os.listdir(folder) if not name.startswith(".")} if folder.is_dir() else set()
        is_report = path.is_file() and is_ours(path.read_bytes())
    if foreign := sorted(standing - (own | {PAGE_NAME} if is_report else set())):
        raise WorkspaceError(
            f"{folder} holds {foreign[0]}, which no report wrote",
            hint="Name a folder of its own for the report: --output DIR.",
        )
    make_folder(folder)
    publish_file(path, page)  # the first: it is what says that the folder is a report's, should this be interrupted
    remove_temporaries(folder)
    for name, contents in pictures.items():
        publish_file(folder / f"{name}.png", contents)
    with explained(folder):
        for name in (standing & own) - {f"{name}.png" for name in pictures}:
            (folder / name).unlink()
    return path
