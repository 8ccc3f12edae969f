"""Pieces of a conversation's text, and what templates note of a conversation that they do not use."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedcli.tasks.conversation import Turn

EARLIER = "earlier responses not learnt, as the template rewrites earlier turns"
NO_END = "earlier responses learnt without an end, as the template writes none"
NO_TOOLS = "tools not used by the template"
NO_CALLS = "tool calls not written by the template"
NO_THOUGHTS = "thoughts not written by the template"
NO_SYSTEM = "system turn not written by the template"
NO_TEXT = "text beside tool calls not written by the template"


@dataclass(frozen=True)
class Segment:
    """A piece of text; the end token follows where `ends` is set, and is learnt as the text is."""

    text: str
    is_supervised: bool = False
    ends: bool = False


def learns(turns: Sequence[Turn], position: int, last_only: bool) -> bool:
    """Return whether a response is learnt: every one that may be, or with `last_only` the last turn alone."""
    return turns[position].is_learnt and (not last_only or position == len(turns) - 1)
