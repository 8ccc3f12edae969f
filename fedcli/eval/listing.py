"""What `fedcli eval list` tells of each benchmark, and of what this machine has for it."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcli.eval.benchmark import Benchmark
from fedcli.eval.data import Files, Finder, find_files
from fedcli.eval.endpoint import KEY_VARIABLE
from fedcli.eval.registry import BENCHMARKS, find_group


@dataclass(frozen=True)
class Listed:
    """One benchmark, as `fedcli eval list` shows it."""

    name: str
    package: str
    """Which the benchmark comes from: fedcli, or one that adds it by an entry point."""
    title: str
    group: str
    """The first of its groups; "" for none."""
    groups: tuple[str, ...]
    metrics: list[str]
    """The names; `metric_details` says what each is."""
    metric_details: list[dict[str, Any]]
    size: int
    needs: tuple[str, ...]
    data: str
    """local (files are here), cached (of the hub), hub (it would be fetched) or missing."""
    missing: list[str]
    """What this machine lacks."""
    files: tuple[str, ...]
    url: str
    hub: str | None
    citation: str


def list_benchmarks(group: str | None, roots: Sequence[Path], finder: Finder = find_files) -> list[Listed]:
    """Return all benchmarks, or a group's; raise UsageError for an unknown group."""
    return [_listed(found, roots, finder) for found in (BENCHMARKS.usable() if group is None else find_group(group))]


def _listed(benchmark: Benchmark, roots: Sequence[Path], finder: Finder) -> Listed:
    parts = benchmark.parts or (benchmark.name,)
    where = min((_where(BENCHMARKS[part], roots, finder) for part in parts), key=_PLACES.index)
    missing = [] if where in ("local", "cached") else ["data"]
    if "judge" in benchmark.needs and not os.environ.get(KEY_VARIABLE):
        missing.append(f"judge (${KEY_VARIABLE}, a server of your own, or a model folder)")
    if "code-execution" in benchmark.needs and not shutil.which("bwrap"):
        missing.append("code-execution (bubblewrap)")
    source = benchmark.data
    return Listed(
        name=benchmark.name,
        package=BENCHMARKS.package_of(benchmark.name),
        title=benchmark.title,
        group=benchmark.groups[0] if benchmark.groups else "",
        groups=benchmark.groups,
        metrics=[metric.name for metric in benchmark.metrics],
        metric_details=[{name: getattr(metric, name) for name in _DETAILS} for metric in benchmark.metrics],
        size=benchmark.size,
        needs=benchmark.needs,
        data=where,
        missing=missing,
        files=source.files if source else (),
        url=source.url if source else "",
        hub=source.hub if source else None,
        citation=benchmark.citation,
    )


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
