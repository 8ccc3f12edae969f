"""The chat templates that trl ships, with its training forms, and what of a conversation each of them learns."""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from fedcli.tasks.conversation import Turn
from support.tokenizer_kinds import SPECIAL, byte_level

_BARS = "[|\uff5c]"
_CONTROL = re.compile(
    rf"<{_BARS}[^<>\n'\"\\{{}}]{{1,30}}{_BARS}>" r"|<(?:start|end)_of_(?:turn|utterance)>|<\|?turn\|?>|\[/?INST\]"
)
_THINK = ("<think>", "</think>")


def _folder() -> Path:
    found = find_spec("trl")
    assert found is not None
    assert found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0]) / "chat_templates"


@functools.cache
def families() -> dict[str, tuple[str, str | None]]:
    """Return each template by its name, and its training form where there is one."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in sorted(_folder().glob("*.jinja"))}
    return {
        name: (source, sources.get(f"{name}_training"))
        for name, source in sources.items()
        if not name.endswith("_training")
    }


def tokenizer_of(name: str, texts: Iterable[str] = (), *, special_thoughts: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose special tokens are those that a template writes."""
    source, training = families()[name]
    tokenizer = byte_level(texts)
    control = {*_CONTROL.findall(source + (training or "")), "<|endoftext|>"} - {*SPECIAL}
    if "<|turn>" in source or "<turn|>" in source:
        control |= {"<|turn>", "<turn|>", "<|channel>", "<channel|>"}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(control)})
    if special_thoughts:
        tokenizer.add_tokens([AddedToken(token, special=True) for token in _THINK])
    if name.startswith("phi"):
        tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = source
    return tokenizer


@dataclass(frozen=True)
class Told:
    """A conversation as text, with the stretches of characters that are learnt."""

    text: str
    learnt: tuple[str, ...]


def messages(turns: Sequence[Turn], *, in_parts: bool) -> list[dict[str, Any]]:
    """Return a conversation as templates read it."""
    made = []
    for turn in turns:
        text: Any = [{"type": "text", "text": turn.text}] if in_parts else turn.text
        message = {"role": turn.role, "content": text}
        if turn.reasoning:
            message["reasoning_content"] = turn.reasoning
        if turn.tool_calls:
            message["tool_calls"] = json.loads(turn.tool_calls)
        made.append(message)
    return made


def by_training_form(name: str, turns: Sequence[Turn], *, in_parts: bool = False) -> Told:
    """Return what trl's training form writes and learns, neighbouring stretches as one."""
    from transformers.utils.chat_template_utils import render_jinja_template

    source, training = families()[name]
    tokenizer = tokenizer_of(name)
    options = {"tools": json.loads(turns[0].tools)} if turns[0].tools else {}
    (text,), (spans,) = render_jinja_template(
        conversations=[messages(turns, in_parts=in_parts)],
        chat_template=training or source,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
        **options,
    )
    joined: list[list[int]] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1][1] = end
        elif start < end:
            joined.append([start, end])
    return Told(text, tuple(text[start:end] for start, end in joined))
