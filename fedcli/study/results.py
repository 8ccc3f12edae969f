"""A study's scores: rows (baselines and algorithms) x metrics, over seeds, with differences to a row and ranks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import stdev

from fedcli.errors import NotReadyError, UsageError, did_you_mean
from fedcli.eval.benchmark import Metric
from fedcli.eval.registry import BENCHMARKS, find_benchmarks
from fedcli.eval.statistics import Score, average_ranks, difference_over_seeds
from fedcli.scoring.targets import BASE
from fedcli.study.columns import Column, PublishedTable
from fedcli.study.folder import StudyFolder, shipped_studies
from fedcli.study.plan import ALONE, LOCAL, Cell, PresetEntry, Study, TableConfig, cells_of, read_study
from fedcli.study.run_cell import is_made
from fedcli.workspace.baselines import baseline_name
from fedcli.workspace.layout import Workspace
from fedcli.workspace.scores import ItemMarks, ScoreRecord, read_marks, read_scores, scored_name
from fedcli.workspace.target_name import TargetName

BEST_ALONE, MEAN_ALONE = "best-alone", "mean-alone"
_DERIVED = (BEST_ALONE, MEAN_ALONE)
_TITLES = {
    BASE: "base",
    LOCAL: "local (client 0 alone)",
    BEST_ALONE: "best client alone, of each metric",
    MEAN_ALONE: "mean of the clients alone",
    "pooled": "pooled rows",
}


@dataclass(frozen=True)
class StudyScore:
    """A row's score in a column: mean and sample deviation over seeds (None for one seed), and its rank there.

    `difference` is to the row that all are compared with, resampled over seeds and items; `published` is a
    publication's figure. `by_seed` is empty where only that is known.
    """

    by_seed: Mapping[int, float]
    rank: int | None = None
    difference: Score | None = None
    published: float | None = None

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return math.fsum(self.by_seed.values()) / len(self.by_seed)

    @property
    def deviation(self) -> float | None:
        """The sample deviation over seeds; None for one."""
        return stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None


@dataclass(frozen=True)
class Block:
    """The table of one preset: rows in order (label -> title), columns, scores, and average ranks."""

    preset: str
    title: str
    rows: Mapping[str, str]
    columns: tuple[Column, ...]
    scores: Mapping[tuple[str, str], StudyScore]
    """By the row's label and the column's title."""
    average_rank: Mapping[str, float]
    against: str


@dataclass(frozen=True)
class StudyTable:
    """The tables of a study's presets, the publication whose figures they have, and what a reader must know."""

    title: str
    blocks: tuple[Block, ...]
    num_seeds: int
    source: str | None
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class _Source:
    """One scored model of a cell."""

    cell: Cell
    target: str


def make_table(folder: StudyFolder, *, like: str | None = None, against: str | None = None) -> StudyTable:
    """Return what a study has so far, in its own layout or in that of a shipped study.

    Raises UsageError for a study or a row that is not there, NotReadyError where there are no scores yet.
    """
    study = folder.study
    layout, paper = _layout(study, like or study.table.like)
    notes: dict[str, None] = {}
    blocks = tuple(
        _block(folder, setting, layout, paper, against or layout.against, notes) for setting in study.presets
    )
    if not any(score.by_seed for block in blocks for score in block.scores.values()):
        raise NotReadyError("no cell of the study has scores yet", hint="`fedcli study run` makes them.")
    if paper is not None and paper.note:
        notes[paper.note] = None
    if study.eval.limit is not None:
        notes[f"scores are of a sample: eval.limit is {study.eval.limit} items of each benchmark or subject"] = None
    if any(label == BEST_ALONE for block in blocks for label in block.rows):
        notes["best client alone: chosen by these very scores, in each metric and seed, which flatters it"] = None
    return StudyTable(study.title, blocks, len(study.seeds), paper.source if paper else None, tuple(notes))


def _layout(study: Study, like: str | None) -> tuple[TableConfig, PublishedTable | None]:
    """Return columns and published figures: the study's own, or a shipped study's."""
    if like is None:
        return study.table, study.paper
    known = shipped_studies()
    if like not in known:
        raise UsageError(f"--like {like}: there is no such study", hint=did_you_mean(like, known))
    other = read_study(known[like])
    table = other.table.model_copy(update={"against": study.table.against or other.table.against})
    return table, other.paper


