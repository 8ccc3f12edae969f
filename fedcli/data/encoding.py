"""Token ids of prompts and responses; the boundary between them is made, never searched for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedcli.data.rows import Example
from fedcli.data.template import alpaca
from fedcli.errors import RequirementError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedExample:
    """Token ids (int32) of prompt, response and end token; only those from `prompt_length` on are supervised."""

    ids: NDArray[np.int32]
    prompt_length: int


@dataclass(frozen=True)
class EncodedRows:
    """A client's usable rows, and how many were cut or could not be used."""

    examples: list[EncodedExample]
    num_truncated: int
    """Rows whose response was cut to fit max_length."""
    num_unusable: int
    """Rows with an empty response, or with a prompt that leaves no room for one token of it."""


class Encoder:
    """Encodes for one tokenizer; raises RequirementError where that has no end-of-sequence token."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self.start_ids = self._special_start()
        self.end_id = self._special_end()

    def prompt(self, instruction: str) -> list[int]:
        """Return the ids of an instruction's prompt, behind the start token that the tokenizer itself would add."""
        return [*self.start_ids, *self._ids([alpaca(instruction)])[0]]

    def rows(self, examples: Sequence[Example], max_length: int) -> EncodedRows:
        """Encode examples, cutting responses at `max_length` tokens in all, and count what was cut or unusable.

        An example is its prompt, a space, the response and the end token. Prompt and response are tokenised together
        where that leaves the prompt's own tokens as they are, so that training sees what generation will; a tokenizer
        that would merge across the boundary gets them apart. A response that is cut loses its end token too: the model
        is not taught to stop in the middle.
        """
        prompts = [alpaca(example.instruction) for example in examples]
        responses = [" " + example.response for example in examples]
        prompt_ids = self._ids(prompts)
        joint_ids = self._ids([prompt + response for prompt, response in zip(prompts, responses, strict=True)])
        usable = []
        num_truncated = num_unusable = 0
        for response, before, joint in zip(responses, prompt_ids, joint_ids, strict=True):
            prompt_length = len(self.start_ids) + len(before)
            if not response.strip() or prompt_length >= max_length:
                num_unusable += 1
                continue
            after = joint[len(before) :] if joint[: len(before)] == before else self._ids([response])[0]
            ids = [*self.start_ids, *before, *after, self.end_id]
            num_truncated += len(ids) > max_length
            usable.append(EncodedExample(np.array(ids[:max_length], np.int32), prompt_length))
        return EncodedRows(usable, num_truncated, num_unusable)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # split_special_tokens: a text that spells </s> is no end of sequence
        encoded = self._tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _special_start(self) -> list[int]:
        """Return the special tokens that the tokenizer puts in front of a text: [bos], [cls] or none."""
        plain = self._ids(["a"])[0]
        special: list[int] = self._tokenizer("a")["input_ids"]
        for position in range(len(special) - len(plain) + 1):
            if special[position : position + len(plain)] == plain:
                return special[:position]
        return []

    def _special_end(self) -> int:
        for token_id in (self._tokenizer.eos_token_id, self._tokenizer.sep_token_id):
            if isinstance(token_id, int):
                return token_id
        raise RequirementError(
            "the base model's tokenizer has no end-of-sequence token",
            hint="Set eos_token in its tokenizer_config.json: without it no response would ever end.",
        )
