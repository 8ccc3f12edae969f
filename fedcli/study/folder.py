"""A study's folder: study.yaml, a workspace for each cell, and what became of each cell."""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from fedcli.config import describe_overrides, read_document
from fedcli.config.section import Section
from fedcli.errors import FedError, UsageError, WorkspaceError, did_you_mean
from fedcli.server.create import template_folder
from fedcli.study.plan import Cell, Study, cell_key, parse_study, read_study, with_overrides
from fedcli.workspace.layout import CONFIG_NAME, STUDY_NAME
from fedcli.workspace.locks import is_held
from fedcli.workspace.publish import explained, make_folder, publish_file

SHIPPED_ROWS = "@benchmark_rows"
"""In a shipped study: fedcli's own few rows in the benchmarks' forms."""


class CellError(Section):
    """Why a cell failed."""

    message: str
    hint: str
    exit_code: int


class CellRecord(Section):
    """What became of a cell: `key` is of what it was run for, `fixed` what its workspace was made with."""

    key: str
    fixed: dict[str, Any]
    status: Literal["started", "done", "failed"]
    seconds: float = 0.0
    """Of all runs of the cell that have ended."""
    error: CellError | None = None


class StudyFolder:
    """The paths of one study, and its study.yaml as it is on disk when this is made."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.file = root / STUDY_NAME
        with explained(self.file):
            self.study: Study = read_study(self.file)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.name

    def workspace(self, cell: Cell) -> Path:
        """The folder of a cell's workspace."""
        return self.root / "cells" / cell.id

    def tables(self) -> Path:
        """The folder of what `study table` and `study plot` write."""
        return self.root / "tables"

    def report(self) -> Path:
        """The folder of what `study report` writes."""
        return self.root / "report"

    def lock(self, cell: Cell) -> Path:
        """The lock that whoever runs a cell holds."""
        return self.root / "state" / f"{cell.id.replace('/', '--')}.lock"

    def base_lock(self, fingerprint: str) -> Path:
        """The lock that whoever scores a base model holds."""
        return self.root / "state" / f"base-{fingerprint[:16]}.lock"

    def read(self, cell: Cell) -> CellRecord | None:
        """Return what became of a cell; None where it was never begun, or its record is damaged."""
        try:
            return CellRecord.model_validate_json(self._record(cell).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def write(self, cell: Cell, record: CellRecord) -> None:
        """Keep what became of a cell."""
        make_folder(self._record(cell).parent)
        publish_file(self._record(cell), record.model_dump_json(indent=1).encode())

    def is_done(self, cell: Cell) -> bool:
        """Return whether all is done that study.yaml, as it is now, asks of a cell."""
        record = self.read(cell)
        return record is not None and record.status == "done" and record.key == cell_key(self.study, cell)

    def is_running(self, cell: Cell) -> bool:
        """Return whether a process runs a cell now."""
        return is_held(self.lock(cell))

    def _record(self, cell: Cell) -> Path:
        return self.root / "state" / f"{cell.id.replace('/', '--')}.json"


def shipped_studies() -> dict[str, Path]:
    """Return the studies that fedcli ships, name -> file; the small form of NAME is NAME-tiny."""
    return {path.stem: path for path in sorted((template_folder() / "studies").glob("*.yaml"))}


def shipped_rows() -> Path:
    """Return fedcli's own few rows in the benchmarks' forms: inside the package, or a source tree's tests."""
    inside = template_folder() / "benchmark_rows"
    return inside if inside.is_dir() else template_folder().parent / "tests" / "benchmark_rows"


def create_study(
    what: str, root: Path, *, preset_set: str | None = None, overrides: tuple[str, ...] = ()
) -> tuple[StudyFolder, bool]:
    """Write study.yaml into a folder, from a shipped study or a file; return the study, and whether it is new.

    `preset_set` names a form of a shipped study, such as tiny. Raises UsageError for a name that is not known,
    ConfigError for a fault in the file, WorkspaceError where another study, or a workspace, lies there.
    """
    source, text = _source(what, preset_set, root)
    text = with_overrides(text, overrides, source)
    file = root / STUDY_NAME
    if (root / CONFIG_NAME).exists():
        raise WorkspaceError(f"{root.absolute()} holds a workspace", hint="Name another folder for the study.")
    if file.exists():
        with explained(file):
            standing = file.read_text(encoding="utf-8")
        if standing != text:
            raise WorkspaceError(
                f"{root.absolute()} already holds another study: its {STUDY_NAME} differs",
                hint=f"Name another folder; or edit that {STUDY_NAME}, and run `fedcli study run`.",
            )
        return StudyFolder(root.absolute()), False
    is_shipped = source in shipped_studies().values()
    settings = describe_overrides(overrides)
    named = settings or None if is_shipped else f"{source}{' with ' if settings else ''}{settings}"
    parse_study(read_document(text, source), file.absolute(), named)  # before anything is written
    make_folder(root.absolute())
    publish_file(file.absolute(), text.encode())
    return StudyFolder(root.absolute()), True


def _source(what: str, preset_set: str | None, root: Path) -> tuple[Path, str]:
    """Return a study's file and text: a shipped one's with the places of its rows, a user's with that of its paths."""
    known = shipped_studies()
    name = what if preset_set is None else f"{what}-{preset_set}"
    if name in known:
        text = known[name].read_text(encoding="utf-8")
        places = {SHIPPED_ROWS: shipped_rows(), "@studies": template_folder() / "studies"}
        for mark, folder in places.items():
            text = text.replace(mark, str(folder))
        return known[name], text
    path = Path(os.path.expanduser(what))
    if preset_set is not None and (what in known or not path.is_file()):
        forms = [found.removeprefix(f"{what}-") for found in known if found.startswith(f"{what}-")]
        hint = did_you_mean(preset_set, forms) if forms else did_you_mean(what, known)
        raise UsageError(f"there is no form {preset_set!r} of the study {what!r}", hint=hint)
    if not path.is_file():
        raise UsageError(f"no study and no file {what!r}", hint=f"{did_you_mean(what, known)} Or name a YAML file.")
    if preset_set is not None:
        raise UsageError("--preset-set is for shipped studies", hint="Leave it out, or edit the file.")
    with explained(path):
        text = path.read_text(encoding="utf-8")
    if "root:" not in text and path.resolve() != (root / STUDY_NAME).resolve():
        text = f"{text.rstrip()}\nroot: {path.absolute().parent}  # where relative paths start\n"
    return path, text


def find_study(given: Path | None) -> StudyFolder:
    """Return the study that `given`, $FEDCLI_STUDY or the nearest parent with a study.yaml names."""
    named = given or (Path(value) if (value := os.environ.get("FEDCLI_STUDY")) else None)
    here = Path.cwd()
    folders = (here, *here.parents) if named is None else (named,)
    for folder in folders:
        if (folder / STUDY_NAME).is_file():
            return StudyFolder(folder.absolute())
    where = f"no study here: neither {here} nor a folder above it" if named is None else f"{named.absolute()}"
    raise WorkspaceError(
        f"{where} holds {'a' if named is None else 'no'} {STUDY_NAME}",
        hint="Make one with `fedcli study init NAME`, or name its folder with --study DIR.",
    )


def error_record(error: FedError) -> CellError:
    """Return what is kept of an error."""
    return CellError(message=error.message, hint=error.hint, exit_code=error.exit_code)
