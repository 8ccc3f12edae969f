"""A study's scores: rows (baselines and algorithms) x metrics, over seeds, with differences to a row and ranks."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import stdev

from fedcli.errors import NotReadyError, UsageError, did_you_mean
from fedcli.eval.statistics import Score, average_ranks
from fedcli.quantities import describe_bytes
from fedcli.scoring.targets import BASE
from fedcli.study.columns import Column, PublishedTable
from fedcli.study.costs import Goal, Reached, bytes_of_round, last_within, reached
from fedcli.study.folder import StudyFolder, shipped_studies
from fedcli.study.plan import ALONE, LOCAL, Cell, PresetEntry, Study, TableConfig, cells_of, read_study
from fedcli.study.scored import Scored, ScoredModel, metric_of, signed
from fedcli.workspace.baselines import baseline_name
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
    communication: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    """Of each row that has some: bytes that all clients sent and fetched until the scored round, by seed."""
    goal: Goal | None = None
    reached: Mapping[str, Reached] = field(default_factory=dict)
    """What each algorithm took to reach the goal."""


@dataclass(frozen=True)
class StudyTable:
    """The tables of a study's presets, the publication whose figures they have, and what a reader must know."""

    title: str
    blocks: tuple[Block, ...]
    num_seeds: int
    source: str | None
    notes: tuple[str, ...] = field(default=())


def make_table(
    folder: StudyFolder,
    *,
    like: str | None = None,
    against: str | None = None,
    budget: int | None = None,
    goal: Goal | None = None,
) -> StudyTable:
    """Return what a study has so far, in its own layout or in that of a shipped study.

    With a `budget` in bytes an algorithm's scores are those of its last scored round within it; with a `goal` there is
    what it took to reach it. Raises UsageError for a study, a row or a goal's column that is not there, NotReadyError
    where there are no scores yet.
    """
    study = folder.study
    if goal is not None:
        goal.check(study.eval.benchmarks)
    layout, paper = _layout(study, like or study.table.like)
    notes: dict[str, None] = {}
    blocks = tuple(
        _block(folder, setting, layout, paper, against or layout.against, notes, budget, goal)
        for setting in study.presets
    )
    if not any(score.by_seed for block in blocks for score in block.scores.values()):
        raise NotReadyError("no cell of the study has scores yet", hint="`fedcli study run` makes them.")
    if paper is not None and paper.note:
        notes[paper.note] = None
    if odd := [cell.id for cell in cells_of(study) if (made := folder.read(cell)) and made.fixed != cell.fixed]:
        notes[f"these scores are of other settings than {folder.file.name} has now: {', '.join(odd)}"] = None
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
    budget: int | None,
    goal: Goal | None,
) -> Block:
    cells = [cell for cell in cells_of(folder.study) if cell.setting.name == setting.name]
    scored = Scored(folder)
    last = {cell.id: _shown_round(folder, scored, cell, budget) for cell in cells if cell.algorithm is not None}
    rows = _rows(folder.study, scored, cells, last)
    if budget is not None:
        rounds = [
            f"{cell.id} {'none' if last[cell.id] is None else last[cell.id]}" for cell in cells if cell.id in last
        ]
        told = "scores are those of the last scored round until which all clients had sent and fetched at most "
        notes[f"{told}{describe_bytes(budget)}: {', '.join(rounds)}"] = None
    columns = layout.columns or scored.columns(cells)
    titles = {label: _TITLES.get(label, _client_title(label)) for label in rows}
    against = against or next(iter(rows))
    if against not in rows:
        raise UsageError(f"--against {against}: there is no such row", hint=did_you_mean(against, rows))
    values = _values(scored, rows, columns)
    for label, row in rows.items():
        counts = {len(values.get((label, column.shown), {})) for column in columns}
        notes |= {
            f"{setting.name}, {label}: {count} of {len(row)} seeds so far": None
            for count in sorted(counts)
            if 0 < count < len(row)
        }
    notes |= dict.fromkeys(scored.notes(cells))
    means = {place: round(math.fsum(found.values()) / len(found), 12) for place, found in values.items()}  # of ranks
    ranked = [label for label in rows if label not in _DERIVED and any(label == row for row, _ in values)]
    scores: dict[tuple[str, str], StudyScore] = {}
    for (label, title), found in values.items():
        column = next(column for column in columns if column.shown == title)
        others = [means[other, title] for other in ranked if (other, title) in means]
        rank = 1 + sum(signed(column, other) > signed(column, means[label, title]) for other in others)
        lead = None
        if label != against and (against, title) in values:
            seeds = sorted(found.keys() & values[against, title].keys())
            mine, theirs = (
                [_chosen(scored, name, rows[name][seed], column) for seed in seeds] for name in (label, against)
            )
            lead = scored.difference(mine, theirs, column) if seeds else None
        published = paper.figure(setting.name, label, title) if paper else None
        scores[label, title] = StudyScore(found, rank if label in ranked else None, lead, published)
    if paper is not None:
        for label, title, figure in _published_alone(paper, setting.name, columns, scores):
            titles.setdefault(label, label)
            scores[label, title] = figure
    complete = [column for column in columns if ranked and all((label, column.shown) in means for label in ranked)]
    ranks = average_ranks(
        {label: [means[label, column.shown] for column in complete] for label in ranked},
        [metric_of(column).higher_is_better for column in complete],
    )
    if 0 < len(complete) < len(columns):
        left_out = ", ".join(column.shown for column in columns if column not in complete)
        notes[
            f"{setting.name}: the average rank is over {len(complete)} of {len(columns)} columns, without {left_out}"
        ] = None
    moved: dict[str, dict[int, int]] = {}
    for cell in cells:
        number = last.get(cell.id)
        if number is not None and (size := bytes_of_round(folder, cell, number)) is not None:
            moved.setdefault(cell.label, {})[cell.seed] = size
    costs = {} if goal is None else reached(folder, scored, cells, goal)
    ranks = ranks if len(ranked) > 1 else {}
    title = setting.title or setting.name
    return Block(setting.name, title, titles, tuple(columns), scores, ranks, against, moved, goal, costs)


