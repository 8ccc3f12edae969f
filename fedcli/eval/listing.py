"""What `fedcli eval list` tells of each benchmark, and of what this machine has for it."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedcli.eval.benchmark import Benchmark
from fedcli.eval.data import DataSource, Files, Finder
from fedcli.eval.endpoint import KEY_VARIABLE
from fedcli.eval.registry import BENCHMARKS, find_group


def list_benchmarks(group: str | None, roots: Sequence[Path], finder: Finder) -> list[dict[str, Any]]:
    """Return all benchmarks, or a group's, as `--json` shows them; raise UsageError for an unknown group.

    `package` is fedcli, or the one that adds the benchmark by an entry point. `data` is local (files are here), cached
    (of the hub), hub (it would be fetched) or missing, and `missing` names what this machine lacks.
    """
    return [_listed(found, roots, finder) for found in (BENCHMARKS.values() if group is None else find_group(group))]


def _listed(benchmark: Benchmark, roots: Sequence[Path], finder: Finder) -> dict[str, Any]:
    parts = benchmark.parts or (benchmark.name,)
    where = min((_where(BENCHMARKS[part], roots, finder) for part in parts), key=_PLACES.index)
    missing = [] if where in ("local", "cached") else ["data"]
    if "judge" in benchmark.needs and not os.environ.get(KEY_VARIABLE):
        missing.append(f"judge (${KEY_VARIABLE}, a server of your own, or a model folder)")
    if "code-execution" in benchmark.needs and not shutil.which("bwrap"):
        missing.append("code-execution (bubblewrap)")
    source = benchmark.data or DataSource((), "")
    return {
        "name": benchmark.name,
        "package": BENCHMARKS.package_of(benchmark.name),
        "title": benchmark.title,
        "group": benchmark.groups[0] if benchmark.groups else "",
        "groups": benchmark.groups,
        "metrics": [metric.name for metric in benchmark.metrics],
        "metric_details": [{name: getattr(metric, name) for name in _DETAILS} for metric in benchmark.metrics],
        "size": benchmark.size,
        "needs": benchmark.needs,
        "data": where,
        "missing": missing,
        "files": source.files,
        "url": source.url,
        "hub": source.hub,
        "citation": benchmark.citation,
    }


_DETAILS = ("name", "unit", "higher_is_better", "is_detail")
_PLACES = ("missing", "hub", "cached", "local")
"""From worst to best: a benchmark of parts is as well off as the worst of them."""


def _where(benchmark: Benchmark, roots: Sequence[Path], finder: Finder) -> str:
    assert benchmark.data is not None
    if Files(benchmark.name, benchmark.data, tuple(roots), finder=finder).find():
        return "local"
    if benchmark.data.hub is None:
        return "missing"
    from huggingface_hub.constants import HF_HUB_CACHE

    return "cached" if (Path(HF_HUB_CACHE) / f"datasets--{benchmark.data.hub.replace('/', '--')}").is_dir() else "hub"