def _block(
    folder: StudyFolder,
    setting: PresetEntry,
    layout: TableConfig,
    paper: PublishedTable | None,
    against: str,
    notes: dict[str, None],
) -> Block:
    cells = [cell for cell in cells_of(folder.study) if cell.setting.name == setting.name]
    scored = Scored(folder)
    rows = _rows(folder.study, cells)
    columns = layout.columns or scored.columns(cells)
    titles = {label: _TITLES.get(label, _client_title(label)) for label in rows}
    against = against or next(iter(rows))
    if against not in rows:
        raise UsageError(f"--against {against}: there is no such row", hint=did_you_mean(against, rows))
    values: dict[tuple[str, str], dict[int, float]] = {}
    for label, row in rows.items():
        for column in columns:
            found = {
                seed: value
                for seed, sources in row.items()
                if (value := scored.value(_chosen(scored, label, sources, column), column)) is not None
            }
            if found:
                values[label, column.shown] = found
            missing = len(row) - len(found)
            if 0 < missing < len(row):
                notes[f"{setting.name}, {label}: {len(found)} of {len(row)} seeds so far"] = None
    notes |= dict.fromkeys(scored.notes(cells))
    means = {place: round(math.fsum(found.values()) / len(found), 12) for place, found in values.items()}  # of ranks
    ranked = [label for label in rows if label not in _DERIVED and any(label == row for row, _ in values)]
    scores: dict[tuple[str, str], StudyScore] = {}
    for (label, title), found in values.items():
        column = next(column for column in columns if column.shown == title)
        better = [
            other
            for other in ranked
            if (other, title) in means and _signed(column, means[other, title]) > _signed(column, means[label, title])
        ]
        lead = None
        if label != against and (against, title) in values:
            seeds = sorted(found.keys() & values[against, title].keys())
            mine, theirs = (
                [_chosen(scored, name, rows[name][seed], column) for seed in seeds] for name in (label, against)
            )
            lead = scored.difference(mine, theirs, column) if seeds else None
        published = paper.figure(setting.name, label, title) if paper else None
        rank = len(better) + 1 if label in ranked else None
        scores[label, title] = StudyScore(found, rank, lead, published)
    for label in paper.labels(setting.name) if paper else ():
        for column in columns:
            figure = paper.figure(setting.name, label, column.shown) if paper else None
            if figure is not None and (label, column.shown) not in scores:
                titles.setdefault(label, label)
                scores[label, column.shown] = StudyScore({}, published=figure)
    complete = [column for column in columns if ranked and all((label, column.shown) in means for label in ranked)]
    ranks = average_ranks(
        {label: [means[label, column.shown] for column in complete] for label in ranked},
        [_metric(column).higher_is_better for column in complete],
    )
    if 0 < len(complete) < len(columns):
        left_out = ", ".join(column.shown for column in columns if column not in complete)
        notes[
            f"{setting.name}: the average rank is over {len(complete)} of {len(columns)} columns, without {left_out}"
        ] = None
    title = setting.title or setting.name
    return Block(setting.name, title, titles, tuple(columns), scores, ranks if len(ranked) > 1 else {}, against)


def _rows(study: Study, cells: Sequence[Cell]) -> dict[str, dict[int, list[_Source]]]:
    """Return the rows by label: for each seed the models that are scored for it."""
    rows: dict[str, dict[int, list[_Source]]] = {}

    def add(label: str, cell: Cell, targets: Sequence[str]) -> None:
        rows.setdefault(label, {})[cell.seed] = [_Source(cell, target) for target in targets]

    for cell in cells:
        if cell.algorithm is None:
            alone = study.alone(cell.config)
            for name in study.baselines:
                if name != ALONE:
                    add(name, cell, [baseline_name(0) if name == LOCAL else name])
            if len(alone) > 1:
                for label in _DERIVED:
                    add(label, cell, [baseline_name(client) for client in alone])
    for cell in cells:
        if cell.algorithm is not None:
            add(cell.label, cell, [str(TargetName.of_round(cell.config.federation.rounds))])
    return rows


def _chosen(scored: "Scored", label: str, sources: Sequence[_Source], column: Column) -> Sequence[_Source]:
    """Return the models of a row that count in a column: for the best one alone, it."""
    if label != BEST_ALONE:
        return sources
    known = [source for source in sources if scored.one(source, column) is not None]
    if len(known) < len(sources):
        return sources
    return [max(known, key=lambda source: _signed(column, scored.one(source, column) or 0.0))]


