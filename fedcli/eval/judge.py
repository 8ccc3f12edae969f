"""Language models as judges: what they say is kept, so that none is asked twice; what says nothing is not scored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from fedcli.eval.remembered import Engine, Memory, Remembering
from fedcli.eval.requests import Generation, Likelihood, LogLikelihood

VerdictT = TypeVar("VerdictT")

SECOND_TEMPERATURE = 0.7
"""Of the second attempt: a greedy judge would only repeat itself."""
CHARACTERS_PER_TOKEN = 4
"""An estimate for English text."""


@dataclass(frozen=True)
class Estimate:
    """What asking a judge is going to cost, second attempts aside; what is kept already costs nothing."""

    num_calls: int
    num_prompt_tokens: int
    """An estimate: the prompts' characters divided by CHARACTERS_PER_TOKEN."""
    max_reply_tokens: int


@dataclass(frozen=True)
class Judgment(Generic[VerdictT]):
    """What a judge made of one request: None where neither of two replies holds a verdict."""

    verdict: VerdictT | None
    replies: tuple[str, ...]

    def record(self) -> dict[str, object]:
        """Return what a reader of the answers wants to see."""
        if self.verdict is None:
            return {"problem": "the judge gave no verdict that parses, twice", "judgments": list(self.replies)}
        return {"judgment": self.replies[-1]}


class Judge:
    """A model that judges; `load` is called when something must be asked that is not in the memory.

    `name` tells judges apart in the memory, whose keys hold all that is sent. `confirm` hears what it will cost before
    the first request of this object's life, and raises what the caller wants where the answer is no.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], Engine],
        memory: Memory,
        *,
        confirm: Callable[[Estimate], None] = lambda estimate: None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.name = name
        self._load = load
        self._confirm = confirm
        self._engine: _Confirmed | None = None
        self._answerer = Remembering(self._confirmed, memory, {"judge": name}, on_progress)

    def ask(self, requests: Sequence[Generation], parse: Callable[[str], VerdictT | None]) -> list[Judgment[VerdictT]]:
        """Return the judgments in order; a reply that `parse` makes nothing of is asked for once more."""
        first = self._answerer.generate(requests)
        failed = [index for index, reply in enumerate(first) if parse(reply) is None]
        again = [replace(requests[index], temperature=SECOND_TEMPERATURE, sample=1) for index in failed]
        second = dict(zip(failed, self._answerer.generate(again), strict=True))
        judgments = []
        for index, reply in enumerate(first):
            replies = (reply, second[index]) if index in second else (reply,)
            judgments.append(Judgment(parse(replies[-1]), replies))
        return judgments

    def _confirmed(self) -> Engine:
        if self._engine is None:
            self._engine = _Confirmed(self._load(), self._confirm)
        return self._engine


class _Confirmed:
    """An engine that says what its first requests will cost before it asks them."""

    def __init__(self, engine: Engine, confirm: Callable[[Estimate], None]) -> None:
        self.usage = engine.usage
        self._engine = engine
        self._confirm: Callable[[Estimate], None] | None = confirm

    def generate(self, requests: Sequence[Generation], on_answer: Callable[[int, str], None]) -> None:
        if self._confirm is not None:
            self._confirm(estimate(requests))
            self._confirm = None
        self._engine.generate(requests, on_answer)

    def log_likelihoods(self, requests: Sequence[Likelihood], on_answer: Callable[[int, LogLikelihood], None]) -> None:
        self._engine.log_likelihoods(requests, on_answer)


def estimate(requests: Sequence[Generation]) -> Estimate:
    """Return what requests will cost."""
    texts = (
        text
        for request in requests
        for text in ([request.prompt] if isinstance(request.prompt, str) else [turn.text for turn in request.prompt])
    )
    return Estimate(
        len(requests), sum(map(len, texts)) // CHARACTERS_PER_TOKEN, sum(request.max_new_tokens for request in requests)
    )
