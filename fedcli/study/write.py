"""The files of a study's tables."""

from pathlib import Path

from fedcli.study.folder import StudyFolder
from fedcli.study.render import SUFFIX, render
from fedcli.study.results import StudyTable
from fedcli.workspace.publish import make_folder, publish_file


def write_tables(folder: StudyFolder, table: StudyTable, like: str | None) -> list[Path]:
    """Write a table in every format into the study's tables/; return the paths."""
    make_folder(folder.tables())
    paths = []
    for form, suffix in SUFFIX.items():
        path = folder.tables() / f"{like or 'table'}.{suffix}"
        publish_file(path, render(table, form).encode())
        paths.append(path)
    return paths
