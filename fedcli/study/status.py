"""How a study stands."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from fedcli.errors import FedError
from fedcli.federation import Federation
from fedcli.study.folder import CellError, StudyFolder
from fedcli.study.plan import Cell, cell_key, cells_of
from fedcli.study.run_cell import is_made

State = Literal["waiting", "running", "interrupted", "outdated", "failed", "done"]


@dataclass(frozen=True)
class CellStatus:
    """How a cell stands, how far its federation is, the seconds that it took so far, and why it failed.

    A cell is outdated where study.yaml asks for more than it did when the cell was run.
    """

    id: str
    status: State
    progress: str
    seconds: float
    error: CellError | None


@dataclass(frozen=True)
class StudyStatus:
    """How all cells stand; `seconds_left` is what the rest takes one at a time, if it takes as the done ones did.

    It is 0 where none is done yet.
    """

    cells: list[CellStatus]
    num_done: int
    num_failed: int
    seconds_left: float


def read_status(folder: StudyFolder) -> StudyStatus:
    """Return how a study stands."""
    cells = [_cell(folder, cell) for cell in cells_of(folder.study)]
    done = [cell for cell in cells if cell.status == "done"]
    each = sum(cell.seconds for cell in done) / len(done) if done else 0.0
    num_failed = sum(cell.status == "failed" for cell in cells)
    return StudyStatus(cells, len(done), num_failed, each * (len(cells) - len(done)))


def _cell(folder: StudyFolder, cell: Cell) -> CellStatus:
    record = folder.read(cell)
    state: State = "waiting"
    if folder.is_running(cell):
        state = "running"
    elif record is not None and record.key != cell_key(folder.study, cell):
        state = "outdated"
    elif record is not None:
        states: dict[str, State] = {"started": "interrupted", "failed": "failed", "done": "done"}
        state = states[record.status]
    progress = ""
    if state in ("running", "interrupted", "failed") and is_made(folder, cell) and cell.algorithm is not None:
        with suppress(FedError):  # damage is for `verify` to tell
            manifest = Federation.open(folder.workspace(cell)).state.head.manifest
            progress = f"round {manifest.round} of {manifest.rounds}"
    error = record.error if record is not None and state == "failed" else None
    return CellStatus(cell.id, state, progress, record.seconds if record is not None else 0.0, error)
