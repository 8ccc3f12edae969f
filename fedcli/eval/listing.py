"""What `fedcli eval list` tells of each benchmark, and of what this machine has for it."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedcli.errors import EXTRAS
from fedcli.eval.benchmark import Benchmark
from fedcli.eval.data import Files, Finder, find_files
from fedcli.eval.endpoint import KEY_VARIABLE
from fedcli.eval.fetch import has_record
from fedcli.eval.registry import BENCHMARKS, find_group, needed_packages

_PLACES = ("missing", "hub", "publisher", "cached", "local")
"""From worst to best: a benchmark of parts is as well off as the worst of them."""


@dataclass(frozen=True)
class Listed:
    """One benchmark, and what this machine has for it."""

    benchmark: Benchmark
    package: str
    """Which the benchmark comes from: fedcli, or one that adds it by an entry point."""
    data: str
    """local (files are here), cached (fetched before), publisher (it would be fetched: pinned), hub (not pinned) or
    missing."""
    missing: list[str]
    """What this machine lacks."""

    def document(self) -> dict[str, Any]:
        """Return what --json shows: `group` is the first of its groups, "" for none."""
        found, source = self.benchmark, self.benchmark.data
        details = ("name", "unit", "higher_is_better", "is_detail")
        return {
            **{name: getattr(found, name) for name in ("name", "title", "groups", "size", "needs", "citation")},
            **{"package": self.package, "data": self.data, "missing": self.missing},
            "group": found.groups[0] if found.groups else "",
            "metrics": [metric.name for metric in found.metrics],
            "metric_details": [{name: getattr(metric, name) for name in details} for metric in found.metrics],
            "files": source.files if source else (),
            "url": source.url if source else "",
            "hub": source.hub if source else None,
            "license": source.release.license if source and source.release else None,
            "pinned": source is not None and source.release is not None,
        }


def list_benchmarks(group: str | None, roots: Sequence[Path], finder: Finder = find_files) -> list[Listed]:
    """Return all benchmarks, or a group's; raise UsageError for an unknown group."""
    return [_listed(found, roots, finder) for found in (BENCHMARKS.usable() if group is None else find_group(group))]


def _listed(benchmark: Benchmark, roots: Sequence[Path], finder: Finder) -> Listed:
    parts = benchmark.parts or (benchmark.name,)
    where = min((_where(BENCHMARKS[part], roots, finder) for part in parts), key=_PLACES.index)
    missing = [] if where in ("local", "cached") else ["data"]
    missing += [
        f"{name} (pip install 'fedcli[{EXTRAS[name]}]')"
        for name in dict.fromkeys(needed_packages(benchmark))
        if find_spec(name) is None
    ]
    if "judge" in benchmark.needs and not os.environ.get(KEY_VARIABLE):
        missing.append(f"judge (${KEY_VARIABLE}, a server of your own, or a model folder)")
    if "code-execution" in benchmark.needs and not shutil.which("bwrap"):
        missing.append("code-execution (bubblewrap)")
    if benchmark.programs:
        from fedcli.eval.programs import missing_programs

        missing += [f"{name} ({why})" for name, why in missing_programs(benchmark.programs).items()]
    return Listed(benchmark, BENCHMARKS.package_of(benchmark.name), where, missing)


def _where(benchmark: Benchmark, roots: Sequence[Path], finder: Finder) -> str:
    assert benchmark.data is not None
    if Files(benchmark.name, benchmark.data, tuple(roots), finder=finder).find():
        return "local"
    release = benchmark.data.release
    if benchmark.data.is_cached_from_hub or (release is not None and has_record(release)):
        return "cached"
    return "publisher" if release is not None else "hub" if benchmark.data.hub is not None else "missing"
