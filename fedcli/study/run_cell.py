"""One cell of a study: an ordinary workspace that is made, run and scored; each step goes on where it was."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedcli.client.runtimes import KeptModel
from fedcli.data.row_report import describe_rows
from fedcli.errors import BusyError, ConfigError, explain
from fedcli.federation import Federation
from fedcli.observer import Observer
from fedcli.parties.simulate import read_summary
from fedcli.scoring.own_adapters import OWN_PARTS, own_kind
from fedcli.scoring.request import Scoring
from fedcli.scoring.targets import BASE, Targets
from fedcli.study.folder import CellRecord, StudyFolder, error_record
from fedcli.study.plan import Cell, cell_key, cells_of
from fedcli.workspace.caches import share_tokens
from fedcli.workspace.federation_state import POLL_SECONDS
from fedcli.workspace.layout import Workspace
from fedcli.workspace.locks import hold
from fedcli.workspace.scores import share_answers


def run_cell(
    folder: StudyFolder, cell: Cell, *, kept: KeptModel, threads: int | None = None, observer: Observer
) -> CellRecord:
    """Do what is missing of a cell, keep what became of it, and return that; a failure is a result, too.

    `kept` holds the base model for the process's next cell. Raises BusyError while another process runs this cell.
    """
    with hold(folder.lock(cell), f"the cell {cell.id}"):
        before = folder.read(cell)
        if before is not None and folder.is_done(cell):
            return before
        begun, spent = time.monotonic(), before.seconds if before is not None else 0.0
        record = CellRecord(key=cell_key(folder.study, cell), fixed=cell.fixed, status="started", seconds=spent)
        status, error = "done", None
        try:
            _check_same(folder, cell, before)
            folder.write(cell, record)
            _work(folder, cell, kept, threads, observer)
        except Exception as found:  # whatever it is, the other cells have their turn
            status, error = "failed", error_record(explain(found))
            record = record.model_copy(update={"fixed": before.fixed}) if before is not None else record
        seconds = spent + time.monotonic() - begun
        record = record.model_copy(update={"status": status, "error": error, "seconds": seconds})
        folder.write(cell, record)
        return record


def _work(folder: StudyFolder, cell: Cell, kept: KeptModel, threads: int | None, observer: Observer) -> None:
    root = folder.workspace(cell)
    if not is_made(folder, cell):
        Federation.create(root, preset=cell.setting.preset, settings=cell.settings, observer=observer)
        if (split := read_summary(Workspace(root))) is not None:
            for line in describe_rows(split):
                observer.noted(line)
    federation = Federation.open(root, threads=threads, kept=kept)
    _share_tokens(folder, cell, federation)
    if cell.algorithm is not None:
        result = federation.run(observer=observer)
        for line in describe_rows(result, of=" of the clients' rows"):
            observer.noted(line)
        kind = own_kind(federation.state.head)
        targets = Targets(rounds=() if kind == OWN_PARTS else ("latest",), all_clients=kind is not None)
        federation.evaluate(request=_scoring(folder, targets, threads), observer=observer)
        return
    study = folder.study
    alone, pooled = study.alone(cell.config), "pooled" in study.baselines
    if BASE in study.baselines:
        with _alone_with_base(folder, federation):
            for other in _siblings(folder, cell, of="baselines"):
                share_answers(federation.workspace, other.workspace, BASE)
            federation.evaluate(request=_scoring(folder, Targets(base=True), threads), observer=observer)
    for client in alone:
        federation.client(client).train_alone(observer=observer)
    if pooled:
        federation.train_pooled(observer=observer)
    if alone or pooled:
        targets = Targets(alone=tuple(alone), pooled=pooled)
        federation.evaluate(request=_scoring(folder, targets, threads), observer=observer)


def _scoring(folder: StudyFolder, targets: Targets, threads: int | None) -> Scoring:
    wanted = folder.study.eval
    return Scoring(
        wanted.benchmarks,
        targets,
        folder.study.options,
        data=None if wanted.data is None else Path(wanted.data),
        judge_model=wanted.judge_model,
        judge_url=wanted.judge_url,
        allow_code_execution=wanted.allow_code_execution,
        threads=threads,
    )


def _check_same(folder: StudyFolder, cell: Cell, before: CellRecord | None) -> None:
    """Raise ConfigError where a cell's workspace was made with other settings than study.yaml has now."""
    if before is None or before.fixed == cell.fixed:
        return
    was, now = (set(map(str, (fixed["preset"], *fixed["settings"]))) for fixed in (before.fixed, cell.fixed))
    raise ConfigError(
        f"the cell {cell.id} was made with {', '.join(sorted(was - now)) or 'fewer settings'}; "
        f"{folder.file.name} now has {', '.join(sorted(now - was)) or 'fewer settings'}",
        hint=f"Set that back, give the changed preset or algorithm another name, or remove {folder.workspace(cell)} "
        "and its record in state/.",
    )


def _siblings(folder: StudyFolder, cell: Cell, *, of: str | None = None) -> Iterator[Federation]:
    """Yield the study's other workspaces that stand: those of the same preset and seed, or of a label."""
    for other in cells_of(folder.study):
        is_same = (
            (other.setting.name, other.seed) == (cell.setting.name, cell.seed) if of is None else other.label == of
        )
        if is_same and other.id != cell.id and is_made(folder, other):
            yield Federation.open(folder.workspace(other))


def _share_tokens(folder: StudyFolder, cell: Cell, federation: Federation) -> None:
    """Let a cell have the token ids of its rows from a cell of the same rows that has made them."""
    for other in _siblings(folder, cell):
        for client in range(federation.state.config.federation.clients):
            share_tokens(federation.workspace.private(client), other.workspace.private(client))


@contextmanager
def _alone_with_base(folder: StudyFolder, federation: Federation) -> Iterator[None]:
    """Wait until nobody else scores the same base model: what it answered there need not be asked here."""
    fingerprint = federation.state.head.manifest.model.fingerprint
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hold(folder.base_lock(fingerprint), "the scores of the base model"))
                break
            except BusyError:
                time.sleep(POLL_SECONDS)
        yield


def is_made(folder: StudyFolder, cell: Cell) -> bool:
    """Return whether a cell's workspace stands, its round 0 open."""
    return Workspace(folder.workspace(cell)).has_round(0)


def unfinished(folder: StudyFolder) -> Sequence[Cell]:
    """Return the cells of which something is missing, in the order in which they are run."""
    return [cell for cell in cells_of(folder.study) if not folder.is_done(cell)]
