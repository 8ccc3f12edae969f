"""What benchmarks of code share: finding the code in an answer, running it with its tests, and pass@k."""

import ast
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from fedcli.data.file_rows import Row
from fedcli.errors import ConfigError
from fedcli.eval.benchmark import Benchmark, ItemScore, Metric, Session
from fedcli.eval.requests import Text
from fedcli.eval.sandbox import Program
from fedcli.tasks.conversation import shown

KS = (1, 10, 100)
PASS_METRICS = tuple(Metric(f"pass@{k}") for k in KS)
"""An item has marks for those k of which it has as many samples."""
TEMPERATURE, TOP_P = 0.8, 0.95
"""Of sampling, where there is more than one answer to a problem (Chen et al. 2021, section 3.3: for k = 100)."""
code_benchmark = partial(
    Benchmark,
    groups=("code",),
    metrics=PASS_METRICS,
    needs=("code-execution",),
    takes=("max_new_tokens", "samples", "temperature", "template"),
)
_FENCE = re.compile(r"^[ \t]*```([^\n`]*)\n?", re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """A task for a model, and what is made of its answer."""

    item: str
    prompt: Text
    program: Callable[[str], Program]
    """Makes of an answer the program that passes if the answer is right."""
    record: Mapping[str, object] = field(default_factory=dict)
    can_run: bool = True
    """Whether this machine has what the program needs; without it the item has no marks."""
    details: tuple[str, ...] = ()
    """Metrics that have the mark of pass@1 too."""
    cluster: str | None = None
    """What problems that were made of one have in common."""


def solve(
    read: Callable[[Session], Iterable[Problem]],
    session: Session,
    *,
    max_new_tokens: int = 512,
    stop: tuple[str, ...] = (),
    seconds: float = 10.0,
) -> list[ItemScore]:
    """Ask for answers to a session's problems, run each for some seconds where it can, and mark them with pass@k."""
    options = session.options
    asked = list(read(session))[: options.limit]
    num_samples = options.samples or 1
    temperature = TEMPERATURE if num_samples > 1 else 0.0
    first = [session.generation(row.prompt, max_new_tokens, stop, temperature=temperature) for row in asked]
    requests = [
        replace(request, top_p=TOP_P if request.temperature else 1.0, sample=number)
        for request in first
        for number in range(num_samples)
    ]
    answers = iter(session.model.generate(requests))
    samples = [[{"answer": next(answers)} for _ in range(num_samples)] for _ in asked]
    if session.run_code is not None:
        to_run = [(row, sample) for row, of_row in zip(asked, samples, strict=True) if row.can_run for sample in of_row]
        programs = [replace(row.program(sample["answer"]), seconds=seconds) for row, sample in to_run]
        for (_, sample), run in zip(to_run, session.run_code.run_all(programs), strict=True):
            sample |= {"outcome": run.outcome, "output": run.output}
    return [_score(row, of_row) for row, of_row in zip(asked, samples, strict=True)]


def _score(problem: Problem, samples: list[dict[str, str]]) -> ItemScore:
    prompt = problem.prompt if isinstance(problem.prompt, str) else shown(problem.prompt)
    record = {"prompt": prompt, **problem.record, "samples": samples}
    if "outcome" not in samples[0]:
        return ItemScore(problem.item, {}, record, problem.cluster)
    num_passed = sum(sample["outcome"] == "passed" for sample in samples)
    marks = {f"pass@{k}": pass_at_k(len(samples), num_passed, k) for k in KS if k <= len(samples)}
    return ItemScore(problem.item, marks | dict.fromkeys(problem.details, marks["pass@1"]), record, problem.cluster)


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Return the unbiased estimate 1 - C(n - c, k) / C(n, k) of the chance that one of k samples passes, k <= n.

    Chen et al. 2021, equation 1; the binomials are exact integers.
    """
    return 1 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def extract_code(answer: str) -> str:
    """Return the first fenced block of an answer, which may be left open; an answer without one as it is.

    A lone fence that names no language, with text before it, closes a block that the prompt has opened.
    """
    fences = list(_FENCE.finditer(answer))
    if not fences:
        return answer
    first = fences[0]
    before = answer[: first.start()]
    if len(fences) == 1 and before.strip() and not first[1].strip():
        return before
    return answer[first.end() : fences[1].start() if len(fences) > 1 else len(answer)]


def complete(prompt: str, entry_point: str, answer: str) -> str:
    """Return the code of a prompt, which ends with a function's docstring, and an answer.

    An answer that defines the function itself takes the place of the prompt's; any other is the rest of its body.
    """
    code = extract_code(answer)
    defines = re.search(rf"^def {re.escape(entry_point)}\b", code, re.MULTILINE)
    return f"{prompt}\n{code}" if defines else prompt + code


def helpers(prompt: str) -> str:
    """Return what a prompt defines for its tests, too: all of it, or nothing where it is no whole program."""
    return prompt if _statements(prompt) else ""


def outline(code: str) -> tuple[str, tuple[str, ...]]:
    """Return what a reference imports, as a program, and the names that it defines outside its functions."""
    statements = _statements(code)
    imports = [ast.unparse(each) for each in statements if isinstance(each, ast.Import | ast.ImportFrom)]
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = [each.name for each in statements if isinstance(each, defined)]
    for each in statements:
        if isinstance(each, ast.Assign):
            names += [target.id for target in each.targets if isinstance(target, ast.Name)]
    return "\n".join(imports), tuple(dict.fromkeys(names))


def _statements(code: str) -> list[ast.stmt]:
    """Return a program's statements, none where it is no program."""
    with warnings.catch_warnings(action="ignore"):  # of an escape in a text
        try:
            return ast.parse(code).body
        except (SyntaxError, ValueError):
            return []


def text_of(row: Row, name: str) -> str:
    """Return a column's text; raise ConfigError where it has none."""
    text = row.fields.get(name)
    if not isinstance(text, str):
        raise ConfigError(f"{row.where}: {name!r} is no text", hint="Get the publisher's file again.")
    return text
