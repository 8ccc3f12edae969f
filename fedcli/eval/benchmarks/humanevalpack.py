"""HumanEvalPack (Muennighoff et al. 2023), its Python part: functions to mend, and to write from instructions."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from fedcli.eval import releases
from fedcli.eval.benchmark import Session
from fedcli.eval.benchmarks.code import Problem, code_benchmark, complete, helpers, solve, text_of
from fedcli.eval.data import DataSource
from fedcli.eval.sandbox import Checks, Program
from fedcli.tasks.conversation import Turn

MAX_NEW_TOKENS = 1024
_COLUMNS = "task_id prompt declaration buggy_solution entry_point import test_setup test instruction"
IMPORTS = """import collections, copy, datetime, functools, hashlib, heapq, itertools, math, re, statistics, string, sys
import numpy
import numpy as np
from typing import *
from collections import *
"""
"""What the publisher's harness puts before every answer."""


def _problems(ask: Callable[[Mapping[str, str]], str], session: Session) -> Iterator[Problem]:
    for row in session.files.rows():
        texts = {name: text_of(row, name) for name in _COLUMNS.split()}
        if texts["task_id"].startswith("Python/"):
            yield Problem(texts["task_id"], (Turn("user", ask(texts)),), partial(_program, texts))


def _ask_fix(row: Mapping[str, str]) -> str:
    """Return a function with a bug, and its tests, and the request to end the bug (HumanEvalFixTests)."""
    return f"{row['declaration']}{row['buggy_solution']}\n{row['test']}\nFix bugs in {row['entry_point']}."


def _program(row: Mapping[str, str], answer: str) -> Program:
    before = "\n".join([IMPORTS, row["import"], row["test_setup"], ""])
    code = complete(row["prompt"], row["entry_point"], answer)
    return Program(before + code, tests=Checks(row["test"], (row["entry_point"],), before + helpers(row["prompt"])))


_of_pack = partial(
    code_benchmark,
    size=164,
    citation="Muennighoff et al. 2023, OctoPack: Instruction Tuning Code Large Language Models, arXiv 2308.07124",
    data=DataSource(
        files=("humanevalpack.jsonl*", "data/python/data/humanevalpack.jsonl*", "python/test-*.parquet"),
        url="https://huggingface.co/datasets/bigcode/humanevalpack",
        folders=("humanevalpack",),
        hub="bigcode/humanevalpack",
        subset="python",
        revision="refs/convert/parquet",
        release=releases.HUMANEVALPACK,
    ),
)
BENCHMARKS = (
    _of_pack(
        name="humanevalfix",
        title="HumanEvalFix: bugs to mend in Python functions",
        run=partial(solve, partial(_problems, _ask_fix), max_new_tokens=MAX_NEW_TOKENS),
    ),
    _of_pack(
        name="humanevalsynthesize",
        title="HumanEvalSynthesize: Python functions from instructions",
        run=partial(solve, partial(_problems, lambda row: row["instruction"].strip()), max_new_tokens=MAX_NEW_TOKENS),
    ),
)
