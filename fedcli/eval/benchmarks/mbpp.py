"""MBPP (Austin et al. 2021): a Python function from a sentence and three tests."""

from collections.abc import Iterator
from functools import partial

from fedcli.data.file_rows import Row
from fedcli.errors import ConfigError, UsageError
from fedcli.eval import releases
from fedcli.eval.benchmark import Session
from fedcli.eval.benchmarks.code import Problem, code_benchmark, extract_code, outline, solve, text_of
from fedcli.eval.data import DataSource
from fedcli.eval.sandbox import Checks, Program

EXAMPLES = (2, 3, 4, 1, 5, 6, 7, 8, 9, 10)
"""Tasks that are set apart for prompts; the paper takes the first three (section 3.1)."""
NUM_SHOTS = 3
TEST = range(11, 511)
SECONDS = 30.0
"""One reference (task 123) computes for three seconds: a machine under load needs several times that."""


def _problems(session: Session) -> Iterator[Problem]:
    """Yield prompts with three examples, or as many as the options say; raise UsageError for too many."""
    rows = {_task(row): row for row in session.files.rows()}
    num_shots = NUM_SHOTS if session.options.shots is None else session.options.shots
    if num_shots > len(EXAMPLES):
        raise UsageError(f"mbpp has {len(EXAMPLES)} examples for its prompt, not {num_shots}", hint="Lower --shots.")
    examples = "".join(_example(rows, task) for task in EXAMPLES[:num_shots])
    for task in sorted(rows):
        if task in TEST:
            yield Problem(f"MBPP/{task}", examples + _question(rows[task]), partial(_program, checks(rows[task])))


def _program(tests: Checks, answer: str) -> Program:
    return Program(extract_code(answer), tests=tests)


def checks(row: Row) -> Checks:
    """Return a row's tests behind their setup, which uses the answer's classes.

    What the reference imports is there for them, and of an answer the names that the reference defines.
    """
    imports, names = outline(text_of(row, "code"))
    return Checks("\n".join([text_of(row, "test_setup_code"), *_tests(row)]), names, imports)


def _question(row: Row) -> str:
    tests = "\n".join(_tests(row))
    return (
        f"You are an expert Python programmer, and here is your task: {text_of(row, 'text')} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _example(rows: dict[int, Row], task: int) -> str:
    if task not in rows:
        raise ConfigError(
            f"mbpp: task {task}, an example of the prompt, is not in the file",
            hint="Use the publisher's mbpp.jsonl with all 974 tasks, or --shots 0.",
        )
    code = text_of(rows[task], "code").replace("\r\n", "\n")
    return f"{_question(rows[task])}{code}\n[DONE]\n\n"


def _task(row: Row) -> int:
    task = row.fields.get("task_id")
    if not isinstance(task, int):
        raise ConfigError(f"{row.where}: 'task_id' is no number", hint="Get the publisher's file again.")
    return task


def _tests(row: Row) -> list[str]:
    tests = row.fields.get("test_list")
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests) or not tests:
        raise ConfigError(f"{row.where}: 'test_list' is no list of tests", hint="Get the publisher's file again.")
    return tests


BENCHMARK = code_benchmark(
    name="mbpp",
    title="MBPP: short Python programs from a sentence",
    groups=("code", "flowertune-code"),
    size=len(TEST),
    citation="Austin et al. 2021, Program Synthesis with Large Language Models, arXiv 2108.07732",
    data=DataSource(
        files=("mbpp.jsonl",),
        url="https://github.com/google-research/google-research/tree/master/mbpp",
        hub="google-research-datasets/mbpp",
        subset="full",
        split="prompt+test",
        release=releases.MBPP,
    ),
    run=partial(solve, _problems, stop=("[DONE]",), seconds=SECONDS),
    takes=("max_new_tokens", "samples", "shots", "temperature"),
)
