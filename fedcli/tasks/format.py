"""A format: how the columns of a row become what a task learns from, or why the row is left out."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from fedcli.tasks.conversation import ROLES, Item, Prompt, Turn

MALFORMED = "malformed"
EMPTY = "empty response"
NO_PROMPT = "empty prompt"
EQUAL = "same responses"
DUPLICATE = "duplicate"
TOO_LONG = "too long"
NOT_LEARNT = "nothing to learn"

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


@dataclass(frozen=True)
class Format:
    """A format of rows; it is for the tasks that learn from its kind of item."""

    name: str
    item: type[Item]
    read: Callable[[Fields, Context], Item]
    """Makes an item of a row's columns, or raises LeftOut."""
    is_unique: bool = False
    """Whether rows that repeat an instruction are left out."""
    hub: Mapping[str, str] = field(default_factory=dict)
    """The hub's data sets that choose this format by themselves, and the split of their training rows."""


def text(fields: Fields, column: str) -> str:
    """Return a column's text; raise LeftOut where there is none."""
    value = fields.get(column)
    if not isinstance(value, str):
        lacks = "no text in" if column in fields else "no"
        raise LeftOut(MALFORMED, f"{lacks} column {column!r}; it has {', '.join(map(str, fields)) or 'none'}")
    return value


def plain(fields: Fields, column: str) -> str:
    """Return a column as text; numbers (labels, scores) as they are written."""
    value = fields.get(column)
    return str(value) if isinstance(value, bool) or is_finite(value) else text(fields, column)


def prompt_of(fields: Fields) -> Prompt:
    """Return the column prompt, a text or a list of messages."""
    prompt = fields.get("prompt")
    return (Turn("user", text(fields, "prompt")),) if not isinstance(prompt, list) else turns_of(prompt, "prompt")


def turns_of(messages: object, column: str) -> tuple[Turn, ...]:
    """Return a column's list of messages, {role, content}, as turns; raise LeftOut where it is none."""
    if not isinstance(messages, list) or not messages:
        raise LeftOut(MALFORMED, f"column {column!r} is not a list of messages")
    turns = []
    for message in messages:
        fields = message if isinstance(message, Mapping) else {}
        role = next((known for known in ROLES if known == fields.get("role")), None)
        content = fields.get("content")
        if role is None or not isinstance(content, str):
            raise LeftOut(MALFORMED, f"a message in column {column!r} has no text, or the role {fields.get('role')!r}")
        turns.append(Turn(role, content))
    return tuple(turns)


def is_finite(score: object) -> bool:
    """Return whether a column's value is a finite number."""
    try:
        return isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
    except OverflowError:
        return False
