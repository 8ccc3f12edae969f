"""lm-eval's tasks (0.4.13), answered by any of fedcli's models: prompts, examples, filters and metrics are its own."""

import csv
import hashlib
import io
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from fedcli.errors import ConfigError, RequirementError, UsageError
from fedcli.eval.benchmark import ItemScore, Session
from fedcli.eval.data import Files
from fedcli.eval.requests import Generation, Likelihood

Fields: TypeAlias = dict[str, Any]
"""A row as the data set of the hub has it that the task is written for."""
Splits: TypeAlias = dict[str, list[Fields]]
"""Rows by the names of that data set's splits."""
LocalRows: TypeAlias = Callable[[Files, bool], dict[str, Splits]]
"""Reads a publisher's files into splits by task; whether examples for the prompts are wanted too."""

SEED = 1234
"""lm-eval's own, from which it draws the examples where a task does not name them."""


@dataclass(frozen=True)
class TaskSet:
    """Tasks of lm-eval that make up a benchmark, and what their metrics are called here."""

    names: tuple[str, ...]
    marks: Mapping[tuple[str, str], str]
    """The metric by lm-eval's (metric, filter); the first is the one that `details` repeat."""
    folder: str | None = None
    """Which holds them: of lm-eval's registry, or a path; to look through all of the registry takes ten seconds."""
    include: Path | None = None
    """A user's folder, which holds some of them where `folder` is None."""
    local_rows: LocalRows | None = None
    shots: int | None = None
    """Examples in a prompt, where not as many as the task itself says."""
    details: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The metrics of a task's subject and group."""
    cluster: str | None = None
    """The column whose value items that are not independent share, such as the passage that they ask about."""
    overrides: Mapping[str, object] = field(default_factory=dict)
    """Settings in place of the tasks' own."""

    def run(self, session: Session) -> list[ItemScore]:
        """Ask the session's model and score it; items are named TASK/NUMBER.

        Rows come from the session's files where there are any, else from the hub. Where the files hold some of the
        tasks only, these are run, and each record's `covers` says how many. `limit` holds for each task.

        Raises RequirementError for data or a package that is not to be had, UsageError for too many examples.
        """
        files, shots = session.files, self.shots if session.options.shots is None else session.options.shots
        local = None
        if self.local_rows is not None:
            if files.find():
                local = _read_rows(self.local_rows, files, bool(shots))
            elif not files.may_fetch:
                raise files.missing()
        names = [name for name in self.names if local is None or name in local]
        if not names:
            raise files.missing()
        with quiet_lm_eval() as stderr:
            from lm_eval.evaluator import evaluate

            _compile_templates_once()
            tasks = _load(names, self, local, files)
            for name, task in tasks.items():
                _set_shots(name, task, shots)
            limit = session.options.limit
            results = evaluate(SessionLM(session, stderr), {"tasks": tasks}, limit=limit, bootstrap_iters=0)
        is_whole = len(names) == len(self.names)
        covers: Fields = {} if is_whole else {"covers": f"{len(names)} of {len(self.names)} tasks"}
        return [item for name in names for item in _items(name, results["samples"][name], self, covers)]


class SessionLM:
    """What lm-eval takes for a model of a single process; the requests go to a session's model.

    lm-eval asks for no base class, and importing its own would cost a second at every start.
    """

    rank = 0
    world_size = 1

    def __init__(self, session: Session, stderr: TextIO) -> None:
        self._session = session
        self._stderr = stderr
        """Where the model may show its progress, while that of lm-eval is held back."""

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return log-likelihood and whether greedy decoding gives the same, of (prompt, continuation) each."""
        with redirect_stderr(self._stderr):
            answers = self._session.model.log_likelihoods([Likelihood(*request.args) for request in requests])
        return [(answer.log_prob, answer.is_greedy) for answer in answers]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the answers to (prompt, settings) each; a request that comes n times has n samples."""
        from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS
        from lm_eval.models.utils import normalize_gen_kwargs

        asked: list[Generation] = []
        samples: Counter[int] = Counter()
        for request in requests:
            prompt, settings = request.args
            given = normalize_gen_kwargs(dict(settings), DEFAULT_MAX_GEN_TOKS)
            generation = self._session.generation(
                prompt,
                given["max_gen_toks"],
                tuple(mark for mark in given["until"] if mark),
                temperature=float(given.get("temperature", 1.0)) if given["do_sample"] else 0.0,
                top_p=float(given.get("top_p", 1.0)),
                sample=samples[id(request)],
            )
            samples[id(request)] += 1
            asked.append(generation)
        with redirect_stderr(self._stderr):
            return self._session.model.generate(asked)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Raise UsageError: perplexity of whole texts is not offered."""
        raise UsageError(
            "this task of lm-eval measures the perplexity of whole texts, which fedcli does not",
            hint="Choose a task with answers: multiple choice, loglikelihood or generate_until.",
        )


def _read_rows(read: LocalRows, files: Files, with_examples: bool) -> dict[str, Splits]:
    """Return a publisher's rows; raise ConfigError where the files are not as published, or hold none."""
    try:
        local = read(files, with_examples)
        asked = ("test", "validation", "default")  # where data sets of the hub have their questions
        empty = [task for task, splits in local.items() if not any(splits.get(split) for split in asked)]
        if empty:
            raise ValueError(f"no rows of {empty[0]}")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, csv.Error) as error:
        folder = files.require()[0].parent
        raise ConfigError(
            f"the files of {files.benchmark} in {folder} are not as published: {type(error).__name__}: {error}",
            hint=f"Get them again from {files.source.url}.",
        ) from error
    return local


