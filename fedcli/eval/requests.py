"""What a benchmark asks of a model, and what it gets; whether a local model or an endpoint answers is open."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from fedcli.tasks.conversation import Prompt

Text: TypeAlias = Prompt | str
"""Turns, which the workspace's template (or an endpoint's own) writes; or a text that is taken as it is."""


@dataclass(frozen=True)
class Generation:
    """A request for text: greedy at temperature 0, else sampled.

    The answer ends before the first of `stop`, at the model's end of sequence, or after `max_new_tokens`.
    """

    prompt: Text
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    sample: int = 0
    """Which of several samples of one prompt this is."""


@dataclass(frozen=True)
class Likelihood:
    """A request for log p(continuation | prompt); behind turns the end of the response counts too."""

    prompt: Text
    continuation: str


@dataclass(frozen=True)
class LogLikelihood:
    """The answer to a Likelihood: the sum over the continuation's tokens, in nats."""

    log_prob: float
    is_greedy: bool
    """Whether greedy decoding would give this continuation."""
    num_tokens: int


class Answerer(Protocol):
    """A model that answers requests, in their order; batches, caching and resumption are behind it."""

    def generate(self, requests: Sequence[Generation]) -> list[str]:
        """Return the texts."""

    def log_likelihoods(self, requests: Sequence[Likelihood]) -> list[LogLikelihood]:
        """Return the log-likelihoods; raises UsageError where the model gives none (an endpoint)."""


def before_stop(text: str, stop: Sequence[str]) -> str:
    """Return a text up to the first of the stop sequences in it."""
    return text[: min((position for mark in stop if (position := text.find(mark)) >= 0), default=len(text))]