class Scored:
    """The scores of a study's workspaces, each read once."""

    def __init__(self, folder: StudyFolder) -> None:
        self._folder = folder
        self._records: dict[str, dict[tuple[str, str], ScoreRecord]] = {}
        self.marks = cache(self._marks)

    def records(self, cell: Cell) -> dict[tuple[str, str], ScoreRecord]:
        """Return a cell's scores by target and name; none where its workspace does not stand yet."""
        if cell.id not in self._records:
            found = read_scores(self._workspace(cell)) if is_made(self._folder, cell) else []
            self._records[cell.id] = {(record.target, record.name): record for record in found}
        return self._records[cell.id]

    def columns(self, cells: Sequence[Cell]) -> tuple[Column, ...]:
        """Return every metric in which a model of some cells is scored but details, in the benchmarks' order."""
        study = self._folder.study
        known = {
            (record.name, metric)
            for cell in cells
            for record in self.records(cell).values()
            for metric in record.scores
        }
        return tuple(
            Column(benchmark=benchmark.name, metric=metric.name)
            for benchmark in find_benchmarks(study.eval.benchmarks)
            for metric in benchmark.metrics
            if not metric.is_detail and (self._name(benchmark.name), metric.name) in known
        )

    def one(self, source: _Source, column: Column) -> float | None:
        """Return a model's score in a column, None where there is none."""
        record = self.records(source.cell).get((source.target, self._name(column.benchmark)))
        entry = record.scores.get(column.metric) if record is not None else None
        return entry.value if entry is not None else None

    def rounds(self, cell: Cell, column: Column) -> dict[int, float]:
        """Return the scores in a column of a cell's rounds, by number."""
        return {
            number: record.scores[column.metric].value
            for (target, name), record in self.records(cell).items()
            if name == self._name(column.benchmark) and column.metric in record.scores
            if TargetName.parse(target).kind == "round" and (number := TargetName.parse(target).number) is not None
        }

    def value(self, sources: Sequence[_Source], column: Column) -> float | None:
        """Return the mean of models' scores in a column, None where one of them has none."""
        found = [self.one(source, column) for source in sources]
        known = [value for value in found if value is not None]
        return math.fsum(known) / len(known) if known and len(known) == len(found) else None

    def difference(
        self, ours: Sequence[Sequence[_Source]], theirs: Sequence[Sequence[_Source]], column: Column
    ) -> Score | None:
        """Return the mean difference over seeds; None where the items are not the same, or not kept."""
        metric = _metric(column)
        parts = metric.mean_of or ((column.benchmark, column.metric),)
        places = [(self._name(benchmark), name) for benchmark, name in parts]
        every = [source for seed in (*ours, *theirs) for source in seed]
        for mine, other in zip(ours, theirs, strict=True):
            for name, _ in places:
                records = [self._record(source, name) for source in (*mine, *other)]
                if len({record.data.get("sha256") for record in records if record is not None}) != 1:
                    return None  # not the same questions
        our_marks, their_marks = (
            [
                [[self._items(source, name).marks.get(key, {}) for name, key in places] for source in seed]
                for seed in side
            ]
            for side in (ours, theirs)
        )
        clusters = [
            {item: cluster for source in every for item, cluster in self._items(source, name).clusters.items()}
            for name, _ in places
        ]
        return difference_over_seeds(metric, our_marks, their_marks, clusters)

    def notes(self, cells: Sequence[Cell]) -> list[str]:
        """Return what is missing in the scores of some cells."""
        awaited: dict[str, set[str]] = {}
        for cell in cells:
            for record in self.records(cell).values():
                if record.awaits is not None:
                    awaited.setdefault(f"{record.name} waits for {record.awaits}", set()).add(cell.id)
        cures = {"judge": "eval.judge_model", "code-execution": "eval.allow_code_execution"}
        return [
            f"{what} in {len(where)} cells: set {cures[what.rpartition(' ')[2]]} in study.yaml, and run the study again"
            for what, where in awaited.items()
        ]

    def _record(self, source: _Source, name: str) -> ScoreRecord | None:
        return self.records(source.cell).get((source.target, name))

    def _items(self, source: _Source, name: str) -> ItemMarks:
        return self.marks(source.cell.id, source.target, name)

    def _marks(self, cell_id: str, target: str, name: str) -> ItemMarks:
        record = self._records[cell_id].get((target, name))
        workspace = Workspace(self._folder.root / "cells" / cell_id)
        return read_marks(workspace, record) if record is not None else ItemMarks()

    def _workspace(self, cell: Cell) -> Workspace:
        return Workspace(self._folder.workspace(cell))

    def _name(self, benchmark: str) -> str:
        found = BENCHMARKS.get(benchmark)
        options = self._folder.study.options
        return scored_name(benchmark, options.of(found).variant if found is not None else options.variant)


def _metric(column: Column) -> Metric:
    return BENCHMARKS[column.benchmark].metric(column.metric) or Metric(column.metric)


def _signed(column: Column, value: float) -> float:
    return value if _metric(column).higher_is_better else -value


def _client_title(label: str) -> str:
    which = label.removeprefix("alone-")
    return f"client {which} alone" if which != label and which.isdecimal() else label
