"""Scores of new rounds while a federation goes on: every `eval.every` rounds, and of the last one."""

import os
from dataclasses import dataclass

from fedcli.client.runtime import Runtime
from fedcli.config import Config
from fedcli.errors import ConfigError, FedError, UsageError
from fedcli.eval.benchmark import Options
from fedcli.eval.registry import find_benchmarks
from fedcli.observer import Observer
from fedcli.scoring.evaluate import evaluate
from fedcli.scoring.request import Scoring, prepare
from fedcli.scoring.targets import Targets
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.layout import Workspace, update_name
from fedcli.workspace.scores import ScoreRecord, read_score, scored_name


@dataclass(frozen=True)
class Milestone:
    """A round that was to be scored: its scores, or why there are none. The round itself stands in either case."""

    round: int
    scores: list[ScoreRecord]
    error: str | None = None


def check_milestones(config: Config) -> None:
    """Raise ConfigError where eval.benchmarks names one that there is not, or that needs a baseline."""
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


def score_milestone(federation: FederationState, *, runtime: Runtime | None = None) -> Milestone | None:
    """Score the latest round where fedcli.yaml asks for it and it has not been done; None where nothing is due.

    `runtime` is a loaded model, if there is one. No round waits for its scores: what goes wrong with them is in the
    result.
    """
    config, head = federation.config, federation.head
    check_milestones(config)
    wanted, options = config.eval, Options(limit=config.eval.limit)
    if wanted.every is None or head.number == 0:
        return None
    if head.number % wanted.every and head.manifest.state == "open":
        return None
    records: list[ScoreRecord] = []
    errors = []
    for name in wanted.benchmarks:
        try:
            records += _score(federation, name, options, runtime)
        except FedError as error:
            errors.append(f"{error.message} ({error.hint})")
        except Exception as error:  # whatever a benchmark makes of its data: the next round must not wait for it
            errors.append(f"{name}: {type(error).__name__}: {error}")
    if not records and not errors:
        return None
    return Milestone(head.number, records, "; ".join(errors) or None)


def _score(federation: FederationState, name: str, options: Options, runtime: Runtime | None) -> list[ScoreRecord]:
    """Score the latest round on those of a benchmark's or a group's that it has no scores on."""
    workspace, config, number = federation.workspace, federation.config, federation.head.number
    missing = [
        found.name
        for found in find_benchmarks([name])
        if read_score(workspace, update_name(number), scored_name(found.name, options.variant)) is None
    ]
    if not missing:
        return []
    wanted = config.eval
    asked = Scoring(
        missing,
        Targets(rounds=(str(number),)),
        options,
        data=workspace.root / os.path.expanduser(wanted.data) if wanted.data is not None else None,
        judge_model=_judge(workspace, wanted.judge_model),
        judge_url=wanted.judge_url,
        allow_code_execution=wanted.allow_code_execution,
    )
    return evaluate(workspace, *prepare(federation, asked, runtime), Observer())


def _judge(workspace: Workspace, model: str | None) -> str | None:
    """Return a judge's name, or its folder from the workspace's."""
    folder = workspace.root / os.path.expanduser(model or "")
    return str(folder) if model and folder.is_dir() else model
