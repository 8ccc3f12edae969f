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
from transformers.utils.chat_template_utils import render_jinja_template

from fedcli.data.encoding import Encoder
from fedcli.data.segments import NO_CALLS, NO_SYSTEM, NO_THOUGHTS, NO_TOOLS
from fedcli.tasks.conversation import Example, Turn
from support.tokenizer_kinds import SPECIAL, byte_level, stretches, turns_of

_BARS = "[|\uff5c]"
_CONTROL = re.compile(
    rf"<{_BARS}[^<>\n'\"\\{{}}]{{1,30}}{_BARS}>"
    r"|<(?:start|end)_of_(?:turn|utterance)>|<\|[a-z_]+>|<[a-z_]+\|>|\[/?INST\]"
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


def tokenizer_of(name: str, *, special_thoughts: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose special tokens are those that a template writes."""
    source, training = families()[name]
    tokenizer = byte_level([])
    control = {*_CONTROL.findall(source + (training or "")), "<|endoftext|>"} - {*SPECIAL}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(control)})
    if special_thoughts:
        tokenizer.add_tokens([AddedToken(token, special=True) for token in _THINK])
    if name.startswith("phi"):
        tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = source
    return tokenizer


@dataclass(frozen=True)
class Told:
    """What is learnt of a conversation, stretch by stretch; or why it is left out."""

    learnt: tuple[str, ...] = ()
    notes: frozenset[str] = frozenset()
    left_out: str | None = None


@functools.cache
def encoder_of(name: str, *, special_thoughts: bool = False) -> tuple[PreTrainedTokenizerFast, Encoder]:
    """Return a template's tokenizer and what fedcli makes of it, on one day."""
    tokenizer = tokenizer_of(name, special_thoughts=special_thoughts)
    return tokenizer, Encoder(tokenizer, "chat", date="2026-01-02")


def by_fedcli(name: str, turns: Sequence[Turn], *, special_thoughts: bool = False) -> Told:
    """Return what fedcli learns of a conversation with trl's template of that name."""
    tokenizer, encoder = encoder_of(name, special_thoughts=special_thoughts)
    rows = encoder.encode([Example(tuple(turns))], 10**6)
    if not rows:
        return Told(left_out=next(iter(rows.first_cases.values())))
    found = stretches(rows[0].sides[0])
    return Told(tuple(tokenizer.decode(part.ids) for part in found if part.is_supervised), frozenset(rows.notes))


def by_training_form(name: str, turns: Sequence[Turn]) -> Told:
    """Return what trl's training form, or a template's own {% generation %} marks, learn."""
    source, training = families()[name]
    options = {"tools": json.loads(turns[0].tools)} if turns[0].tools else {}
    try:
        (text,), (spans,) = render_jinja_template(
            conversations=[_messages(turns, in_parts=name in IN_PARTS)],
            chat_template=training or source,
            return_assistant_tokens_mask=True,
            **tokenizer_of(name).special_tokens_map,
            **options,
        )
    except Exception as error:  # whatever a template raises is its refusal
        return Told(left_out=str(error))
    joined: list[list[int]] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1][1] = end
        elif start < end:
            joined.append([start, end])
    return Told(tuple(text[start:end] for start, end in joined))


def rendered(name: str, turns: Sequence[Turn]) -> str:
    """Return a conversation as transformers writes it with trl's template of that name."""
    options = {"tools": json.loads(turns[0].tools)} if turns[0].tools else {}
    tokenizer, made = tokenizer_of(name), _messages(turns, in_parts=name in IN_PARTS)
    try:
        return str(tokenizer.apply_chat_template(made, tokenize=False, **options))
    except TypeError:  # of a call's arguments, which some templates want as JSON
        for message in made:
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        return str(tokenizer.apply_chat_template(made, tokenize=False, **options))


def has_marks(name: str) -> bool:
    """Return whether a template has a training form, or marks of its own."""
    source, training = families()[name]
    return training is not None or "generation %}" in source.replace("generation -%}", "generation %}")


def _messages(turns: Sequence[Turn], *, in_parts: bool) -> list[dict[str, Any]]:
    made = []
    for turn in turns:
        message: dict[str, Any] = {
            "role": turn.role,
            "content": [{"type": "text", "text": turn.text}] if in_parts else turn.text,
        }
        if turn.reasoning:
            message["reasoning_content"] = turn.reasoning
        if turn.tool_calls:
            message["tool_calls"] = json.loads(turn.tool_calls)
        made.append(message)
    return made


IN_PARTS = ("idefics3", "llava_next", "smolvlm")
"""Templates that read a list of parts alone."""
_CALL = [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Bern"}}}]
_TOOL = {
    "name": "get_weather",
    "description": "Tells the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "a city"}},
        "required": ["city"],
    },
}
CALL = json.dumps(_CALL)
TOOLS = json.dumps([{"type": "function", "function": _TOOL}])
_THINKS = "<think>\nhm hm\n</think>\n\n{}"
MORE = {
    "thoughts": turns_of("And two?", _THINKS.format("It is 2.")),
    "thoughts twice": turns_of("And four?", _THINKS.format("It is 4."), "And six?", _THINKS.format("It is 6.")),
    "thoughts in the first": turns_of("And four?", _THINKS.format("It is 4."), "And six?", "It is 6."),
    "reasoning": (Turn("user", "q"), Turn("assistant", "a", reasoning="long thought")),
    "tools": (Turn("user", "Is it warm?", tools=TOOLS), Turn("assistant", "It is 1.")),
    "a call": (
        Turn("user", "Is it warm?", tools=TOOLS),
        Turn("assistant", "", tool_calls=CALL),
        Turn("tool", "sunny"),
        Turn("assistant", "It is sunny."),
    ),
    "a call with text": (Turn("user", "Is it warm?", tools=TOOLS), Turn("assistant", "I look.", tool_calls=CALL)),
}
"""Conversations with thoughts and tools, beside those of tokenizer_kinds."""


def describe(name: str) -> tuple[str, ...]:
    """Return a template's row of docs/DATA.md, without its name: what it can, each by trying."""
    two = by_fedcli(name, turns_of("q1", "a1", "q2", "a2"))
    system = by_fedcli(name, turns_of("q", "a", system="s"))
    thoughts, twice, apart, tools, call = (
        by_fedcli(name, MORE[each]) for each in ("thoughts", "thoughts twice", "reasoning", "tools", "a call")
    )
    written = [found.left_out is None and NO_THOUGHTS not in found.notes for found in (thoughts, apart)]
    last = [found.left_out is None and len(found.learnt) == 2 for found in (two, twice)]
    ends = dict.fromkeys(stretch.strip().removeprefix("a1").removeprefix("a2") for stretch in two.learnt)
    eos = encoder_of(name)[0].eos_token
    own = "eos_token" in families()[name][0] or eos in families()[name][0]
    return (
        ", ".join("`" + end.strip().replace("|", "\\|") + "`" for end in ends) if own or eos not in ends else "eos",
        "refused" if system.left_out else "dropped" if NO_SYSTEM in system.notes else "yes",
        "yes" if NO_TOOLS not in tools.notes else "no",
        "yes" if call.left_out is None and len(call.learnt) == 2 and NO_CALLS not in call.notes else "no",
        "yes" if all(written) else "in the text" if written[0] else "no",
        "all" if all(last) else "all without thoughts" if last[0] else "the last",
    )


HEAD = ("templates", "end", "system", "tools", "calls", "thoughts", "of several responses")


def table(names: Iterable[str]) -> list[str]:
    """Return the lines of docs/DATA.md's table; templates that can the same share one."""
    by_row: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        by_row.setdefault(describe(name), []).append(name)
    lines = [_line(HEAD), "|" + "---|" * len(HEAD)]
    for row, alike in by_row.items():
        while alike:
            count = next(count for count in range(len(alike), 0, -1) if count == 1 or _fits(alike[:count], row))
            lines.append(_line((", ".join(alike[:count]), *row)))
            alike = alike[count:]
    return lines


def _fits(names: list[str], row: tuple[str, ...]) -> bool:
    return len(_line((", ".join(names), *row))) <= 120


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(*table(families()), sep="\n")
