"""HumanEval (Chen et al. 2021): the body of a Python function, from its signature and docstring."""

from collections.abc import Iterator
from functools import partial

from fedcli.eval import releases
from fedcli.eval.benchmark import Session
from fedcli.eval.benchmarks.code import Problem, code_benchmark, complete, helpers, solve, text_of
from fedcli.eval.data import DataSource
from fedcli.eval.sandbox import Checks, Program

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")
"""The paper's stop sequences (section 3.1), and the end of a fenced block."""


def _problems(session: Session) -> Iterator[Problem]:
    """Yield the prompts as they are, which no template writes."""
    for row in session.files.rows():
        task, prompt, entry_point, test = (text_of(row, name) for name in ("task_id", "prompt", "entry_point", "test"))
        yield Problem(task, prompt, partial(_program, prompt, entry_point, test))


def _program(prompt: str, entry_point: str, test: str, answer: str) -> Program:
    tests = Checks(f"{test}\ncheck({entry_point})\n", (entry_point,), helpers(prompt))
    return Program(complete(prompt, entry_point, answer), tests=tests)


BENCHMARK = code_benchmark(
    name="humaneval",
    title="HumanEval: functions from docstrings",
    groups=("code", "paper-table-2", "paper-table-5", "flowertune-code"),
    size=164,
    citation="Chen et al. 2021, Evaluating Large Language Models Trained on Code, arXiv 2107.03374",
    data=DataSource(
        files=("HumanEval.jsonl*", "data/HumanEval.jsonl*"),
        url="https://github.com/openai/human-eval",
        hub="openai/openai_humaneval",
        release=releases.HUMANEVAL,
    ),
    run=partial(solve, _problems, stop=STOP),
    takes=("max_new_tokens", "samples", "temperature"),
)
