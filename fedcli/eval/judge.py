"""Language models as judges: what they say is kept, so that none is asked twice; what says nothing is not scored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Generic, TypeVar

from fedcli.eval.remembered import Engine, Memory, Remembering
from fedcli.eval.requests import Generation

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

    def marks(self, *metrics: str) -> dict[str, VerdictT]:
        """Return the verdict as the mark of some metrics; none where there is no verdict."""
        return {} if self.verdict is None else dict.fromkeys(metrics, self.verdict)

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
        confirm: Callable[[Estimate], None] | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.name = name
        self._confirm = confirm
        self._answerer = Remembering(cache(load), memory, {"judge": name}, on_progress, self._tell)

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

    def _tell(self, requests: Sequence[Generation]) -> None:
        if self._confirm is not None:
            self._confirm(estimate(requests))
            self._confirm = None


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
