"""Scores side by side: targets x metrics, the best marked, ranks, and paired differences to one target."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from fedcli.errors import NotReadyError, UsageError, did_you_mean
from fedcli.eval.benchmark import Benchmark, Metric
from fedcli.eval.registry import BENCHMARKS, find_benchmarks, find_group
from fedcli.eval.statistics import Score, average_ranks, difference
from fedcli.scoring.client_table import ClientRow, client_rows
from fedcli.scoring.communication import bytes_until, is_worth_a_column
from fedcli.scoring.several import Scored, gather
from fedcli.scoring.targets import BASE
from fedcli.workspace.layout import Workspace
from fedcli.workspace.scores import (
    ItemMarks,
    ScoreEntry,
    ScoreRecord,
    read_scores,
    scored_name,
)
from fedcli.workspace.target_name import TargetName

BEST_ALONE = "best-alone"
"""Stands for the client alone that is best in a metric."""


@dataclass(frozen=True)
class Column:
    """A metric of a benchmark, with its variant."""

    benchmark: str
    metric: str
    unit: str
    higher_is_better: bool

    @property
    def title(self) -> str:
        """The benchmark's name and the metric's name."""
        return f"{self.benchmark} {self.metric}"

    def signed(self, score: ScoreEntry) -> float:
        """Return a value of which more is better."""
        return score.value if self.higher_is_better else -score.value


@dataclass(frozen=True)
class Cell:
    """A target's score in a column, its rank there (1: the best; equal ones share it), and its lead."""

    score: ScoreEntry
    rank: int
    difference: Score | None
    """To the target that all are compared with, item by item; None where there is nothing to compare."""


@dataclass(frozen=True)
class ScoreTable:
    """Targets in the order of a table, metrics, and what is known of each pair."""

    targets: tuple[str, ...]
    columns: tuple[Column, ...]
    cells: Mapping[tuple[str, Column], Cell]
    average_rank: Mapping[str, float]
    """Over the columns that all targets have; empty where that is none, or there is one target only."""
    against: str
    notes: tuple[str, ...]
    clients: tuple[ClientRow, ...] = ()
    """What the columns say of clients' own adapters together."""
    communication: Mapping[str, int] = field(default_factory=dict)
    """Bytes that all clients had sent and fetched until a target was there; empty where none took any."""

    def best(self, metric: str | None = None) -> str:
        """Return the best target in a column, named "BENCHMARK METRIC"; by default the first one.

        Raises KeyError for a column that is not there.
        """
        columns = {column.title: column for column in reversed(self.columns)}
        column = self.columns[0] if metric is None else columns[metric]
        return next(
            target for target in self.targets if (target, column) in self.cells and self.cells[target, column].rank == 1
        )


