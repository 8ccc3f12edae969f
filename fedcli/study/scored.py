"""The scores of a study's workspaces, each read once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from fedcli.eval.benchmark import Metric
from fedcli.eval.registry import BENCHMARKS, find_benchmarks
from fedcli.eval.statistics import Score, difference_over_seeds
from fedcli.study.columns import Column
from fedcli.study.folder import StudyFolder
from fedcli.study.plan import Cell
from fedcli.study.run_cell import is_made
from fedcli.workspace.layout import Workspace
from fedcli.workspace.scores import ItemMarks, ScoreRecord, read_marks, read_scores, scored_name
from fedcli.workspace.target_name import TargetName


@dataclass(frozen=True)
class ScoredModel:
    """One scored model of a cell."""

    cell: Cell
    target: str


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

    def one(self, source: ScoredModel, column: Column) -> float | None:
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

    def of_round(self, cell: Cell, number: int, kind: str) -> list[str]:
        """Return the models of a kind that are scored as they stood with a round: own, cluster."""
        names = {TargetName.parse(target) for target, _ in self.records(cell)}
        return sorted(str(name) for name in names if name.kind == kind and name.round == number)

    def value(self, sources: Sequence[ScoredModel], column: Column) -> float | None:
        """Return the mean of models' scores in a column, None where one of them has none."""
        found = [self.one(source, column) for source in sources]
        known = [value for value in found if value is not None]
        return math.fsum(known) / len(known) if known and len(known) == len(found) else None

    def difference(
        self, ours: Sequence[Sequence[ScoredModel]], theirs: Sequence[Sequence[ScoredModel]], column: Column
    ) -> Score | None:
        """Return the mean difference over seeds; None where the items are not the same, or not kept."""
        metric = metric_of(column)
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

    def _record(self, source: ScoredModel, name: str) -> ScoreRecord | None:
        return self.records(source.cell).get((source.target, name))

    def _items(self, source: ScoredModel, name: str) -> ItemMarks:
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


def metric_of(column: Column) -> Metric:
    """Return a column's metric."""
    return BENCHMARKS[column.benchmark].metric(column.metric) or Metric(column.metric)


def signed(column: Column, value: float) -> float:
    """Return a score of which more is better."""
    return value if metric_of(column).higher_is_better else -value
