"""A study's cells, one after another in this process, or in a few that each keep the base model loaded."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fedcli.client.runtimes import KeptModel
from fedcli.errors import BusyError, FedError, UsageError, did_you_mean, require_packages
from fedcli.eval.data import Files, find_roots
from fedcli.eval.endpoint import find_endpoint
from fedcli.eval.registry import BENCHMARKS, find_benchmarks, needed_packages
from fedcli.operations.pool import Died, Pool, Raised
from fedcli.study.folder import CellError, CellRecord, StudyFolder, error_record
from fedcli.study.plan import Cell, cell_key, cells_of
from fedcli.study.progress import CellTeller
from fedcli.study.run_cell import run_cell, unfinished
from fedcli.workspace.federation_state import POLL_SECONDS


class StudyObserver:
    """Receives what happens in a study. Each method does nothing; a display overrides those that it shows."""

    def planned(self, num_cells: int, num_done: int) -> None:
        """So many cells are in the study, so many of them done before."""

    def cell_started(self, cell: str) -> None:
        """A cell is next."""

    def cell_told(self, cell: str, text: str, to_keep: bool) -> None:
        """A cell is so far; or there is something to know of it, which is `to_keep`."""

    def cell_ended(self, cell: str, record: CellRecord) -> None:
        """A cell is done, or has failed."""

    def cells_awaited(self, cells: Sequence[str]) -> None:
        """Other processes run these cells; there is nothing else to do."""

    def cell_lost(self, cell: str) -> None:
        """The process that ran a cell is gone; another one goes on with it."""


@dataclass(frozen=True)
class StudyResult:
    """How a study stands after a run: its cells, how many this call ended well, and those that failed with why."""

    num_cells: int
    num_done: int
    num_run: int
    failed: dict[str, CellError]


def run_study(
    folder: StudyFolder, *, workers: int = 1, threads: int | None = None, only: Sequence[str] = (), watch: StudyObserver
) -> StudyResult:
    """Run what is missing of a study, `workers` cells at once, or of the cells that `only` names.

    A cell that fails is left, and tried again by the next call. A cell that another process runs is waited for. Raises
    UsageError for a cell that is not there, RequirementError where what all cells need is missing; of cells that failed
    the first one's kind of error, once all others have been run.
    """
    wanted = _wanted(folder, only)
    check_requirements(folder)
    todo = [cell for cell in unfinished(folder) if cell.id in wanted]
    watch.planned(len(wanted), len(wanted) - len(todo))
    ended: dict[str, CellRecord] = {}
    while todo:
        if workers == 1:
            results = _run_here(folder, todo, threads, watch)
        else:
            results = _run_beside(folder, todo, workers, threads, watch)
        for cell, record in results:
            ended[cell.id] = record
            watch.cell_ended(cell.id, record)
        todo = [cell for cell in unfinished(folder) if cell.id in wanted and cell.id not in ended]
        if todo and all(folder.is_running(cell) for cell in todo):
            watch.cells_awaited([cell.id for cell in todo])
            while all(folder.is_running(cell) for cell in todo):
                time.sleep(POLL_SECONDS)
    failed = {name: record.error for name, record in ended.items() if record.error is not None}
    num_done = sum(folder.is_done(cell) for cell in cells_of(folder.study) if cell.id in wanted)
    result = StudyResult(len(wanted), num_done, len(ended) - len(failed), failed)
    if failed:
        raise _failure(result)
    return result


def _wanted(folder: StudyFolder, only: Sequence[str]) -> set[str]:
    known = [cell.id for cell in cells_of(folder.study)]
    if unknown := [name for name in only if name not in known]:
        raise UsageError(f"there is no cell {unknown[0]!r}", hint=did_you_mean(unknown[0], known))
    return set(only or known)


def check_requirements(folder: StudyFolder) -> None:
    """Raise where a judge or the benchmarks' files are missing: training comes first, and takes long."""
    wanted = folder.study.eval
    if wanted.judge_model is not None and not Path(wanted.judge_model).is_dir():
        find_endpoint(wanted.judge_model, wanted.judge_url)
    benchmarks = find_benchmarks(wanted.benchmarks)
    require_packages(name for benchmark in benchmarks for name in needed_packages(benchmark))
    found = {name for each in benchmarks for name in (each.name, *each.parts)}
    for benchmark in map(BENCHMARKS.__getitem__, sorted(found)):
        source = benchmark.data
        if source is None or not source.files or _is_own(benchmark.name):
            continue
        if wanted.data is not None or (source.release is None and source.hub is None):  # nothing will be fetched
            roots = find_roots(None if wanted.data is None else Path(wanted.data))
            Files(benchmark.name, source, roots, may_fetch=False).require()
    if wanted.allow_code_execution:
        from fedcli.eval.sandbox import Sandbox

        Sandbox()


def _is_own(name: str) -> bool:
    """Return whether a benchmark's rows are the workspaces' own."""
    return name.startswith("demo")


def _failure(result: StudyResult) -> FedError:
    name, first = next(iter(result.failed.items()))
    kinds = {kind.exit_code: kind for kind in FedError.__subclasses__()}
    return kinds.get(first.exit_code, FedError)(
        f"{len(result.failed)} of {result.num_cells} cells failed, {name} first: {first.message}",
        hint=f"{first.hint} Then run `fedcli study run` again: what is done is kept; `fedcli study status` names all.",
    )


def _run_here(
    folder: StudyFolder, cells: Sequence[Cell], threads: int | None, watch: StudyObserver
) -> Iterator[tuple[Cell, CellRecord]]:
    """Run cells in this process, and yield each one's record; one that another process runs is passed over."""
    kept = KeptModel()
    for cell in cells:
        watch.cell_started(cell.id)
        teller = CellTeller(partial(watch.cell_told, cell.id))
        try:
            yield cell, run_cell(folder, cell, kept=kept, threads=threads, observer=teller)
        except BusyError:
            continue


def _run_beside(
    folder: StudyFolder, cells: Sequence[Cell], count: int, threads: int | None, watch: StudyObserver
) -> Iterator[tuple[Cell, CellRecord]]:
    """Run cells in up to `count` processes, and yield each one's record as it ends."""
    by_id = {cell.id: cell for cell in cells}
    with Pool[str](count, threads, _begin, folder.root, threads) as pool:
        results = pool.run(
            list(by_id),
            started=watch.cell_started,
            told=lambda cell, told: watch.cell_told(cell, *told),
            died=lambda cell, _: watch.cell_lost(cell),
        )
        for name, result in results:
            if isinstance(result, Died):
                result = _keep_failure(folder, by_id[name], result.error("runs"))
            if not isinstance(result, Raised):
                yield by_id[name], result
            elif not isinstance(result.error, BusyError):
                raise result.error


def _keep_failure(folder: StudyFolder, cell: Cell, error: FedError) -> CellRecord:
    key = cell_key(folder.study, cell)
    record = folder.read(cell) or CellRecord(key=key, fixed=cell.fixed, status="failed")
    record = record.model_copy(update={"status": "failed", "error": error_record(error)})
    folder.write(cell, record)
    return record


def _begin(root: Path, threads: int | None, send: Callable[[tuple[str, bool]], None]) -> Callable[[str], CellRecord]:
    """Return what runs a cell in a worker, which keeps its base model for the next one."""
    folder, kept, teller = StudyFolder(root), KeptModel(), CellTeller(lambda *told: send(told))
    cells = {cell.id: cell for cell in cells_of(folder.study)}
    return lambda name: run_cell(folder, cells[name], kept=kept, threads=threads, observer=teller)