def make_table(
    workspace: Workspace,
    *,
    names: Sequence[str] = (),
    group: str | None = None,
    records: Sequence[ScoreRecord] | None = None,
    against: str = BASE,
    details: bool = False,
    others: Sequence[Workspace] = (),
) -> ScoreTable:
    """Return the scores of a workspace: of some benchmarks or a group (all for none), or some `records` of it.

    With `others` theirs stand beside them, and `against` names a row, or a target of the first workspace that has it.

    Raises NotReadyError where there are no scores, UsageError for a name that is not known.
    """
    found = gather([workspace, *others], records)
    origin = {(each.shown, each.kept.name): each for each in found}
    records = [each.record for each in found]
    wanted = _wanted(names, group, records)
    asked = [record for record in records if not wanted or wanted & {record.benchmark, record.name}]
    stale = [record for record in asked if origin[record.target, record.name].is_stale]
    kept = [record for record in asked if record not in stale]
    scores = {
        (record.target, Column(record.name, name, entry.unit, entry.higher_is_better)): entry
        for record in kept
        for name, entry in _in_order(record).items()
        if details or not entry.is_detail
    }
    if not scores:
        what = f" of {', '.join([*names, *([group] if group else [])])}" if wanted else ""
        raise NotReadyError(f"there are no scores{what} yet", hint="Score something first: `fedcli eval NAME`.")
    of_row = {record.target: origin[record.target, record.name].kept.target_name for record in kept}
    folders = list(dict.fromkeys(each.workspace.root for each in found))
    place = {each.shown: folders.index(each.workspace.root) for each in found}
    rows = sorted(of_row, key=lambda row: (place[row], of_row[row].order))
    against = next((row for row in rows if against in (row, str(of_row[row]))), against)
    if against not in (BASE, BEST_ALONE) and against not in rows:
        raise UsageError(f"--against {against}: it has no scores here", hint=did_you_mean(against, [*rows, BEST_ALONE]))
    columns = list(dict.fromkeys(column for _, column in scores))
    order = {name: position for position, name in enumerate(BENCHMARKS)}
    columns.sort(key=lambda column: (order.get(column.benchmark.partition("@")[0], len(order)), column.benchmark))
    cells = _cells(rows, columns, scores, against, of_row, origin)
    clients: list[ClientRow] = []
    for column in columns:
        values = {of_row[row]: scores[row, column].value for row in rows if (row, column) in scores and not place[row]}
        clients += client_rows(column.title, values, higher_is_better=column.higher_is_better)
    complete = [column for column in columns if all((target, column) in scores for target in rows)]
    ranks = average_ranks(
        {target: [scores[target, column].value for column in complete] for target in rows},
        [column.higher_is_better for column in complete],
    )
    moved = {
        record.target: moved
        for record in {record.target: record for record in kept}.values()
        if (moved := bytes_until(origin[record.target, record.name].workspace, of_row[record.target])) is not None
    }
    moved = moved if is_worth_a_column(moved) else {}
    ranks = ranks if len(rows) > 1 else {}
    notes = _notes(kept, stale)
    return ScoreTable(tuple(rows), tuple(columns), cells, ranks, against, notes, tuple(clients), moved)


def _wanted(names: Sequence[str], group: str | None, records: Sequence[ScoreRecord]) -> set[str]:
    """Return the names of what is asked for, with a group's benchmarks and a benchmark's parts; none for all."""
    scored = {name for record in records for name in (record.name, record.benchmark)}
    chosen = find_benchmarks([name for name in names if name not in scored])
    chosen += [BENCHMARKS[name] for name in names if name in BENCHMARKS]
    chosen += find_group(group) if group is not None else []
    return {*names} | {name for found in chosen for name in (found.name, *found.parts)}


def _cells(
    rows: Sequence[str],
    columns: Sequence[Column],
    scores: Mapping[tuple[str, Column], ScoreEntry],
    against: str,
    of_row: Mapping[str, TargetName],
    origin: Mapping[tuple[str, str], Scored],
) -> dict[tuple[str, Column], Cell]:
    """Return each score with its rank in its column, and its difference to the row that all are compared with."""
    by_name = {place: found.record for place, found in origin.items()}

    @cache
    def marks_of(target: str, name: str) -> ItemMarks:
        return origin[target, name].marks() if (target, name) in by_name else ItemMarks()

    cells = {}
    for column in columns:
        in_column = {target: scores[target, column] for target in rows if (target, column) in scores}
        reference = _reference(in_column, against, column, of_row)
        for target, entry in in_column.items():
            lead = None
            if reference is not None and reference != target:
                lead = _difference(by_name, marks_of, column, target, reference)
            rank = 1 + sum(column.signed(other) > column.signed(entry) for other in in_column.values())
            cells[target, column] = Cell(entry, rank, lead)
    return cells


def best_rounds(
    workspace: Workspace, metric: str, records: Sequence[ScoreRecord] | None = None
) -> list[tuple[int, ScoreEntry]]:
    """Return the rounds' scores in a metric, the best first; a metric is BENCHMARK (its first) or BENCHMARK.METRIC.

    `records` are all scores, where they have been read. Raises UsageError for an unknown metric, NotReadyError where no
    round has been scored in it.
    """
    records = read_scores(workspace) if records is None else records
    rounds = [record for record in records if record.target_name.kind == "round" and record.scores]
    known = {f"{record.name}.{name}": (record.name, name) for record in rounds for name in record.scores}
    for record in reversed(rounds):
        known[record.name] = (record.name, next(iter(_in_order(record))))
    if metric not in known:
        if not known and any(record.target_name.kind in ("own", "cluster") for record in records):
            raise NotReadyError(
                "rounds here have several adapters, of clusters or of clients, and no best one",
                hint="`fedcli eval table` shows the score of each.",
            )
        if not known:
            raise NotReadyError("no round has been scored yet", hint="`fedcli eval NAME --round N`, or set eval.every.")
        raise UsageError(f"no round has been scored in {metric!r}", hint=did_you_mean(metric, known))
    benchmark, name = known[metric]
    entries = [
        (number, record.scores[name])
        for record in rounds
        if record.name == benchmark and name in record.scores and (number := record.target_name.number) is not None
    ]
    return sorted(entries, key=lambda found: found[1].value, reverse=entries[0][1].higher_is_better)


