"""lm-eval's own results, with its own loader and its own kind of model, and fedcli's on the same rows."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedcli.data.encoding import Encoder
from fedcli.eval.benchmark import Benchmark, ItemScore, Options, Session
from fedcli.eval.data import Files
from fedcli.eval.local_model import LocalModel
from fedcli.eval.requests import Generation, Likelihood, LogLikelihood


class PlainAnswerer:
    """A local model without anything remembered."""

    def __init__(self, model: LocalModel) -> None:
        self._model = model

    def generate(self, requests: Sequence[Generation]) -> list[str]:
        answers: dict[int, str] = {}
        self._model.generate(requests, answers.__setitem__)
        return [answers[index] for index in range(len(requests))]

    def log_likelihoods(self, requests: Sequence[Likelihood]) -> list[LogLikelihood]:
        answers: dict[int, LogLikelihood] = {}
        self._model.log_likelihoods(requests, answers.__setitem__)
        return [answers[index] for index in range(len(requests))]


def ours(
    benchmark: Benchmark, loaded: tuple[Any, Any], folder: Path, template: Any = "alpaca", **options: Any
) -> list[ItemScore]:
    """Score a model and its tokenizer, as `load_base` returns them, on the files of a folder."""
    answerer = PlainAnswerer(LocalModel(*loaded, Encoder(loaded[1], template)))
    files = Files(benchmark.name, benchmark.data, (folder,), may_fetch=False)
    return benchmark.run(Session(answerer, files, Options(**options)))


def lm_evals_own(
    task: str, splits: dict[str, list[dict[str, Any]]], model: Any, scratch: Path, limit: int, shots: int
) -> dict[str, Any]:
    """Return lm-eval's results with its own loader of JSON files and a model of its own."""
    files = {}
    for split, rows in splits.items():
        path = scratch / f"{task}_{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[split] = str(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lm_eval.tasks
        from lm_eval.evaluator import evaluate

        manager = lm_eval.tasks.TaskManager(
            include_path=Path(lm_eval.tasks.__file__).parent / task.partition("_")[0], include_defaults=False
        )
        source = {
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(scratch / "cache")},
        }
        loaded = manager.load([{"group": "here", "task": [{"task": task, "num_fewshot": shots, **source}]}])
        results: dict[str, Any] = evaluate(model, loaded, limit=limit, bootstrap_iters=0)
    return results


def lm_evals_model(loaded: tuple[Any, Any]) -> Any:
    """Return a model and its tokenizer as lm-eval's own kind of model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=loaded[0], tokenizer=loaded[1], batch_size=1)
