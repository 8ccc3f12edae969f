"""Answers that are remembered, so that nothing is asked twice and an interrupted evaluation goes on where it was."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

from fedcli.errors import ConfigError
from fedcli.eval.requests import Generation, Likelihood, LogLikelihood

RequestT = TypeVar("RequestT", Generation, Likelihood)
AnswerT = TypeVar("AnswerT", str, LogLikelihood)


def not_finite() -> ConfigError:
    """Return the error for a model that makes NaN or infinity of a prompt."""
    return ConfigError(
        "the model gives no finite likelihoods: its weights, or the adapter's, are not finite",
        hint="Train it again, or score another one; what was answered before is kept.",
    )


class Memory(Protocol):
    """Values by key that survive the process; adding is durable enough to survive kill -9."""

    def get(self, key: str) -> Any | None:
        """Return the value of a key, or None."""

    def add(self, key: str, value: object) -> None:
        """Keep a JSON value under a new key."""


@dataclass
class Usage:
    """What answering cost so far."""

    seconds: float = 0.0
    num_requests: int = 0
    num_generated_tokens: int = 0
    num_truncated: int = 0
    """Prompts that lost their beginning, for the model's context is too short."""


class Engine(Protocol):
    """A model that answers requests in an order of its own, and tells of each answer as soon as it is there."""

    usage: Usage

    def generate(self, requests: Sequence[Generation], on_answer: Callable[[int, str], None]) -> None:
        """Answer all requests, by their index."""

    def log_likelihoods(self, requests: Sequence[Likelihood], on_answer: Callable[[int, LogLikelihood], None]) -> None:
        """Answer all requests, by their index; raise UsageError where the model gives no likelihoods."""


class Remembering:
    """The Answerer that benchmarks see: what the memory has is not asked again; `load` is called when something is.

    `identity` is all that tells one model's answers from another's (hashes of base and adapter, template, dtype).
    `before` hears of the requests that the loaded model is going to be asked.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        memory: Memory,
        identity: Mapping[str, object],
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        before: Callable[[Sequence[Any]], None] = lambda requests: None,
    ) -> None:
        self._load = load
        self._memory = memory
        self._identity = dict(identity)
        self._on_progress = on_progress
        self._before = before
        self.usage = Usage()

    def generate(self, requests: Sequence[Generation]) -> list[str]:
        """Return the texts, in the order of the requests."""
        return [str(value) for value in self._answer(requests, lambda engine, *rest: engine.generate(*rest))]

    def log_likelihoods(self, requests: Sequence[Likelihood]) -> list[LogLikelihood]:
        """Return the log-likelihoods, in the order of the requests."""
        values = self._answer(requests, lambda engine, *rest: engine.log_likelihoods(*rest))
        return [LogLikelihood(**value) for value in values]

    def _answer(
        self,
        requests: Sequence[RequestT],
        ask: Callable[[Engine, Sequence[RequestT], Callable[[int, AnswerT], None]], None],
    ) -> list[Any]:
        keys = [self._key(request) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if self._memory.get(key) is None}
        if missing:
            names = list(missing)
            total, done = len(set(keys)), len(set(keys)) - len(missing)
            self._on_progress(done, total)

            def keep(index: int, answer: AnswerT) -> None:
                nonlocal done
                if isinstance(answer, LogLikelihood) and not math.isfinite(answer.log_prob):
                    raise not_finite()
                self._memory.add(names[index], answer if isinstance(answer, str) else asdict(answer))
                done += 1
                self._on_progress(done, total)

            engine = self._load()
            self._before(list(missing.values()))
            before, start = dict(vars(engine.usage)), time.monotonic()
            try:
                ask(engine, list(missing.values()), keep)
            finally:
                self.usage.seconds += time.monotonic() - start
                for name in ("num_requests", "num_generated_tokens", "num_truncated"):
                    spent = getattr(engine.usage, name) - before[name]
                    setattr(self.usage, name, getattr(self.usage, name) + spent)
        return [self._memory.get(key) for key in keys]

    def _key(self, request: Generation | Likelihood) -> str:
        asked = {"kind": type(request).__name__, "model": self._identity, **asdict(request)}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
