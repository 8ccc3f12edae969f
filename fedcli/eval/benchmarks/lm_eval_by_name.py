"""Benchmarks made on the spot from tasks of lm-eval's registry, or of a user's folder of YAML files."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcli.errors import UsageError, did_you_mean, require_packages
from fedcli.eval.benchmark import Benchmark, Metric
from fedcli.eval.data import DataSource
from fedcli.eval.lm_eval_bridge import TaskSet, quiet_lm_eval, task_manager


def lm_eval_benchmark(names: Sequence[str], include: Path | None = None) -> Benchmark:
    """Return a benchmark of any tasks, groups or tags of lm-eval's registry, or of a folder with its YAML files.

    Its metrics are those that are means over the items; others (corpus BLEU, F1 of a class) are left out.

    Raises UsageError for a name that lm-eval does not know, and for tasks without such a metric.
    """
    if include is not None and not include.is_dir():
        raise UsageError(f"--include {include}: no such folder", hint="Name a folder with lm-eval's YAML files.")
    require_packages(["lm_eval"])
    with quiet_lm_eval():
        leaves, folder = _find(names, include)
        index = task_manager(folder, include).task_index
        metrics: dict[tuple[str, str], Metric] = {}
        for leaf in leaves:
            metrics |= _means(index[leaf].cfg)
    if not metrics:
        raise UsageError(
            f"lm-eval's {', '.join(names)}: none of its metrics is a mean over the items",
            hint="Such tasks are not offered. Choose another one.",
        )
    task_set = TaskSet(leaves, {key: metric.name for key, metric in metrics.items()}, folder, include)
    return Benchmark(
        name=_file_name(names),
        title=f"lm-eval's {', '.join(names)}",
        groups=(),
        metrics=tuple({metric.name: metric for metric in metrics.values()}.values()),
        size=0,
        citation="Gao et al. 2024, A framework for few-shot language model evaluation, doi:10.5281/zenodo.12608602",
        data=DataSource((), "the hub, as the task's YAML names it"),
        run=task_set.run,
        takes=("max_new_tokens", "shots", "temperature"),
    )


def _file_name(names: Sequence[str]) -> str:
    """Return a benchmark's name that is a file's name, too; names that it does not hold whole are told by a hash."""
    whole = "lm-eval-" + "-".join(names)
    plain = re.sub(r"[^\w.-]", "-", whole)[:80]
    return plain if plain == whole else f"{plain}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _find(names: Sequence[str], include: Path | None) -> tuple[tuple[str, ...], str | None]:
    """Return the single tasks that names stand for, and the user's folder where it holds them all."""
    if include is not None:
        folder = str(include.absolute())
        try:
            return _all_leaves(names, task_manager(folder, include).task_index), folder
        except KeyError:
            pass  # the registry may know the rest
    index = task_manager(None, include).task_index
    try:
        return _all_leaves(names, index), None
    except KeyError as error:
        hint = did_you_mean(error.args[0], index)
        if not hint.startswith("Did"):
            hint = "`lm-eval ls tasks` lists them; a folder of your own goes to --include."
        raise UsageError(f"lm-eval has no task {error.args[0]!r}", hint=hint) from error


def _all_leaves(names: Sequence[str], index: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(leaf for name in names for leaf in _leaves(name, index)))


def _leaves(name: str, index: Mapping[str, Any]) -> Iterator[str]:
    """Yield the tasks of a group or tag, or a task's own name; raise KeyError for a name that is not in the index."""
    entry = index[name]
    kind = entry.kind.name
    if kind == "TASK":
        yield name
        return
    members = sorted(entry.tags) if kind == "TAG" else entry.cfg.get("task") if kind == "GROUP" else None
    if not isinstance(members, list) or not all(isinstance(member, str) for member in members):
        raise UsageError(
            f"lm-eval's {name} is not made of tasks written in YAML files only",
            hint="Name tasks of it one by one; those that are Python classes are not offered.",
        )
    for member in members:
        yield from _leaves(member, index)


def _means(config: Mapping[str, Any]) -> dict[tuple[str, str], Metric]:
    """Return the metrics of a task's YAML that are means over its items, by (metric, filter)."""
    from lm_eval.api.metrics import mean
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY, get_metric_aggregation, is_higher_better

    filters = [entry["name"] for entry in config.get("filter_list") or ()] or ["none"]
    listed = config.get("metric_list")
    if listed is None:
        listed = [{"metric": name} for name in DEFAULT_METRIC_REGISTRY[config.get("output_type", "generate_until")]]
    metrics = {}
    for entry in listed:
        name = entry["metric"].rpartition(".")[2]  # a function is written as path.function
        if entry.get("aggregation") == "mean" or ("aggregation" not in entry and get_metric_aggregation(name) is mean):
            is_up = entry.get("higher_is_better", is_higher_better(name)) is not False
            for filter_ in filters:
                full = name if len(filters) == 1 else f"{name}:{filter_}"
                metrics[name, filter_] = Metric(full, "as the task has it", higher_is_better=is_up)
    return metrics
