"""Scoring targets on benchmarks: the model is loaded once, answers survive an interruption, scores are kept."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedcli.data.row_report import describe_counts
from fedcli.errors import IntegrityError
from fedcli.eval.benchmark import Benchmark, ItemScore, Mark, Metric, Options, Session
from fedcli.eval.data import Files, find_roots
from fedcli.eval.judge import Judge
from fedcli.eval.registry import BENCHMARKS
from fedcli.eval.remembered import Remembering, Usage
from fedcli.eval.sandbox import CodeRunner
from fedcli.eval.statistics import Clusters, Marks, score
from fedcli.observer import Observer
from fedcli.scoring.engines import Models
from fedcli.scoring.targets import Target
from fedcli.workspace.layout import Workspace
from fedcli.workspace.row_files import find_files, open_rows
from fedcli.workspace.scores import (
    ScoreEntry,
    ScoreRecord,
    hold_scoring,
    opened_log,
    publish_scores,
    read_items,
    read_marks,
    read_score,
    scored_name,
)

PACKAGES = ("fedcli", "torch", "transformers", "peft", "lm_eval", "sacrebleu")


@dataclass(frozen=True)
class Evaluation:
    """Targets that are to be scored on benchmarks, and with what; `scoring.prepare` makes one of what a user asks."""

    workspace: Workspace
    benchmarks: Sequence[Benchmark]
    targets: Sequence[Target]
    models: Models
    options: Options = field(default_factory=Options)
    data: Path | None = None
    """A folder with benchmarks' files; None: those of $FEDCLI_BENCHMARKS, else of fedcli's cache or the hub."""
    judge: Callable[..., Judge] | None = None
    """Makes the judge, given what it remembers, and who hears how far it is (on_progress)."""
    run_code: CodeRunner | None = None
    notes: Sequence[str] = ()
    """What a user must know of the options that hold for some of the benchmarks only."""

    def run(self, observer: Observer) -> list[ScoreRecord]:
        """Score every target on every benchmark, keep the scores, and return them.

        What a target has answered before is not asked again; a target does all benchmarks before the next one comes.
        Raises RequirementError where data, a package or a judge is missing, BusyError while another process scores the
        same, WorkspaceError where the disk refuses.
        """
        for text in self.notes:
            observer.noted(text)
        plan: dict[str, Benchmark] = {}
        for benchmark in self.benchmarks:
            plan |= {part: BENCHMARKS[part] for part in benchmark.parts}
            plan[benchmark.name] = benchmark
        # what is missing shows before anything is asked
        files = {name: self._files(benchmark, observer) for name, benchmark in plan.items() if not benchmark.parts}
        records = []
        for target in self.targets:
            for benchmark in plan.values():
                observer.target_started(target.name, benchmark.name)
                if benchmark.parts:
                    records.append(self._combine(benchmark, target))
                else:
                    records.append(self._score(benchmark, files[benchmark.name], target, observer))
        return records

    def _score(self, benchmark: Benchmark, files: Files, target: Target, observer: Observer) -> ScoreRecord:
        """Ask what has not been answered, score it all, and keep it."""
        assert benchmark.run is not None
        workspace, options = self.workspace, self.options.of(benchmark)
        identity = self.models.identity(target)
        asked = benchmark.answers_of or benchmark.name
        with ExitStack() as stack:
            stack.enter_context(hold_scoring(workspace, target.name, asked))
            answers = stack.enter_context(opened_log(workspace.answers(target.name, asked)))
            judge = None
            if self.judge is not None and {"judge", "judge-optional"} & {*benchmark.needs}:
                memory = stack.enter_context(opened_log(workspace.judgments(target.name, benchmark.name)))
                judge = self.judge(memory, on_progress=observer.answered)
            model = Remembering(
                lambda: self.models.engine(target, observer.noted), answers, identity, observer.answered
            )
            others = _answers_of_baseline(workspace, asked, options)
            session = Session(model, files, options, judge, self.run_code, others)
            items = benchmark.run(session)
            before = None
            with suppress(IntegrityError):  # damaged ones are replaced
                before = read_score(workspace, target.name, scored_name(benchmark.name, options.variant))
            usage = model.usage
            if before is not None and before.model == identity and not usage.num_requests:
                kept = {name: getattr(before, name) for name in ("seconds", "num_generated_tokens", "num_truncated")}
                usage = replace(usage, **kept)
            record = _record(benchmark, target.name, identity, session, items, usage)
            if record.awaits is not None and before is not None and before.scores and before.model == identity:
                return before  # scored already; to ask again without a judge takes nothing away
            publish_scores(workspace, record, [_line(item) for item in items])
        return record

    def _files(self, benchmark: Benchmark, observer: Observer) -> Files:
        """Return where a benchmark's data is: a named folder, or $FEDCLI_BENCHMARKS, fedcli's cache or the hub."""
        assert benchmark.data is not None
        roots = (*find_roots(self.data), self.workspace.data)
        files = Files(benchmark.name, benchmark.data, roots, self.data is None, find_files, open_rows)
        return files.provided(observer) if benchmark.data.files else files

    def _combine(self, benchmark: Benchmark, target: Target) -> ScoreRecord:
        """Score a benchmark of parts from what its parts have on disk."""
        parts = [
            read_score(self.workspace, target.name, scored_name(part, self.options.of(BENCHMARKS[part]).variant))
            for part in benchmark.parts
        ]
        found = [part for part in parts if part is not None]
        items = {record.benchmark: read_marks(self.workspace, record) for record in found}
        scores = {
            metric.name: _entry(
                metric,
                [items[part].marks[name] for part, name in metric.mean_of],
                [items[part].clusters for part, _ in metric.mean_of],
            )
            for metric in benchmark.metrics
            if all(part in items and name in items[part].marks for part, name in metric.mean_of)
        }
        summed = ("num_items", "num_unscored", "num_truncated", "seconds", "num_generated_tokens")
        record = found[0].model_copy(
            update={
                "items": None,
                **{name: sum(getattr(part, name) for part in found) for name in summed},
                "benchmark": benchmark.name,
                "scores": scores,
                "data": {"parts": ", ".join(items)},
                "tokens_per_second": None,
                "created": max(part.created for part in found),
                "notes": [f"{part.benchmark}: {note}" for part in found for note in part.notes],
            }
        )
        publish_scores(self.workspace, record, [])
        return record


def _line(item: ItemScore) -> dict[str, object]:
    """Return what is kept of an item beside the scores."""
    cluster = {} if item.cluster is None else {"cluster": item.cluster}
    return {**item.record, "item": item.item, "marks": item.marks, **cluster}


def _record(
    benchmark: Benchmark,
    target: str,
    identity: dict[str, Any],
    session: Session,
    items: Sequence[ItemScore],
    usage: Usage,
) -> ScoreRecord:
    """Return the scores of a target's items, with all that they depend on."""
    marks: dict[str, dict[str, Mark]] = {}
    for item in items:
        for metric, mark in item.marks.items():
            marks.setdefault(metric, {})[item.item] = mark
    clusters = {item.item: item.cluster for item in items if item.cluster is not None}
    options = session.options
    num_unscored = sum(not item.marks for item in items)
    packages = [*PACKAGES, *([BENCHMARKS.package_of(benchmark.name)] if benchmark.name in BENCHMARKS else [])]
    return ScoreRecord(
        benchmark=benchmark.name,
        variant=options.variant,
        target=target,
        model=identity,
        settings={**asdict(options), "judge": session.judge.name if session.judge else None},
        data=_describe(session.files, items),
        scores={
            name: _entry(found, [marks[name]], [clusters])
            for name in dict.fromkeys([*(known.name for known in benchmark.metrics), *marks])
            if name in marks and (found := benchmark.metric(name)) is not None
        },
        awaits=_awaited(benchmark, session) if num_unscored else None,
        num_items=len(items),
        num_unscored=num_unscored,
        num_truncated=usage.num_truncated,
        notes=_notes(benchmark, options, items, usage),
        seconds=usage.seconds,
        num_generated_tokens=usage.num_generated_tokens,
        tokens_per_second=usage.num_generated_tokens / usage.seconds if usage.num_generated_tokens else None,
        versions=_versions(packages),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of packages, without those that this installation can do without, and does."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _answers_of_baseline(workspace: Workspace, benchmark: str, options: Options) -> dict[str, str] | None:
    """Return the answers that a comparison is made with, by item, of the same settings."""
    if options.baseline is None:
        return None
    name = scored_name(benchmark, replace(options, baseline=None).variant)
    return {str(item["item"]): str(item.get("answer")) for item in read_items(workspace, options.baseline, name)}


def _entry(metric: Metric, marks: Sequence[Marks], clusters: Sequence[Clusters]) -> ScoreEntry:
    return ScoreEntry(
        **asdict(score(metric, marks, clusters)),
        unit=metric.unit,
        higher_is_better=metric.higher_is_better,
        is_detail=metric.is_detail,
    )


def _awaited(benchmark: Benchmark, session: Session) -> str | None:
    """Return what a benchmark's unscored items wait for; None where nothing but their answers is at fault."""
    if "judge" in benchmark.needs and session.judge is None:
        return "judge"
    return "code-execution" if "code-execution" in benchmark.needs and session.run_code is None else None


def _notes(benchmark: Benchmark, options: Options, items: Sequence[ItemScore], usage: Usage) -> list[str]:
    """Return what a reader of the scores must know."""
    notes = []
    if len(items) < benchmark.size and options.limit is None:
        notes.append(f"{len(items)} items; the published set has {benchmark.size}")
    if usage.num_truncated:
        cut = f"{usage.num_truncated} prompts (each choice counts) of those that were asked last"
        notes.append(f"{cut} are longer than the model's context, and lost their beginning")
    if reasons := Counter(str(item.record["left_out"]) for item in items if "left_out" in item.record):
        notes.append(f"rows that are left out: {describe_counts(reasons)}")
    if num_problems := sum("problem" in item.record for item in items):
        notes.append(f"{num_problems} items have no judgment that parses")
    return notes


def _describe(files: Files, items: Sequence[ItemScore]) -> dict[str, str]:
    """Return where the questions came from, with a hash of them: the local files' names, or the hub's."""
    digest = hashlib.sha256()
    for item in items:
        asked = {name: item.record.get(name) for name in ("prompt", "text", "question", "expected")}
        digest.update(json.dumps([item.item, asked], default=str, sort_keys=True).encode())
    found = files.find()
    where = {"files": ", ".join(path.name for path in found[:5])} if found else {"hub": files.source.hub or ""}
    return where | {"sha256": digest.hexdigest()}
