"""All benchmarks by name; a new one adds its module's line here."""

from collections.abc import Iterable, Sequence
from typing import get_args

from fedcli.errors import UsageError, did_you_mean
from fedcli.eval.benchmark import Benchmark, Group
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
    vicuna,
)

GROUPS: tuple[Group, ...] = get_args(Group)


def register(benchmarks: Iterable[Benchmark]) -> dict[str, Benchmark]:
    """Return benchmarks by name; raise ValueError for a name that comes twice."""
    known: dict[str, Benchmark] = {}
    for benchmark in benchmarks:
        if benchmark.name in known:
            raise ValueError(f"the name {benchmark.name!r} is taken")
        known[benchmark.name] = benchmark
    return known


BENCHMARKS = register(
    [
        *demo.BENCHMARKS,
        mt_bench.MT_BENCH,
        mt_bench.MT_BENCH_PAIRWISE,
        vicuna.BENCHMARK,
        *lm_eval_tasks.BENCHMARKS,
        humaneval.BENCHMARK,
        mbpp.BENCHMARK,
        *humanevalpack.BENCHMARKS,
        ds1000.BENCHMARK,
        *bleu.BENCHMARKS,
        *finance.BENCHMARKS,
        hhh.BENCHMARK,
        advbench.BENCHMARK,
    ]
)


def find_benchmarks(names: Sequence[str]) -> list[Benchmark]:
    """Return the benchmarks that names stand for, each once; a name that no benchmark has may be a group's.

    Raises UsageError for a name that is neither.
    """
    found: dict[str, Benchmark] = {}
    for name in names:
        if name in BENCHMARKS:
            found[name] = BENCHMARKS[name]
        elif name in GROUPS:
            found |= {benchmark.name: benchmark for benchmark in find_group(name)}
        else:
            hint = f"{did_you_mean(name, {*BENCHMARKS, *GROUPS})} `fedcli eval list` shows all."
            raise UsageError(f"unknown benchmark {name!r}", hint=hint)
    return list(found.values())


def find_group(name: str) -> list[Benchmark]:
    """Return a group's benchmarks; raise UsageError for an unknown group."""
    if name not in GROUPS:
        raise UsageError(f"unknown group {name!r}", hint=did_you_mean(name, GROUPS))
    return [benchmark for benchmark in BENCHMARKS.values() if name in benchmark.groups]
