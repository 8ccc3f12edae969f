"""HumanEvalPack (Muennighoff et al. 2023), its Python part: functions to mend, and to write from instructions."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from fedcli.eval.benchmark import Benchmark, ItemScore, Session
from fedcli.eval.benchmarks.code import PASS_METRICS, Limits, Problem, complete, solve, text_of
from fedcli.eval.data import DataSource, Files
from fedcli.tasks.conversation import Turn

LIMITS = Limits(max_new_tokens=1024)
CITATION = "Muennighoff et al. 2023, OctoPack: Instruction Tuning Code Large Language Models, arXiv 2308.07124"
COLUMNS = (
    "task_id",
    "prompt",
    "declaration",
    "buggy_solution",
    "entry_point",
    "import",
    "test_setup",
    "test",
    "instruction",
)
IMPORTS = """import collections, copy, datetime, functools, hashlib, heapq, itertools, math, re, statistics, string, sys
import numpy
import numpy as np
from typing import *
from collections import *
"""
"""What the publisher's harness puts before every answer."""


def run_fix(session: Session) -> list[ItemScore]:
    """Give a function with a bug, and its tests, and ask for the bug's end (HumanEvalFixTests)."""
    return solve(session, _problems(session.files, _ask_fix), LIMITS)


def run_synthesize(session: Session) -> list[ItemScore]:
    """Give a signature and what the function is to do, and ask for the function."""
    return solve(session, _problems(session.files, _ask_synthesize), LIMITS)


def _problems(files: Files, ask: Callable[[Mapping[str, str]], str]) -> Iterator[Problem]:
    for row in files.rows():
        texts = {name: text_of(row, name) for name in COLUMNS}
        if texts["task_id"].startswith("Python/"):
            yield Problem(texts["task_id"], (Turn("user", ask(texts)),), partial(_program, texts))


def _ask_fix(row: Mapping[str, str]) -> str:
    return f"{row['declaration']}{row['buggy_solution']}\n{row['test']}\nFix bugs in {row['entry_point']}."


def _ask_synthesize(row: Mapping[str, str]) -> str:
    return row["instruction"].strip()


def _program(row: Mapping[str, str], answer: str) -> str:
    code = complete(row["prompt"], row["entry_point"], answer)
    return "\n".join([IMPORTS, row["import"], row["test_setup"], code, row["test"]])


DATA = DataSource(
    files=("humanevalpack.jsonl*", "data/python/data/humanevalpack.jsonl*"),
    url="https://huggingface.co/datasets/bigcode/humanevalpack",
    folders=("humanevalpack",),
    hub="bigcode/humanevalpack",
    subset="python",
    revision="refs/convert/parquet",
)
BENCHMARKS = (
    Benchmark(
        name="humanevalfix",
        title="HumanEvalFix: bugs to mend in Python functions",
        groups=("code", "paper-table-5"),
        metrics=PASS_METRICS,
        size=164,
        citation=CITATION,
        data=DATA,
        run=run_fix,
        needs=("code-execution",),
        takes=("max_new_tokens", "samples", "temperature", "template"),
    ),
    Benchmark(
        name="humanevalsynthesize",
        title="HumanEvalSynthesize: Python functions from instructions",
        groups=("code", "paper-table-5"),
        metrics=PASS_METRICS,
        size=164,
        citation=CITATION,
        data=DATA,
        run=run_synthesize,
        needs=("code-execution",),
        takes=("max_new_tokens", "samples", "temperature", "template"),
    ),
)
