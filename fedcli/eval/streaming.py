"""An answer that is told piece by piece while it is generated."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers.generation.streamers import BaseStreamer

if TYPE_CHECKING:
    import torch

_UNFINISHED = "\ufffd"
"""What a tokenizer writes for the first bytes of a character whose others are still to come."""
_LONGEST_CLEANED = len(" 've")
"""Some tokenizers clean up what they decode: they drop the space before such an ending once it is whole."""


@dataclass(frozen=True)
class StreamedAnswer:
    """An answer, and what it took."""

    text: str
    num_prompt_tokens: int
    num_tokens: int
    """Those that were generated, an end token among them."""
    is_cut: bool
    """Whether it ends because it must not be longer, not because the model ended it."""
    prompt_is_cut: bool
    """Whether the prompt lost its beginning: the model's context does not hold it with an answer."""


class Pieces(BaseStreamer):
    """Tells of a single answer's text as its tokens come; put together, the pieces are the text that `decode` gives.

    transformers' TextStreamer decodes each line by itself, and so loses the space that a line of a sentencepiece model
    begins with. Here the answer is decoded from its start, and what is new of it is told: whole characters, and a space
    once it is sure to stay.
    """

    def __init__(self, decode: Callable[[list[int]], str], on_text: Callable[[str], None]) -> None:
        self.tokens: list[int] = []
        self._decode = decode
        self._on_text = on_text
        self._told = ""
        self._is_prompt = True

    def put(self, value: "torch.Tensor") -> None:
        """Take the prompt first, and then one token after another."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.tokens += value.flatten().tolist()
        text = self._decode(self.tokens).rstrip(_UNFINISHED)
        space = text.rfind(" ")
        self._tell(text[:space] if space >= 0 and len(text) - space <= _LONGEST_CLEANED else text)

    def end(self) -> None:
        """Tell what is left of the answer."""
        self._tell(self._decode(self.tokens))

    def _tell(self, text: str) -> None:
        if len(text) > len(self._told) and text.startswith(self._told):
            self._on_text(text[len(self._told) :])
            self._told = text
