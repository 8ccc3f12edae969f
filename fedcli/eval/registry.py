"""All benchmarks by name: a new one of fedcli adds its module's line here, another package's has an entry point."""

from collections.abc import Iterable, Sequence

from fedcli.errors import UsageError, did_you_mean
from fedcli.eval.benchmark import Benchmark
from fedcli.eval.benchmarks import (
    advbench,
    bleu,
    demo,
    ds1000,
    finance,
    hhh,
    humaneval,
    humanevalpack,
    lm_eval_tasks,
    mbpp,
    mt_bench,
    multiple,
    own_rows,
    vicuna,
)
from fedcli.plugins import Registry


def register(benchmarks: Iterable[Benchmark]) -> dict[str, Benchmark]:
    """Return benchmarks by name; raise ValueError for a name that comes twice."""
    known: dict[str, Benchmark] = {}
    for benchmark in benchmarks:
        if benchmark.name in known:
            raise ValueError(f"the name {benchmark.name!r} is taken")
        known[benchmark.name] = benchmark
    return known


def _check(name: str, found: object) -> Benchmark:
    """Return what an entry point gives; raise ValueError where it is no benchmark of that name."""
    if not isinstance(found, Benchmark):
        raise ValueError(f"it is no Benchmark, but of type {type(found).__name__}")
    if found.name != name:
        raise ValueError(f"the benchmark's own name is {found.name!r}")
    if (found.run is None or found.data is None) and not found.parts:
        raise ValueError("it has neither `run` and `data` nor `parts`")
    return found


_OWN = (
    *demo.BENCHMARKS,
    own_rows.BENCHMARK,
    *mt_bench.BENCHMARKS,
    vicuna.BENCHMARK,
    *lm_eval_tasks.BENCHMARKS,
    humaneval.BENCHMARK,
    mbpp.BENCHMARK,
    *humanevalpack.BENCHMARKS,
    *multiple.BENCHMARKS,
    ds1000.BENCHMARK,
    *bleu.BENCHMARKS,
    *finance.BENCHMARKS,
    hhh.BENCHMARK,
    advbench.BENCHMARK,
)
BENCHMARKS = Registry("fedcli.benchmarks", register(_OWN), _check)


def needed_packages(benchmark: Benchmark) -> list[str]:
    """Return the packages that a benchmark, or any of its parts, needs and not every installation has."""
    return [*benchmark.packages, *(name for part in benchmark.parts for name in BENCHMARKS[part].packages)]


def known_groups() -> list[str]:
    """Return the names of all groups, each once; other packages' benchmarks may have groups of their own."""
    return list(dict.fromkeys(group for benchmark in BENCHMARKS.usable() for group in benchmark.groups))


def find_benchmarks(names: Sequence[str]) -> list[Benchmark]:
    """Return the benchmarks that names stand for, each once; a name that no benchmark has may be a group's.

    Raises UsageError for a name that is neither.
    """
    found: dict[str, Benchmark] = {}
    for name in names:
        if name in BENCHMARKS:
            found[name] = BENCHMARKS[name]
        elif name in known_groups():
            found |= {benchmark.name: benchmark for benchmark in find_group(name)}
        else:
            hint = f"{did_you_mean(name, {*BENCHMARKS, *known_groups()})} `fedcli eval list` shows all."
            raise UsageError(f"unknown benchmark {name!r}", hint=hint)
    return list(found.values())


def find_group(name: str) -> list[Benchmark]:
    """Return a group's benchmarks; raise UsageError for an unknown group."""
    if name not in known_groups():
        raise UsageError(f"unknown group {name!r}", hint=did_you_mean(name, known_groups()))
    return [benchmark for benchmark in BENCHMARKS.usable() if name in benchmark.groups]
