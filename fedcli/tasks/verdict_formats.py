"""Formats of single verdicts: a response, and whether it is desirable; and of pairs as two verdicts each."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fedcli.tasks.builtin_formats import CALLS, MESSAGES
from fedcli.tasks.conversation import Judged, Prompt, instruct
from fedcli.tasks.format import (
    EQUAL,
    MALFORMED,
    SHAREGPT,
    UNANSWERED,
    Context,
    Fields,
    Format,
    LeftOut,
    is_finite,
    is_given,
    opened,
    prompt_of,
    text,
    turns_of,
)

VERDICT_COLUMNS = (
    *("label", "kto_tag", "is_desirable", "desirable", "is_good", "good", "accepted", "preferred", "thumbs_up"),
    *("thumbs", "feedback", "rating", "verdict", "vote"),
)
"""Names of columns that say whether a response is good; the first that a row has counts."""
UNCLEAR = "verdict that is neither good nor bad"
WORDS: Mapping[str, bool] = {
    **dict.fromkeys(("true", "1", "good", "chosen", "accepted", "preferred", "desirable", "up", "thumbs up"), True),
    **dict.fromkeys(("thumbsup", "👍", "like", "liked", "upvote", "correct", "yes", "y"), True),
    **dict.fromkeys(("false", "0", "-1", "bad", "rejected", "dispreferred", "undesirable", "down"), False),
    **dict.fromkeys(("thumbs down", "thumbsdown", "👎", "dislike", "disliked", "downvote", "incorrect"), False),
    **dict.fromkeys(("no", "n"), False),
}


def verdict_word(value: object) -> str:
    """Return a verdict as the word or number that it is: thumbs_up as "thumbs up", 1.0 as "1"."""
    return f"{value:g}" if is_finite(value) else re.sub(r"[\s_-]+(?=[a-z])", " ", str(value).strip().lower())


def verdict_of(value: object, column: str) -> bool:
    """Return whether a verdict is that a response is desirable; raise LeftOut for one that is neither."""
    if isinstance(value, bool):
        return value
    said = WORDS.get(verdict_word(value))
    if said is None:
        told = f"column {column!r} is {str(value)[:60]!r}: true or false is wanted, 1 or 0, good or bad"
        raise LeftOut(UNCLEAR, told)
    return said


def _verdict(fields: Fields) -> bool:
    column = next((name for name in VERDICT_COLUMNS if is_given(fields.get(name))), None)
    if column is None:
        if empty := next((name for name in VERDICT_COLUMNS if name in fields), None):
            raise LeftOut(MALFORMED, f"column {empty!r}, which says whether the response is good, is empty")
        raise LeftOut(MALFORMED, f"no column says whether the response is good; it has {', '.join(map(str, fields))}")
    return verdict_of(fields[column], column)


def _unpaired(fields: Fields, context: Context) -> Judged:
    """Prompt, completion and label, as trl's unpaired preferences have them: texts, or lists of messages."""
    completion = fields.get("completion")
    if isinstance(completion, list):
        turns = (*prompt_of(fields, context), *turns_of(completion, "completion", context))
        return _judged(turns, fields)
    return Judged(prompt_of(fields, context), text(fields, "completion"), _verdict(fields))


def _conversation(fields: Fields, context: Context) -> Judged:
    """A conversation and a verdict on its last turn: LLaMA-Factory's rows have messages and label, or kto_tag."""
    column = next((name for name in MESSAGES if name in fields), MESSAGES[0])
    if column not in fields:
        text(fields, column)
    return _judged(opened(turns_of(fields[column], column, context, speakers=SHAREGPT), fields, context), fields)


def _instruction(fields: Fields, context: Context) -> Judged:
    """Alpaca's columns and a verdict: instruction, input (may be absent or empty), output."""
    extra = text(fields, "input") if fields.get("input") is not None else ""
    turns = opened(instruct(text(fields, "instruction"), text(fields, "output"), extra).turns, fields, context)
    return Judged(turns[:-1], turns[-1].content, _verdict(fields))


def _judged(turns: Prompt, fields: Fields) -> Judged:
    last = turns[-1]
    if last.role != "assistant":
        raise LeftOut(UNANSWERED, f"the conversation ends with the {last.role}'s turn")
    if last.tool_calls:
        raise LeftOut(CALLS, "the response that is judged calls tools")
    return Judged(turns[:-1], last.content, _verdict(fields))


def _half(fields: Fields, context: Context) -> Judged:
    """Pairs of the format preference: the chosen response is desirable, the rejected one is not."""
    for column in ("chosen", "rejected"):
        if column in fields:
            if fields["chosen"] == fields.get("rejected"):
                raise LeftOut(EQUAL)
            text(fields, "rejected" if column == "chosen" else "chosen")
    return _conversation(fields, context) if "messages" in fields else _unpaired(fields, context)


def _halves(rows: Iterable[tuple[Fields, str]]) -> Iterator[tuple[Fields, str]]:
    """Make two rows of each pair, of a response and a label each; rows that are no pairs pass."""
    for fields, where in rows:
        sides = [fields.get(column) for column in ("chosen", "rejected")]
        if None in sides or sides[0] == sides[1]:
            yield fields, where
            continue
        rest = {name: value for name, value in fields.items() if name not in ("chosen", "rejected")}
        for side, label in zip(sides, (True, False), strict=True):
            where_half = f"{where}, {'chosen' if label else 'rejected'}"
            if _is_dialogue(side):
                of_dialogue = {name: value for name, value in rest.items() if name not in ("prompt", *MESSAGES)}
                yield {**of_dialogue, "messages": side, "label": label}, where_half
            else:
                yield {**rest, "completion": side, "label": label}, where_half


def _is_dialogue(side: Any) -> bool:
    """Return whether a pair's side is a list of messages that begins with the prompt's."""
    first = side[0] if isinstance(side, list) and side else None
    return isinstance(first, Mapping) and first.get("role") != "assistant"


VERDICTS = (
    Format(
        "unpaired-preference",
        Judged,
        _unpaired,
        hub={"trl-lib/kto-mix-14k": "train", "trl-lib/ultrafeedback-gpt-3.5-turbo-helpfulness": "train"},
    ),
    Format("judged-messages", Judged, _conversation),
    Format("judged-instruction", Judged, _instruction),
    Format("pairs-as-verdicts", Judged, _half, assemble=_halves),
)
