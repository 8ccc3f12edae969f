"""Scores of new rounds while a federation goes on: every `eval.every` rounds, and of the last one.

What a new round is to be scored on is noted when it is there, and scored when nothing waits for this process: a scoring
that was interrupted is done by the next one, and one that failed is kept as failed, for a person to try again.
"""

import os
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from fedcli.config import Config
from fedcli.errors import BusyError, ConfigError, FedError, IntegrityError, UsageError, WorkspaceError
from fedcli.observer import Observer
from fedcli.printable import without_credentials
from fedcli.workspace import scores
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.layout import Workspace
from fedcli.workspace.registrations import require_own
from fedcli.workspace.scores import Failure, ScoreRecord, Unscored
from fedcli.workspace.target_name import TargetName

if TYPE_CHECKING:  # every aggregation looks here: what scores is imported where there is something to score
    from fedcli.client.runtimes import Runtimes
    from fedcli.eval.benchmark import Benchmark
    from fedcli.scoring.request import Scoring


@dataclass(frozen=True)
class RoundScores:
    """A round that was to be scored: its scores, or why there are none. The round itself stands in either case."""

    round: int
    scores: list[ScoreRecord]
    error: str | None = None


def note_due(federation: FederationState) -> None:
    """Note what the latest round is to be scored on, so that whoever calls `score_due` next does it.

    A disk that refuses stops no merge: `score_due` tells. Raises ConfigError where eval.benchmarks names a benchmark
    that there is not, or that needs a baseline.
    """
    with suppress(WorkspaceError):
        _note_due(federation)


def _note_due(federation: FederationState) -> None:
    workspace, config, head = federation.workspace, federation.config, federation.head
    wanted, every = _wanted(config), config.eval.every
    if every is None or head.number == 0 or (head.number % every and head.manifest.state == "open"):
        return
    for name, benchmark in wanted.items():
        if not scores.has_note(workspace, str(TargetName.of_round(head.number)), name):
            scores.note_unscored(workspace, Unscored(round=head.number, benchmark=benchmark.name, name=name))


def score_due(federation: FederationState, runtimes: "Runtimes", observer: Observer) -> Iterator[RoundScores]:
    """Score every round that is due, on what it has no scores on; yield each round when that is done.

    A benchmark that fails is not tried again. No round waits for its scores: what goes wrong is in the result. One that
    another process scores now is left to it, and what fedcli.yaml no longer asks for is forgotten.
    """
    workspace, config = federation.workspace, federation.config
    wanted = list(_wanted(config)) if config.eval.every is not None else []
    by_round: dict[int, list[Unscored]] = {}
    try:
        _note_due(federation)
        for note in scores.read_unscored(workspace):
            if note.name not in wanted:
                scores.remove_unscored(workspace, str(TargetName.of_round(note.round)), note.name)
            elif note.failure is None:
                by_round.setdefault(note.round, []).append(note)
    except (WorkspaceError, IntegrityError) as error:
        yield RoundScores(federation.head.number, [], f"{error.message} ({error.hint})")
    for number, notes in by_round.items():
        in_order = sorted(notes, key=lambda note: wanted.index(note.name))
        found = [_score(federation, note, runtimes, observer) for note in in_order]
        records = [record for made in found if isinstance(made, list) for record in made]
        failures = [made for made in found if isinstance(made, str)]
        if records or failures:
            yield RoundScores(number, records, "; ".join(failures) or None)


def _score(
    federation: FederationState, note: Unscored, runtimes: "Runtimes", observer: Observer
) -> list[ScoreRecord] | str:
    """Return the scores of what is due, or what is said of its failure."""
    from fedcli.scoring.request import prepare

    workspace, asked = federation.workspace, _asked(federation, note)
    try:
        if asked.judge_url is not None or asked.allow_code_execution:
            named = "eval.judge_url" if asked.judge_url is not None else "eval.allow_code_execution"
            require_own(workspace, named, f"Where you want that, give `fedcli eval {note.benchmark}` the same options.")
        if scores.read_score(workspace, str(TargetName.of_round(note.round)), note.name) is None:
            return prepare(federation, asked, runtimes).run(observer)
        scores.remove_unscored(workspace, str(TargetName.of_round(note.round)), note.name)  # another process was first
        return []
    except BusyError:
        return []
    except Exception as error:  # whatever a benchmark makes of its data: the next round must not wait for it
        failure = _failure(asked, error)
        with suppress(WorkspaceError):  # it is told, and tried again where it cannot be kept
            scores.note_unscored(workspace, note.model_copy(update={"failure": failure}))
        return f"{note.name}: {failure.message} ({failure.hint}); to try again: `{failure.again}`"


def _wanted(config: Config) -> "dict[str, Benchmark]":
    """Return the benchmarks that fedcli.yaml asks for, by the names that their scores have."""
    if not config.eval.benchmarks:
        return {}
    from fedcli.eval.benchmark import Options
    from fedcli.eval.registry import find_benchmarks

    try:
        found = find_benchmarks(config.eval.benchmarks)
    except UsageError as error:
        raise ConfigError(f"eval.benchmarks: {error.message}", hint=error.hint) from error
    for benchmark in found:
        if benchmark.answers_of is not None:
            raise ConfigError(
                f"eval.benchmarks: {benchmark.name} compares with another target",
                hint=f"Name {benchmark.answers_of} here, and run `fedcli eval {benchmark.name} --baseline TARGET`.",
            )
    variant = Options(limit=config.eval.limit).variant
    return {scores.scored_name(benchmark.name, variant): benchmark for benchmark in found}


def _asked(federation: FederationState, note: Unscored) -> "Scoring":
    from fedcli.eval.benchmark import Options
    from fedcli.scoring.request import Scoring
    from fedcli.scoring.targets import Targets

    workspace, wanted = federation.workspace, federation.config.eval
    return Scoring(
        [note.benchmark],
        Targets(rounds=(str(note.round),)),
        Options(limit=wanted.limit),
        data=workspace.root / os.path.expanduser(wanted.data) if wanted.data is not None else None,
        judge_model=_judge(workspace, wanted.judge_model),
        judge_url=wanted.judge_url,
        allow_code_execution=wanted.allow_code_execution,
    )


def _judge(workspace: Workspace, model: str | None) -> str | None:
    """Return a judge's name, or its folder from the workspace's."""
    folder = workspace.root / os.path.expanduser(model or "")
    return str(folder) if model and folder.is_dir() else model


def _failure(asked: "Scoring", error: Exception) -> Failure:
    words = ["fedcli", "eval", *asked.names, *(word for number in asked.targets.rounds for word in ("--round", number))]
    given = (("--limit", asked.options.limit), ("--data", asked.data))
    judge = (("--judge-model", asked.judge_model), ("--judge-url", asked.judge_url))
    words += [word for option, value in (*given, *judge) if value is not None for word in (option, str(value))]
    words += ["--allow-code-execution"] if asked.allow_code_execution else []
    if not isinstance(error, FedError):
        error = FedError(f"{type(error).__name__}: {error}", hint="That is a fault of the benchmark's code.")
    return Failure(
        message=error.message,
        hint=error.hint,
        exit_code=error.exit_code,
        again=without_credentials(shlex.join(words)),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