def _difference(
    records: Mapping[tuple[str, str], ScoreRecord],
    marks_of: Callable[[str, str], ItemMarks],
    column: Column,
    target: str,
    other: str,
) -> Score | None:
    """Return the paired difference of two targets in a column; None where they have no item in common.

    Scores on different data, or by different judges, have none: items may be named by their position alone.
    """
    record = records[target, column.benchmark]
    metric = _metric(BENCHMARKS.get(record.benchmark), column)
    places = [(scored_name(part, record.variant), name) for part, name in metric.mean_of]
    places = places or [(column.benchmark, column.metric)]
    for name, _ in places:
        one, another = (records.get((who, name)) for who in (target, other))
        if one and another and not _is_same(one, another):
            return None
    mine, theirs = ([marks_of(who, name) for name, _ in places] for who in (target, other))
    ours, others = (
        [items.marks.get(key, {}) for items, (_, key) in zip(of, places, strict=True)] for of in (mine, theirs)
    )
    clusters = [one.clusters | another.clusters for one, another in zip(mine, theirs, strict=True)]
    return difference(metric, ours, others, clusters)


def _metric(benchmark: Benchmark | None, column: Column) -> Metric:
    """Return a column's metric; one of a task that is not registered is a mean."""
    known = benchmark.metric(column.metric) if benchmark else None
    return known or Metric(column.metric, column.unit, column.higher_is_better)


def _notes(kept: Sequence[ScoreRecord], stale: Sequence[ScoreRecord]) -> tuple[str, ...]:
    """Return what a reader of the table must know."""
    notes = [f"{record.target}, {record.name}: {note}" for record in kept for note in record.notes]
    notes += [f"{record.target}, {record.name}: waits for {record.awaits}" for record in kept if record.awaits]
    notes += [
        f"{record.target} has been trained anew or removed: its scores on {record.name} are left out"
        for record in stale
    ]
    models: dict[str, set[tuple[str, ...]]] = {}
    asked: dict[str, list[ScoreRecord]] = {}
    for record in kept:
        weights = tuple(str(record.model.get(name)) for name in ("base", "adapter", "model", "api", "url"))
        models.setdefault(record.target, set()).add(weights)
        asked.setdefault(record.name, []).append(record)
    notes += [
        f"{target}: its scores are of different models: score it again" for target in models if len(models[target]) > 1
    ]
    for name, records in asked.items():
        judged = [record for record in records if record.settings.get("judge") is not None]
        if not all(_is_same(group[0], record) for group in (records, judged) for record in group):
            notes.append(f"{name}: not all targets were scored on the same data, by the same judge")
    return tuple(notes)


def _is_same(one: ScoreRecord, other: ScoreRecord) -> bool:
    """Return whether two targets had the same questions, and no two judges."""
    judges = {one.settings.get("judge"), other.settings.get("judge")} - {None}
    return one.data.get("sha256", one.data) == other.data.get("sha256", other.data) and len(judges) < 2


def _in_order(record: ScoreRecord) -> dict[str, ScoreEntry]:
    """Return a record's scores in the benchmark's own order of metrics."""
    benchmark = BENCHMARKS.get(record.benchmark)
    order = [metric.name for metric in benchmark.metrics] if benchmark else []
    return {name: record.scores[name] for name in [*order, *record.scores] if name in record.scores}


def _reference(
    scores: Mapping[str, ScoreEntry], against: str, column: Column, of_row: Mapping[str, TargetName]
) -> str | None:
    if against != BEST_ALONE:
        return against if against in scores else None
    alone = [target for target in scores if of_row[target].kind == "alone"]
    return max(alone, key=lambda target: column.signed(scores[target]), default=None)