def _values(
    scored: Scored, rows: Mapping[str, Mapping[int, list[ScoredModel]]], columns: Sequence[Column]
) -> dict[tuple[str, str], dict[int, float]]:
    """Return the scores that are there, by row and column, and by seed."""
    values: dict[tuple[str, str], dict[int, float]] = {}
    for label, row in rows.items():
        for column in columns:
            for seed, sources in row.items():
                if (value := scored.value(_chosen(scored, label, sources, column), column)) is not None:
                    values.setdefault((label, column.shown), {})[seed] = value
    return values


def _published_alone(
    paper: PublishedTable, preset: str, columns: Sequence[Column], scores: Mapping[tuple[str, str], StudyScore]
) -> Iterator[tuple[str, str, StudyScore]]:
    """Yield the rows and columns for which a paper has a figure, and the study none."""
    for label in paper.labels(preset):
        for column in columns:
            figure = paper.figure(preset, label, column.shown)
            if figure is not None and (label, column.shown) not in scores:
                yield label, column.shown, StudyScore({}, published=figure)


def _shown_round(folder: StudyFolder, scored: Scored, cell: Cell, budget: int | None) -> int | None:
    """Return the round whose scores stand for a cell: the last one, or the last scored one within a budget."""
    return cell.config.federation.rounds if budget is None else last_within(folder, scored, cell, budget)


def _rows(
    study: Study, scored: Scored, cells: Sequence[Cell], last: Mapping[str, int | None]
) -> dict[str, dict[int, list[ScoredModel]]]:
    """Return the rows by label: for each seed the models that are scored for it.

    An algorithm's row is its global adapter. Where there is none it is the mean of the clusters' adapters, or of the
    clients' own; where there are both the clients' own have a second row.
    """
    rows: dict[str, dict[int, list[ScoredModel]]] = {}

    def add(label: str, cell: Cell, targets: Sequence[str]) -> None:
        rows.setdefault(label, {})[cell.seed] = [ScoredModel(cell, target) for target in targets]

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
            number = last[cell.id]
            if number is None:
                add(cell.label, cell, [])
                continue
            own, clusters = (scored.of_round(cell, number, kind) for kind in ("own", "cluster"))
            has_global = not clusters and (not own or cell.config.train.personal is not None)
            add(cell.label, cell, [str(TargetName.of_round(number))] if has_global else clusters or own)
            if own and has_global:
                add(f"{cell.label}: own", cell, own)
    return rows


def _chosen(scored: Scored, label: str, sources: Sequence[ScoredModel], column: Column) -> Sequence[ScoredModel]:
    """Return the models of a row that count in a column: for the best one alone, it."""
    if label != BEST_ALONE:
        return sources
    known = [source for source in sources if scored.one(source, column) is not None]
    if len(known) < len(sources):
        return sources
    return [max(known, key=lambda source: signed(column, scored.one(source, column) or 0.0))]


def _client_title(label: str) -> str:
    which = label.removeprefix("alone-")
    return f"client {which} alone" if which != label and which.isdecimal() else label