@contextmanager
def quiet_lm_eval() -> Iterator[TextIO]:
    """Hold back lm-eval's notes, progress bars and warnings about its own code; yields stderr as it was."""
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    stderr = sys.stderr
    with redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield stderr


@cache
def _compile_templates_once() -> None:
    """Have lm-eval keep its compiled templates: it compiles each anew for every item, 100 s for all of MMLU."""
    from lm_eval.utils import env

    env.from_string = cache(env.from_string)


def _load(names: list[str], task_set: TaskSet, local: dict[str, Splits] | None, files: Files) -> dict[str, Any]:
    """Return lm-eval's tasks by name, with rows from here where there are any."""
    settings = [{"task": name, **task_set.overrides} for name in names]
    if local is not None:
        for name, setting in zip(names, settings, strict=True):
            setting["custom_dataset"] = partial(_in_memory, local[name])
    try:
        manager = task_manager(task_set.folder, task_set.include)
        tasks: dict[str, Any] = manager.load([{"group": "fedcli", "task": settings}])["tasks"]
    except ImportError as error:
        raise RequirementError(
            f"lm-eval's tasks {', '.join(names)} need a package that is not installed: {error}",
            hint="Install it beside fedcli; lm-eval's own extras, such as lm-eval[math], hold what its tasks need.",
        ) from error
    except Exception as error:  # a dozen kinds, of datasets, huggingface_hub and its HTTP library
        reason = " ".join(str(error).split()) or type(error).__name__
        if local is not None:
            raise
        if task_set.local_rows is not None:
            raise files.missing(reason=reason) from error
        raise RequirementError(
            f"lm-eval cannot load {', '.join(names)}: {reason}",
            hint="Check the network and the hub's cache (HF_HOME), or give --include a folder with a YAML file whose "
            "dataset_path and dataset_kwargs name local files.",
        ) from error
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UsageError(
                f"lm-eval's task {name} runs code that the model writes, or asks about pictures or sounds",
                hint="fedcli's own benchmarks of code run it in a sandbox: `fedcli eval list`.",
            )
    return tasks


def _in_memory(splits: Splits, **_: object) -> dict[str, Any]:  # called with the task's metadata
    import datasets

    return {split: datasets.Dataset.from_list(fields) for split, fields in splits.items()}


def task_manager(folder: str | None, include: Path | None = None) -> Any:
    """Return lm-eval's manager of one folder (of its registry, else a path), or of all of it and a user's folder."""
    from lm_eval import tasks

    if folder is None:
        return _whole_registry(include)
    return tasks.TaskManager(include_path=Path(tasks.__file__).parent / folder, include_defaults=False)


@cache
def _whole_registry(include: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include)


def _set_shots(name: str, task: Any, shots: int | None) -> None:
    """Set how many examples a prompt holds: as asked for, else as the task says; raise UsageError for too many."""
    own = task.get_config("num_fewshot")
    num = own or 0 if shots is None else shots
    task.set_config("num_fewshot", num)
    task.set_fewshot_seed(SEED)
    if num == own or num == 0:
        return
    if own == 0:
        raise UsageError(f"lm-eval's task {name} takes no examples", hint="Leave --shots out.")
    samples = task.fewshot_cfg.samples is not None or task.fewshot_cfg.split is not None
    if not (samples or task.has_training_docs() or task.has_validation_docs()):
        raise UsageError(
            f"lm-eval's task {name} has no examples but its own questions, whose answers they would tell",
            hint="Leave --shots out.",
        )
    # lm-eval's sampler draws one more where the item itself may be among them, and takes that one out.
    may_be_item = task.fewshot_cfg.sampler == "default" and task.fewshot_cfg.split == task.config.test_split
    if num + may_be_item > (available := len(task.sampler.df or ())):
        raise UsageError(
            f"{num} examples are too many for {name}, which has {available}", hint="Ask for fewer: --shots."
        )


def _items(name: str, samples: list[Fields], task_set: TaskSet, covers: Fields) -> Iterator[ItemScore]:
    """Yield the items of a task; lm-eval keeps a sample for each filter of an item."""
    headline = next(iter(task_set.marks.values()))
    by_item: dict[int, list[Fields]] = {}
    for sample in samples:
        by_item.setdefault(sample["doc_id"], []).append(sample)
    for number, filtered in by_item.items():
        marks = {
            metric: float(sample[key])
            for sample in filtered
            for (key, filter_), metric in task_set.marks.items()
            if sample["filter"] == filter_ and key in sample
        }
        marks |= {detail: marks[headline] for detail in task_set.details.get(name, ()) if headline in marks}
        cluster = None
        if task_set.cluster is not None:
            cluster = hashlib.sha256(str(filtered[0]["doc"][task_set.cluster]).encode()).hexdigest()[:16]
        yield ItemScore(f"{name}/{number}", marks, _record(filtered) | covers, cluster)


def _record(filtered: list[Fields]) -> Fields:
    """Return the prompt, what was answered, what was made of it, and what was expected."""
    first = filtered[0]
    target, arguments = first["target"], first["arguments"]
    is_choice = isinstance(first["resps"][0][0], tuple)
    if is_choice and isinstance(target, int) and target < len(arguments):
        target = arguments[target][1].strip()
    record: Fields = {"prompt": arguments[0][0], "expected": target}
    if is_choice:
        answers = zip(arguments, first["resps"], strict=True)
        return record | {"log_probs": {continuation: resps[0][0] for (_, continuation), resps in answers}}
    record["answer"] = first["resps"][0][0] if len(first["resps"][0]) == 1 else first["resps"][0]
    extracted = {sample["filter"]: sample["filtered_resps"][0] for sample in filtered if sample["filter"] != "none"}
    return record | ({"extracted": extracted} if extracted else {})
