"""DS-1000 (Lai et al. 2022): data science questions to seven Python libraries."""

import importlib.util
import re
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

from fedcli.data.file_rows import Row
from fedcli.errors import ConfigError
from fedcli.eval.benchmark import Metric, Session
from fedcli.eval.benchmarks.code import PASS_METRICS, Problem, code_benchmark, extract_code, solve, text_of
from fedcli.eval.data import DataSource
from fedcli.eval.sandbox import Program
from fedcli.tasks.conversation import Turn

LIBRARIES = ("Matplotlib", "Numpy", "Pandas", "Pytorch", "Scipy", "Sklearn", "Tensorflow")
INSTRUCTION = (
    "Write a short code following the given format and indentation. Place the executable code between <code> and "
    "</code> tags, without any other non-executable things."
)
"""The publisher's, for chat models."""
STOP = ("</code>", "\nEND SOLUTION", "\n### END SOLUTION")
_IMPORTED = re.compile(r"^\s*(?:from\s+(?=[\w.]+\s+import\b)|import\s+)(\w+)", re.MULTILINE)
"""Top packages that a harness, or the program in its text, imports."""
_spec_of = cache(importlib.util.find_spec)


def _problems(session: Session) -> Iterator[Problem]:
    """Yield the problems, each with its own harness; those for which this machine lacks a library name it."""
    for row in session.files.rows():
        metadata = _metadata(row)
        origin = metadata.get("perturbation_origin_id")  # the problem that this one is a variation of
        context = text_of(row, "code_context")
        missing = [name for name in sorted(set(_IMPORTED.findall(context))) if _spec_of(name) is None]
        yield Problem(
            item=f"{metadata['library']}/{metadata['problem_id']}",
            prompt=(Turn("user", f"{INSTRUCTION}\n{text_of(row, 'prompt')}"),),
            program=partial(_program, context),
            record={"missing_libraries": missing} if missing else {},
            can_run=not missing,
            details=(metadata["library"],),
            cluster=None if origin is None else f"{metadata['library']}/{origin}",
        )


def _metadata(row: Row) -> dict[str, Any]:
    metadata = row.fields.get("metadata")
    if not isinstance(metadata, dict) or metadata.get("library") not in LIBRARIES or "problem_id" not in metadata:
        raise ConfigError(
            f"{row.where}: 'metadata' does not name a problem_id and one of the libraries {', '.join(LIBRARIES)}",
            hint="Get the publisher's file again.",
        )
    return metadata


def _program(context: str, answer: str) -> Program:
    """Return the harness with an answer in it: its tests compare tables and arrays, and run beside the answer."""
    lines = [context, f"code = {extract_solution(answer)!r}", "test_execution(code)"]
    return Program("\n".join([*lines, *(["test_string(code)"] if "test_string(" in context else []), ""]))


def extract_solution(answer: str) -> str:
    """Return what stands between the tags, or in the first fenced block; its indentation is part of the solution."""
    code = extract_code(answer)
    return code.rpartition("<code>")[2].partition("</code>")[0].removeprefix("\n")


BENCHMARK = code_benchmark(
    name="ds1000",
    title="DS-1000: data science code for seven libraries",
    metrics=(*PASS_METRICS, *(Metric(library, is_detail=True) for library in LIBRARIES)),
    size=1000,
    citation="Lai et al. 2022, DS-1000: A Natural and Reliable Benchmark for Data Science Code Generation, "
    "arXiv 2211.11501",
    data=DataSource(
        files=("ds1000.jsonl*", "data/ds1000.jsonl*", "test.jsonl"),
        url="https://github.com/xlang-ai/DS-1000",
        folders=("DS-1000",),
        hub="xlangai/DS-1000",
    ),
    run=partial(solve, _problems, max_new_tokens=1024, stop=STOP, seconds=120.0),
)
