"""A model whose answers a test writes: for scorers, whose subject is what they make of an answer."""

from collections.abc import Callable, Sequence
from pathlib import Path

from fedcli.eval.benchmark import Benchmark, Options, Session
from fedcli.eval.data import Files
from fedcli.eval.judge import Judge
from fedcli.eval.requests import Generation, Likelihood, LogLikelihood
from fedcli.eval.sandbox import CodeRunner

ROWS = Path(__file__).parents[1] / "benchmark_rows"
"""Rows written for the tests, in the publishers' formats: a folder for each benchmark."""


class Scripted:
    """Answers with what the test's functions say, and keeps what it was asked."""

    def __init__(
        self,
        text: Callable[[Generation], str] = lambda request: "",
        log_prob: Callable[[Likelihood], float] = lambda request: 0.0,
    ) -> None:
        self._text = text
        self._log_prob = log_prob
        self.asked: list[Generation | Likelihood] = []

    def generate(self, requests: Sequence[Generation]) -> list[str]:
        self.asked += requests
        return [self._text(request) for request in requests]

    def log_likelihoods(self, requests: Sequence[Likelihood]) -> list[LogLikelihood]:
        self.asked += requests
        return [
            LogLikelihood(self._log_prob(request), False, len(request.continuation.split())) for request in requests
        ]


def session(
    benchmark: Benchmark,
    model: Scripted,
    folder: Path | None = None,
    *,
    options: Options | None = None,
    judge: Judge | None = None,
    run_code: CodeRunner | None = None,
) -> Session:
    """Return a session on the rows of a folder (default: the tests' own)."""
    files = Files(benchmark.name, benchmark.data, (folder or ROWS,), may_fetch=False)
    return Session(model, files, options or Options(), judge, run_code)
