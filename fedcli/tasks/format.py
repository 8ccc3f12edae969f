"""A format: how the columns of a row become what a task learns from, or why the row is left out."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from fedcli.tasks.conversation import Item, Prompt, Role, Turn

MALFORMED = "malformed"
EMPTY = "empty response"
NO_PROMPT = "empty prompt"
EQUAL = "same responses"
DUPLICATE = "duplicate"
TOO_LONG = "too long"
NOT_LEARNT = "nothing to learn"
NOT_TEXT = "not text alone"
REPEATED = "a key twice"
UNANSWERED = "no answer at the end"
JSON_RESULT = "result of a tool that is no text, written as JSON"

SPEAKERS: Mapping[str, Role] = {
    **{"system": "system", "developer": "system", "user": "user", "assistant": "assistant"},
    **{"tool": "tool", "function": "tool"},
}
"""OpenAI's roles."""
CALLERS = ("function_call", "tool_call")
"""Speakers of ShareGPT's rows whose words are calls of tools."""
SHAREGPT: Mapping[str, Role] = {
    **SPEAKERS,
    **dict.fromkeys(("human", "prompter", "question"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai", "bing", "bard", "answer", *CALLERS), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool_response", "ipython"), "tool"),
}
"""The speakers of ShareGPT's rows, as FastChat, LLaMA-Factory and others write them."""
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_TEXTS = ("text", "input_text", "output_text", "refusal", "thinking", "reasoning")

Fields: TypeAlias = Mapping[str, Any]


class LeftOut(Exception):
    """Why a row is not used: the reason that is counted, and what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason
        self.detail = detail or reason


@dataclass
class Context:
    """What a reader may use: the seed of its random choices, and a count of what it had to decide."""

    seed: int
    notes: Counter[str] = field(default_factory=Counter)
    unused: set[str] = field(default_factory=set)
    """What the row says and the reader does not use, beyond columns that it never looked at: `messages.name`."""


@dataclass(frozen=True)
class Format:
    """A format of rows; it is for the tasks that learn from its kind of item."""

    name: str
    item: type[Item]
    read: Callable[[Fields, Context], Item]
    """Makes an item of a row's columns, or raises LeftOut."""
    is_unique: bool = False
    """Whether rows that repeat an instruction are left out."""
    assemble: Callable[[Iterable[tuple[Fields, str]]], Iterator[tuple[Fields, str]]] | None = None
    """Makes rows of a file's own rows, each with its place, where several of them are one."""
    hub: Mapping[str, str] = field(default_factory=dict)
    """The hub's data sets that choose this format by themselves, and the split of their training rows."""


def text(fields: Fields, column: str) -> str:
    """Return a column's text; raise LeftOut where there is none."""
    value = fields.get(column)
    if not isinstance(value, str):
        lacks = "no text in" if column in fields else "no"
        told = f"{lacks} column {column!r}; it has {', '.join(map(str, fields)) or 'none'}"
        raise LeftOut(MALFORMED, told + ("" if column in fields else _where_else(fields, column)))
    return value


def _where_else(fields: Fields, column: str) -> str:
    """Return where a row has a column that it lacks: under a name that nearly is it, or one level deeper."""
    for name, value in fields.items():
        if _bare(name) == _bare(column):
            return f", where {name!r} differs in capitals or spaces: rename it"
        inner = value[0] if isinstance(value, list) and value else value
        if isinstance(inner, Mapping) and column in inner:
            return f", where {name!r} holds it one level deeper: write the row as what that holds"
    return ""


def _bare(name: object) -> str:
    return str(name).strip(" \t\r\n\xa0\ufeff\u200b").casefold()


def plain(fields: Fields, column: str) -> str:
    """Return a column as text; numbers (labels, scores) as they are written."""
    value = fields.get(column)
    return str(value) if isinstance(value, bool) or is_finite(value) else text(fields, column)


def prompt_of(fields: Fields, context: Context | None = None) -> Prompt:
    """Return the column prompt, a text or a list of messages, with the row's system and tools."""
    prompt = fields.get("prompt")
    turns = turns_of(prompt, "prompt", context) if isinstance(prompt, list) else (Turn("user", text(fields, "prompt")),)
    return turns if context is None else opened(turns, fields, context)


def turns_of(
    messages: object, column: str, context: Context | None = None, *, speakers: Mapping[str, Role] = SPEAKERS
) -> tuple[Turn, ...]:
    """Return a column's list of messages, {role, content} (or a JSON text of one), as turns.

    The keys weight (OpenAI's; train and loss, true or false, are the same), tool_calls, function_call and those of
    thoughts are used; `context` hears which others there are. Raises LeftOut where it is no such list.
    """
    messages = parsed(messages) if isinstance(messages, str) else messages
    if not isinstance(messages, list) or not messages:
        raise LeftOut(MALFORMED, f"column {column!r} is not a list of messages")
    return tuple(_turn(message, column, context, speakers) for message in messages)


def opened(turns: tuple[Turn, ...], fields: Fields, context: Context) -> tuple[Turn, ...]:
    """Return turns with what stands beside them in the row: system (or system_prompt), tools (or functions)."""
    for name in ("system", "system_prompt"):
        system = fields.get(name)
        if not is_given(system):
            continue
        own = [turn.content for turn in turns if turn.role == "system"]
        if isinstance(system, str) and not own:
            turns = (Turn("system", system), *turns)
        elif system not in own:
            context.unused.add(name)
    for name in ("tools", "functions"):
        if is_given(given := fields.get(name)) and given != "[]":
            tools = _functions(given)
            if tools and not turns[0].tools:
                turns = (replace(turns[0], tools=tools), *turns[1:])
            elif not tools or tools != turns[0].tools:
                context.unused.add(name)
    return turns


