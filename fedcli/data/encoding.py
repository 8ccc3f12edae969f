"""Token ids of prompts and responses; the boundary between them is made, never searched for."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedcli.data.rows import Example, Preference
from fedcli.data.template import alpaca
from fedcli.errors import RequirementError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedExample:
    """Token ids (int32) of prompt, response and end token; only those from `prompt_length` on are supervised."""

    ids: NDArray[np.int32]
    prompt_length: int

    @property
    def num_tokens(self) -> int:
        """The length of `ids`."""
        return len(self.ids)


@dataclass(frozen=True)
class EncodedPair:
    """Two responses to one prompt."""

    chosen: EncodedExample
    rejected: EncodedExample

    @property
    def num_tokens(self) -> int:
        """The tokens of both sides."""
        return self.chosen.num_tokens + self.rejected.num_tokens

    @property
    def key(self) -> bytes:
        """A hash of both sides' token ids, and so of row, template, tokenizer and max_length."""
        sides = (self.chosen, self.rejected)
        shape = f"{[(side.num_tokens, side.prompt_length) for side in sides]}"
        return hashlib.sha256(b"".join([shape.encode(), *(side.ids.tobytes() for side in sides)])).digest()


EncodedT = TypeVar("EncodedT")


@dataclass(frozen=True)
class EncodedRows(Generic[EncodedT]):
    """A client's usable rows, and how many were cut or could not be used."""

    examples: list[EncodedT]
    num_truncated: int
    """Rows whose response was cut to fit max_length."""
    num_unusable: int
    """Rows with an empty response, or with a prompt that leaves no room for one token of it; pairs of equal sides."""


class Encoder:
    """Encodes for one tokenizer; raises RequirementError where that has no end-of-sequence token."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self.start_ids = self._special_start()
        self.end_id = self._special_end()

    def prompt(self, instruction: str) -> list[int]:
        """Return the ids of an instruction's prompt, behind the start token that the tokenizer itself would add."""
        return [*self.start_ids, *self._ids([alpaca(instruction)])[0]]

    def rows(self, examples: Sequence[Example], max_length: int) -> EncodedRows[EncodedExample]:
        """Encode examples, cutting responses at `max_length` tokens in all, and count what was cut or unusable.

        An example is its prompt, a space, the response and the end token. Prompt and response are tokenised together
        where that leaves the prompt's own tokens as they are, so that training sees what generation will; a tokenizer
        that would merge across the boundary gets them apart. A response that is cut loses its end token too: the model
        is not taught to stop in the middle.
        """
        encoded = self._encode(examples, max_length)
        usable = [example for example, _ in filter(None, encoded)]
        num_truncated = sum(was_cut for _, was_cut in filter(None, encoded))
        return EncodedRows(usable, num_truncated, len(encoded) - len(usable))

    def pairs(self, preferences: Sequence[Preference], max_length: int) -> EncodedRows[EncodedPair]:
        """Encode both sides of preferences as `rows` does; a pair whose sides are equal, cut or not, is unusable."""
        chosen = self._encode([Example(row.prompt, row.chosen) for row in preferences], max_length)
        rejected = self._encode([Example(row.prompt, row.rejected) for row in preferences], max_length)
        usable = []
        num_truncated = 0
        for one, other in zip(chosen, rejected, strict=True):
            if one is not None and other is not None and not np.array_equal(one[0].ids, other[0].ids):
                usable.append(EncodedPair(one[0], other[0]))
                num_truncated += one[1] or other[1]
        return EncodedRows(usable, num_truncated, len(preferences) - len(usable))

    def _encode(self, examples: Sequence[Example], max_length: int) -> list[tuple[EncodedExample, bool] | None]:
        """Return each example and whether it was cut; None where it is unusable."""
        prompts = [alpaca(example.instruction) for example in examples]
        responses = [" " + example.response for example in examples]
        prompt_ids = self._ids(prompts)
        joint_ids = self._ids([prompt + response for prompt, response in zip(prompts, responses, strict=True)])
        encoded: list[tuple[EncodedExample, bool] | None] = []
        for response, before, joint in zip(responses, prompt_ids, joint_ids, strict=True):
            prompt_length = len(self.start_ids) + len(before)
            if not response.strip() or prompt_length >= max_length:
                encoded.append(None)
                continue
            after = joint[len(before) :] if joint[: len(before)] == before else self._ids([response])[0]
            ids = [*self.start_ids, *before, *after, self.end_id]
            example = EncodedExample(np.array(ids[:max_length], np.int32), prompt_length)
            encoded.append((example, len(ids) > max_length))
        return encoded

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
