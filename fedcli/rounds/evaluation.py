"""Scoring what a workspace holds (the base, the baselines, a round) on the demo's held-out rows."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np

from fedcli.algos import Arrays
from fedcli.data.rows import Example, alpaca_example, read_rows
from fedcli.errors import NotReadyError, UsageError, WorkspaceError
from fedcli.eval.exact_match import Answer, answer_examples
from fedcli.rounds.runtime import Runtime
from fedcli.rounds.settings import read_running_config
from fedcli.workspace.baselines import published_baselines, read_baseline
from fedcli.workspace.history import Round, read_head, read_round
from fedcli.workspace.layout import Workspace, update_name
from fedcli.workspace.publish import publish_file

BENCHMARK = "demo"
SPLITS = ("test", "tuning")


@dataclass(frozen=True)
class Score:
    """One target's share of right answers, with its standard error, and its lead over the best client alone.

    `lead` and `lead_error` are the mean and the standard error of the paired differences, row by row; None where
    there is nothing to compare with.
    """

    target: str
    num_rows: int
    accuracy: float
    standard_error: float
    lead: float | None = None
    lead_error: float | None = None


def evaluate(
    workspace: Workspace,
    *,
    base: bool = False,
    alone: Sequence[int] = (),
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
    examples = _held_out(workspace, split)
    targets = _targets(workspace, start, base, alone, round_name)
    runtime = Runtime(workspace, config, start, threads=threads)
    answers: dict[str, list[Answer]] = {}
    for target, adapter in targets.items():
        runtime.adapted.load(adapter)
        answers[target] = answer_examples(
            runtime.adapted,
            runtime.encoder,
            examples,
            partial(on_answers, target, len(examples)),
        )
    scores = _scores(answers)
    for score in scores:
        _keep(workspace, score, split, answers[score.target])
    return scores


def _targets(
    workspace: Workspace, start: Round, base: bool, alone: Sequence[int], round_name: str | None
) -> dict[str, Arrays]:
    """Return the adapters to score, by name; the base model is the adapter of zeros."""
    everything = not base and not alone and round_name is None
    tensors = start.manifest.tensors
    names = published_baselines(workspace) if everything else [f"alone-{client}" for client in alone]
    targets: dict[str, Arrays] = {}
    if base or everything:
        targets["base"] = {name: np.zeros(entry.shape, np.float32) for name, entry in tensors.items()}
    for name in names:
        contents = read_baseline(workspace, name, tensors)
        if contents is None:
            raise UsageError(
                f"there is no baseline {name}", hint=f"Train it: `fedcli train-alone --id {name.rpartition('-')[2]}`."
            )
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


def _held_out(workspace: Workspace, split: str) -> list[Example]:
    path = workspace.held_out_rows(split)
    if not path.is_file():
        raise WorkspaceError(
            f"this workspace has no held-out rows: {path} is missing",
            hint="Only workspaces of the built-in rows have them (data.source: builtin:demo).",
        )
    return [alpaca_example(row) for row in read_rows(path)]


def _scores(answers: dict[str, list[Answer]]) -> list[Score]:
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
        scores.append(Score(target, len(marks), accuracy, error, lead, lead_error))
    return scores


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of a sample and its standard error."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(variance / len(values))


def _keep(workspace: Workspace, score: Score, split: str, answers: list[Answer]) -> None:
    """Write a target's score, and its answers beside it."""
    path = workspace.scores(score.target, BENCHMARK if split == "test" else f"{BENCHMARK}-{split}")
    record = {"benchmark": BENCHMARK, "split": split, **asdict(score)}
    lines = "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
    publish_file(path.with_suffix(".jsonl"), lines.encode())
    publish_file(path, json.dumps(record, indent=1, sort_keys=True).encode() + b"\n")