def _turn(message: object, column: str, context: Context | None, speakers: Mapping[str, Role]) -> Turn:
    fields = message if isinstance(message, Mapping) else {}
    is_sharegpt = speakers is not SPEAKERS
    speaker, said = ("from", "value") if is_sharegpt and "from" in fields else ("role", "content")
    name = fields.get(speaker)
    role = speakers.get(name.lower() if is_sharegpt else name) if isinstance(name, str) else None
    content, used = fields.get(said), {speaker, said, "weight"}
    thoughts, calls, is_learnt = "", "", True
    if isinstance(content, Mapping) and isinstance(content.get("type"), str):
        content = [content]
    if role == "tool" and _is_result(content):
        content = json.dumps(content, ensure_ascii=False, default=str)
        if context is not None:
            context.notes[JSON_RESULT] = 1
    if isinstance(content, list):
        content, thoughts = _parts(content, column)
    if role == "assistant":
        is_learnt = _weight(fields, used)
        if name in CALLERS:
            content, calls = "", _functions(content)
            if not calls:
                raise LeftOut(MALFORMED, f"a message of {name!r} in column {column!r} is no call in JSON")
        for key in ("tool_calls", "function_call"):
            if is_given(given := fields.get(key)) and not calls:
                calls = _functions(given)
                used |= {key} if calls else set()
        for key in _THOUGHTS:
            given = fields.get(key)
            if isinstance(given, str) and given and thoughts in ("", given):
                thoughts = given
                used.add(key)
        content = "" if content is None and calls else content
    if role is not None and isinstance(content, Mapping):
        keys = ", ".join(map(str, content)) or "none"
        raise LeftOut(NOT_TEXT, f"a message of {name!r} in column {column!r} is an object (its keys: {keys}), no text")
    if role is None or not isinstance(content, str):
        raise LeftOut(MALFORMED, f"a message in column {column!r} has no text, or the role {name!r}")
    if context is not None:
        context.unused |= {f"{column}.{key}" for key, value in fields.items() if key not in used and is_given(value)}
    return Turn(role, content, is_learnt=is_learnt, reasoning=thoughts, tool_calls=calls)


def _is_result(content: object) -> bool:
    """Return whether what a tool said is a value of JSON: an object, a number, a list that is none of parts."""
    if isinstance(content, list):
        return not all(isinstance(part, str) or (isinstance(part, Mapping) and "type" in part) for part in content)
    return isinstance(content, Mapping | int | float) and not (isinstance(content, Mapping) and "type" in content)


def _parts(parts: list[Any], column: str) -> tuple[str, str]:
    """Return the text of a message's parts, joined, and its thoughts."""
    texts: list[str] = []
    thoughts: list[str] = []
    for part in parts:
        fields = part if isinstance(part, Mapping) else {"text": part}
        kind = fields.get("type", "text")
        into = thoughts if kind in ("thinking", "reasoning") else texts
        text = fields.get(kind) if kind in ("thinking", "reasoning", "refusal") else fields.get("text")
        if kind not in _TEXTS or not isinstance(text, str):
            raise LeftOut(NOT_TEXT, f"a message in column {column!r} has a part of type {kind!r}")
        into.append(text)
    return "".join(texts), "".join(thoughts)


def _weight(message: Fields, used: set[str]) -> bool:
    """Return whether a response is learnt: OpenAI's weight is 0 or 1."""
    weight = message.get("weight")
    if weight is not None and weight not in (0, 1):
        raise LeftOut(MALFORMED, f"a message has the weight {weight!r}, which is neither 0 nor 1")
    flags = {key for key in ("train", "loss") if isinstance(message.get(key), bool)}
    used |= flags
    return weight != 0 and all(message[key] for key in flags)


def _functions(given: object) -> str:
    """Return calls, or descriptions of tools, as OpenAI's list in JSON: each is {type: function, function: {...}}.

    They come as that, or as bare functions, one or a list, or as the JSON text of either; "" for what is none.
    """
    given = parsed(given) if isinstance(given, str) else given
    functions = [
        parsed(each) if isinstance(each, str) else each for each in (given if isinstance(given, list) else [given])
    ]
    for number, function in enumerate(functions):
        if not isinstance(function, Mapping):
            return ""
        if not isinstance(function.get("function"), Mapping):
            if not isinstance(function.get("name"), str):
                return ""
            functions[number] = {"type": "function", "function": function}
    return json.dumps(functions, ensure_ascii=False, default=str) if functions else ""


def parsed(text: str) -> Any:
    """Return what a text of JSON says, a list or an object; None where it is no such text."""
    try:
        return json.loads(text) if text.lstrip()[:1] in ("[", "{") else None
    except (ValueError, RecursionError):
        return None


def is_given(value: object) -> bool:
    """Return whether a key says anything: null, and an empty text, list or object, do not."""
    return value is not None and value != "" and value != [] and value != {}


def is_finite(score: object) -> bool:
    """Return whether a column's value is a finite number."""
    try:
        return isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
    except OverflowError:
        return False
