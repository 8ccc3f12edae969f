"""Reward functions: what task grpo says of a model's answers. A package adds one in the group `fedcli.rewards`.

A new one of fedcli's own is a function and an entry of `_OWN`.
"""

import ast
import builtins
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from fedcli.plugins import Registry
from fedcli.tasks.bounded_regex import LONGEST, match_all


class Answer(NamedTuple):
    """A model's answer to a row's prompt, as text, and what the row gives to check it against."""

    text: str
    check: str


class CodeCheck(NamedTuple):
    """A program that a model wrote, tests of it, and the program's names that they use."""

    program: str
    tests: str
    names: tuple[str, ...]


RunCode: TypeAlias = Callable[[Sequence[CodeCheck]], Sequence[bool]]
"""Runs programs and their tests in sandboxes, and tells which passed."""


@dataclass(frozen=True)
class Reward:
    """A reward function; `score` returns a finite number for each answer, and more is better."""

    name: str
    description: str
    score: Callable[..., Sequence[float]]
    """score(answers), or score(answers, run_code) where it `runs_code`."""
    faults: Callable[[Sequence[str]], Sequence[str | None]] = lambda checks: [None] * len(checks)
    """Returns of each row's check why it cannot be used, or None; all are looked at before a client trains."""
    runs_code: bool = False
    """Whether it runs what the model wrote: a party must have allowed that, and its machine have a sandbox."""


_NUMBER = re.compile(r"(?:(?<!\w)[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?")
MOST_CHARACTERS = 100_000
"""Of an answer's end, in which a number is looked for."""


def last_number(text: str) -> float | None:
    """Return the last number in a text, thousands' commas and all; None where it has none."""
    found: str | None = None
    for match in _NUMBER.finditer(text[-MOST_CHARACTERS:]):
        found = match[0]
    return None if found is None else float(found.replace(",", ""))


def _score_numbers(answers: Sequence[Answer]) -> list[float]:
    """Return 1 for an answer whose last number is the row's, as exactly as float64 tells, else 0."""
    return [float(last_number(answer.text) == last_number(answer.check)) for answer in answers]


def _faults_of_numbers(checks: Sequence[str]) -> list[str | None]:
    numbers = map(last_number, checks)
    return [None if each is not None and math.isfinite(each) else "there is no finite number in it" for each in numbers]


def _score_patterns(answers: Sequence[Answer]) -> list[float]:
    """Return 1 for an answer that the row's regular expression matches as a whole, white space around it aside."""
    return [float(found is True) for found in match_all([(each.check, each.text.strip()) for each in answers])]


def _faults_of_patterns(checks: Sequence[str]) -> list[str | None]:
    told = {True: None, False: None, None: "it is no regular expression of Python"}
    found = [told[each] for each in match_all([(check, "") for check in checks])]
    return [
        fault if len(check) <= LONGEST else f"it has {len(check)} characters, and {LONGEST} are allowed"
        for check, fault in zip(checks, found, strict=True)
    ]


_BLOCK = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
"""A block of code in an answer."""


def _score_programs(answers: Sequence[Answer], run_code: RunCode) -> list[float]:
    """Return 1 for an answer whose program passes the row's tests, else 0."""
    checks = [CodeCheck(_program(answer.text), answer.check, _names(answer.check)) for answer in answers]
    return [float(passed) for passed in run_code(checks)]


def _program(text: str) -> str:
    """Return an answer's code: the last block of it, or the whole text."""
    blocks = _BLOCK.findall(text)
    return str(blocks[-1]) if blocks else text


def _names(tests: str) -> tuple[str, ...]:
    """Return the names that tests use and do not make themselves."""
    nodes = [node for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)]
    used = {node.id for node in nodes if isinstance(node.ctx, ast.Load)}
    return tuple(sorted(used - {node.id for node in nodes if isinstance(node.ctx, ast.Store)} - {*dir(builtins)}))


def _faults_of_tests(checks: Sequence[str]) -> list[str | None]:
    return list(map(_fault_of_tests, checks))


def _fault_of_tests(check: str) -> str | None:
    try:
        names = _names(check)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"it is no Python: {error}"
    return None if names else "it uses no name of the answer's program"


def check_reward(name: str, loaded: object) -> Reward:
    """Return what an entry point loaded, a reward function of that name; raise ValueError for anything else."""
    if not isinstance(loaded, Reward) or loaded.name != name:
        raise ValueError(f"it is no Reward of the name {name!r}")
    return loaded


_OWN = (
    Reward("number", "the last number of the answer is the row's", _score_numbers, _faults_of_numbers),
    Reward("regex", "the row's regular expression matches the whole answer", _score_patterns, _faults_of_patterns),
    Reward("python", "the answer's program passes the row's tests", _score_programs, _faults_of_tests, runs_code=True),
)
REWARDS = Registry("fedcli.rewards", {reward.name: reward for reward in _OWN}, check_reward)
"""All reward functions by name."""
