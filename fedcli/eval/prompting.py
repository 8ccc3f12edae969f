"""Requests as token ids, the same for every backend."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedcli.data.encoding import Encoder
from fedcli.eval.remembered import Usage
from fedcli.eval.requests import Generation, Likelihood, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNKNOWN_CONTEXT = 2048
"""Tokens, for a model that does not say how many it takes."""


class PromptEncoder:
    """Encodes requests for one model; a prompt that its context is too short for loses its beginning, and is counted.

    `config` is the model's own (transformers), for the length of its context.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", encoder: Encoder, config: Any, usage: Usage) -> None:
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._usage = usage
        self.end_id = encoder.end_id
        limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
        self.context = min(
            (limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**9), default=UNKNOWN_CONTEXT
        )
        """Tokens that the model takes, prompt and answer together."""

    def room(self, request: Generation) -> int:
        """Return how many tokens may be generated: at most half of the context."""
        return min(request.max_new_tokens, self.context // 2)

    def asking(self, prompts: Sequence[Text], room: int) -> list[list[int]]:
        """Return the ids of prompts, each of which leaves room for an answer."""
        written = iter(self._encoder.prompts([prompt for prompt in prompts if not isinstance(prompt, str)]))
        return [self._cut(self._text(prompt) if isinstance(prompt, str) else next(written), room) for prompt in prompts]

    def continued(self, requests: Sequence[Likelihood]) -> list[tuple[list[int], int]]:
        """Return the ids of prompts with continuations, and how many of each are the continuation's, at least one.

        They may be one more than the context holds: the last one is only predicted.
        """
        turns = [(request.prompt, request.continuation) for request in requests if not isinstance(request.prompt, str)]
        written = iter(self._encoder.responses(*zip(*turns, strict=True)) if turns else ())
        rows = []
        for request in requests:
            if isinstance(request.prompt, str):
                whole, length = self._joined(request.prompt, request.continuation)
            else:
                example = next(written)
                # A chat template may write more behind the response.
                whole = example.ids[: int(example.supervised.nonzero()[0][-1]) + 1].tolist()
                length = int(example.supervised.sum())
            ids = self._cut(whole, -1)
            rows.append((ids, min(max(length, 1), len(ids) - 1)))
        return rows

    def _joined(self, prompt: str, continuation: str) -> tuple[list[int], int]:
        """Return the ids of a text, and how many are the continuation's; white space before it is, as in lm-eval."""
        context = prompt.rstrip()
        whole = self._text(prompt + continuation)
        if len(whole) < 2 or (not context and whole[0] != self._start_id()):
            whole = [self._start_id(), *whole]
        return whole, len(whole) - (len(self._text(context)) if context else 1)

    def _text(self, text: str) -> list[int]:
        """Return the ids of a text as it is, with the start token where the tokenizer puts one; never none at all."""
        return [int(token) for token in self._tokenizer(text, verbose=False)["input_ids"]] or [self._start_id()]

    def _start_id(self) -> int:
        start = self._tokenizer.bos_token_id
        return start if isinstance(start, int) else self.end_id

    def _cut(self, ids: list[int], room: int) -> list[int]:
        self._usage.num_truncated += len(ids) > self.context - room
        return ids[-(self.context - room) :]
