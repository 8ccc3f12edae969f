"""Scoring what a workspace holds (the base, the baselines, a round) on the demo's held-out rows."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TypeAlias

import numpy as np

from fedcli.algos import Arrays
from fedcli.config import Task
from fedcli.data.conversation import Example, Item, Preference
from fedcli.data.formats import RowReader
from fedcli.data.hub import choose_format
from fedcli.data.source import read_rows
from fedcli.errors import NotReadyError, UsageError, WorkspaceError
from fedcli.eval.exact_match import Answer, answer_examples
from fedcli.eval.preference import Verdict, judge_pairs
from fedcli.rounds.runtime import Runtime
from fedcli.rounds.settings import read_running_config
from fedcli.workspace.baselines import baseline_name, published_baselines, read_baseline
from fedcli.workspace.history import Round, read_head, read_round
from fedcli.workspace.layout import Workspace, update_name
from fedcli.workspace.publish import publish_file

BENCHMARK = "demo"
SPLITS = ("test", "tuning")
METRICS: dict[Task, str] = {"sft": "exact_match", "dpo": "preference_accuracy"}
Answers: TypeAlias = Sequence[Answer] | Sequence[Verdict]


@dataclass(frozen=True)
class Score:
    """One target's share of right answers, with its standard error, and its lead over the best client alone.

    `lead` and `lead_error` are the mean and the standard error of the paired differences, row by row; None where
    there is nothing to compare with.
    """

    target: str
    metric: str
    num_rows: int
    accuracy: float
    standard_error: float
    margin: float | None = None
    """Of preferences: the mean of log p(chosen) - log p(rejected)."""
    lead: float | None = None
    lead_error: float | None = None


def evaluate(
    workspace: Workspace,
    *,
    base: bool = False,
    alone: Sequence[int] = (),
    pooled: bool = False,
    round_name: str | None = None,
    split: str = "test",
    threads: int | None = None,
    on_answers: Callable[[str, int, int], None] = lambda target, total, done: None,
) -> list[Score]:
    """Score the named targets (all there are, if none is named) on held-out rows, and keep scores and answers.

    The model is loaded once. Raises UsageError for a baseline that has not been trained, NotReadyError for a round
    that is not there, WorkspaceError where the workspace has no held-out rows.
    """
    config = read_running_config(workspace)
    start = _round(workspace, 0)
    items = _held_out(workspace, start.manifest.task, split)
    named = [baseline_name(client) for client in alone] + ([baseline_name(None)] if pooled else [])
    targets = _targets(workspace, start, base, named, round_name)
    runtime = Runtime(workspace, config, start, threads=threads)
    encoder = runtime.encoder(start.manifest.train.template)
    answers: dict[str, Answers] = {}
    for target, adapter in targets.items():
        runtime.adapted.load(adapter)
        report = partial(on_answers, target, len(items))
        if start.manifest.task == "dpo":
            pairs = [item for item in items if isinstance(item, Preference)]
            answers[target] = judge_pairs(runtime.adapted, encoder, pairs, report)
        else:
            examples = [item for item in items if isinstance(item, Example)]
            answers[target] = answer_examples(runtime.adapted, encoder, examples, report)
    scores = _scores(answers, METRICS[start.manifest.task])
    for score in scores:
        _keep(workspace, score, split, answers[score.target])
    return scores


def _targets(
    workspace: Workspace, start: Round, base: bool, baselines: Sequence[str], round_name: str | None
) -> dict[str, Arrays]:
    """Return the adapters to score, by name; the base model is the adapter of zeros."""
    everything = not base and not baselines and round_name is None
    tensors = start.manifest.tensors
    names = published_baselines(workspace) if everything else baselines
    targets: dict[str, Arrays] = {}
    if base or everything:
        targets["base"] = {name: np.zeros(entry.shape, np.float32) for name, entry in tensors.items()}
    for name in names:
        contents = read_baseline(workspace, name, tensors)
        if contents is None:
            kind, _, client = name.partition("-")
            command = f"train-{kind} --id {client}" if client else f"train-{kind}"
            raise UsageError(f"there is no baseline {name}", hint=f"Train it: `fedcli {command}`.")
        targets[name] = contents
    if everything or round_name is not None:
        latest = round_name in (None, "latest")
        chosen = read_head(workspace) if latest else _round(workspace, int(str(round_name)))
        targets[update_name(chosen.number)] = chosen.adapter()
    return targets


def _round(workspace: Workspace, number: int) -> Round:
    found = read_round(workspace, number)
    if found is None:
        raise NotReadyError(f"round {number} is not there yet", hint="`fedcli status` shows how far it is.")
    return found


def _held_out(workspace: Workspace, task: Task, split: str) -> list[Item]:
    path = workspace.held_out_rows(split)
    if not path.is_file():
        raise WorkspaceError(
            f"this workspace has no held-out rows: {path} is missing",
            hint="Only workspaces of the built-in rows have them (data.source: builtin:demo).",
        )
    return [item for _, item in RowReader(choose_format(None, None, task)).read(read_rows(path))]


def _scores(answers: dict[str, Answers], metric: str) -> list[Score]:
    """Return each target's score; the last round's lead is over the best client alone."""
    right = {target: [float(answer.is_correct) for answer in given] for target, given in answers.items()}
    alone = [target for target in right if target.startswith("alone-")]
    best = max(alone, key=lambda target: sum(right[target]), default=None)
    scores = []
    for target, marks in right.items():
        accuracy, error = mean_and_error(marks)
        lead = lead_error = None
        if best is not None and target.startswith("round-"):
            differences = [mark - other for mark, other in zip(marks, right[best], strict=True)]
            lead, lead_error = mean_and_error(differences)
        margins = [answer.margin for answer in answers[target] if isinstance(answer, Verdict)]
        margin = math.fsum(margins) / len(margins) if margins else None
        scores.append(Score(target, metric, len(marks), accuracy, error, margin, lead, lead_error))
    return scores


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of a sample and its standard error."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(variance / len(values))


def _keep(workspace: Workspace, score: Score, split: str, answers: Answers) -> None:
    """Write a target's score, and its answers beside it."""
    path = workspace.scores(score.target, BENCHMARK if split == "test" else f"{BENCHMARK}-{split}")
    record = {"benchmark": BENCHMARK, "split": split, **asdict(score)}
    lines = "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
    publish_file(path.with_suffix(".jsonl"), lines.encode())
    publish_file(path, json.dumps(record, indent=1, sort_keys=True).encode() + b"\n")
