"""Formats: how the columns of a row become an example or a preference, and what is left out, by reason.

A new format is a function and one entry of READERS, and its name in fedcli.config; CONTRIBUTING.md walks through it.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from fedcli.config import Columns, ColumnsFormat, DataFormat, FormatName
from fedcli.data.conversation import ROLES, Example, Item, Preference, Prompt, Role, Turn, instruct
from fedcli.data.source import Row
from fedcli.errors import ConfigError
from fedcli.randomness import stream

MALFORMED = "malformed"
EMPTY = "empty response"
NO_PROMPT = "empty prompt"
EQUAL = "same responses"
DUPLICATE = "duplicate"
FORKED = "the dialogues fork before their last turn"
UNSCORED = "fewer than two scores"
TIED = "all scores tie"
TOO_LONG = "too long"

BEST_TIED = "best score tied, one of the best taken at random"
COMPLETION_UNSCORED = "completions without a score, not used"

Fields: TypeAlias = Mapping[str, Any]
Reader: TypeAlias = Callable[[Fields, "Context"], Item]


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


@dataclass
class RowReader:
    """Reads rows of one format; counts what is left out by reason, and keeps the first case of each for messages."""

    format: DataFormat
    seed: int = 0
    num_rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    first_cases: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._context = Context(self.seed)
        self.notes: Counter[str] = Counter()
        """Decisions that formats had to take on rows that are used."""
        self._read = (
            _columns_reader(self.format.columns) if isinstance(self.format, ColumnsFormat) else READERS[self.format]
        )
        self._seen: set[str] | None = set() if self.format in UNIQUE else None

    @property
    def num_usable(self) -> int:
        """The rows that were not left out."""
        return self.num_rows - self.left_out.total()

    def require_rows(self, where: object) -> None:
        """Raise ConfigError where not one row is usable."""
        if self.num_usable == 0:
            hint = "Set data.format (or --format) to what the rows are; docs/DATA.md lists the formats."
            if self.left_out.keys() <= {EMPTY, EQUAL}:
                hint = "Responses must not be empty (nor alike, in a pair): mend the rows."
            raise ConfigError(
                f"{where}: none of {self.num_rows} rows is usable as {format_name(self.format)} "
                f"({describe_counts(self.left_out)}); first, {next(iter(self.first_cases.values()), 'none')}",
                hint=hint,
            )

    def read(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Item]]:
        """Yield every usable row and what it teaches."""
        for row in rows:
            self.num_rows += 1
            self._context.notes.clear()
            try:
                item = self._checked(self._read(row.fields, self._context))
            except LeftOut as left_out:
                self.left_out[left_out.reason] += 1
                self.first_cases.setdefault(left_out.reason, f"{row.where}: {left_out.detail}")
                continue
            self.notes += self._context.notes
            yield row, item

    def _checked(self, item: Item) -> Item:
        learnt = [item.chosen, item.rejected] if isinstance(item, Preference) else []
        if isinstance(item, Example):
            learnt = [turn.content for turn in item.turns if turn.role == "assistant"]
        if not all(response.strip() for response in learnt):
            raise LeftOut(EMPTY)
        if not item.prompt or item.prompt[-1].role != "user":
            raise LeftOut(MALFORMED, "the prompt does not end with the user's turn")
        if not item.prompt[-1].text.strip():
            raise LeftOut(NO_PROMPT)
        if isinstance(item, Preference) and item.chosen == item.rejected:
            raise LeftOut(EQUAL)
        if self._seen is not None and isinstance(item, Example):
            instruction = item.prompt[-1].text
            if instruction in self._seen:
                raise LeftOut(DUPLICATE)
            self._seen.add(instruction)
        return item


def _alpaca(fields: Fields, _: Context) -> Example:
    """Alpaca, Alpaca-GPT4, CodeAlpaca, FinGPT: instruction, input (may be absent or empty) and output."""
    extra = _text(fields, "input") if fields.get("input") is not None else ""
    return instruct(_text(fields, "instruction"), _text(fields, "output"), extra)


def _medalpaca(fields: Fields, _: Context) -> Example:
    """MedAlpaca's flashcards: the instruction is the same for all rows, the input is the question."""
    return instruct(_text(fields, "input"), _text(fields, "output"))


def _mathinstruct(fields: Fields, _: Context) -> Example:
    """MathInstruct: instruction and output (and source)."""
    return instruct(_text(fields, "instruction"), _text(fields, "output"))


def _prompt_completion(fields: Fields, _: Context) -> Example:
    """A prompt and its completion: texts, or lists of messages."""
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if isinstance(completion, str):
        return Example((*_prompt(fields), Turn("assistant", completion)))
    return _example((*_turns(prompt, "prompt"), *_turns(completion, "completion")))


def _messages(fields: Fields, _: Context) -> Example:
    """OpenAI's chat rows: messages, a list of {role, content} that ends with the assistant's."""
    return _example(_turns(fields.get("messages"), "messages"))


def _preference(fields: Fields, context: Context) -> Preference:
    """Prompt, chosen and rejected: texts, or lists of messages."""
    if isinstance(fields.get("chosen"), str):
        return Preference(_prompt(fields), _text(fields, "chosen"), _text(fields, "rejected"))
    return _binarized(fields, context)


def _binarized(fields: Fields, _: Context) -> Preference:
    """UltraFeedback, binarised: chosen and rejected are dialogues (lists of messages) with one prompt.

    Or they are the answers alone, and the prompt stands in its own column, as trl has it.
    """
    chosen, rejected = (_turns(fields.get(column), column) for column in ("chosen", "rejected"))
    if chosen[0].role == rejected[0].role == "assistant":
        prompt = _prompt(fields)
        chosen, rejected = (*prompt, *chosen), (*prompt, *rejected)
    return _last_turns(chosen, rejected)


def _ultrafeedback(fields: Fields, context: Context) -> Preference:
    """UltraFeedback: of its scored completions the best is chosen, one of those below it, at random, is rejected.

    The choices depend on the seed and the instruction alone, wherever the row stands. A completion without a finite
    overall_score or without text is not used.
    """
    instruction = _text(fields, "instruction")
    completions = fields.get("completions")
    if not isinstance(completions, list) or not all(isinstance(entry, Mapping) for entry in completions):
        raise LeftOut(MALFORMED, "column 'completions' is not a list of completions")
    scored = [
        (float(score), str(entry["response"]))
        for entry in completions
        if _is_finite(score := entry.get("overall_score")) and str(entry.get("response") or "").strip()
    ]
    if len(scored) < 2:
        raise LeftOut(UNSCORED)
    highest = max(score for score, _ in scored)
    best = [response for score, response in scored if score == highest]
    others = [response for score, response in scored if score < highest]
    if not others:
        raise LeftOut(TIED)
    context.notes[COMPLETION_UNSCORED] += len(completions) - len(scored)
    context.notes[BEST_TIED] += len(best) > 1
    draw = stream(context.seed, "preferences", part=instruction)
    chosen, rejected = best[int(draw.integers(len(best)))], others[int(draw.integers(len(others)))]
    return Preference((Turn("user", instruction),), chosen, rejected)


_SPEAKERS: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
_SPEAKER = re.compile(r"\n\n(Human|Assistant): ")


def parse_dialogue(text: str) -> tuple[Turn, ...]:
    r"""Return the turns of an HH-RLHF dialogue, whose turns begin with "\n\nHuman: " and "\n\nAssistant: "."""
    start, *parts = _SPEAKER.split(text)
    if start or not parts:
        raise LeftOut(MALFORMED, "it does not begin with '\\n\\nHuman: ' or '\\n\\nAssistant: '")
    return tuple(Turn(_SPEAKERS[who], said) for who, said in zip(parts[::2], parts[1::2], strict=True))


def _hh_rlhf(fields: Fields, _: Context) -> Preference:
    """HH-RLHF: chosen and rejected are whole dialogues that differ in the assistant's last turn."""
    return _last_turns(parse_dialogue(_text(fields, "chosen")), parse_dialogue(_text(fields, "rejected")))


def _last_turns(chosen: tuple[Turn, ...], rejected: tuple[Turn, ...]) -> Preference:
    """Return the preference of two dialogues that share all but the assistant's last turn."""
    if chosen == rejected:
        raise LeftOut(EQUAL)
    if chosen[:-1] != rejected[:-1]:
        raise LeftOut(FORKED)
    prompt = chosen[:-1]
    if chosen[-1].role != "assistant" or rejected[-1].role != "assistant":
        raise LeftOut(MALFORMED, "a dialogue does not end with the assistant's turn")
    return Preference(prompt, chosen[-1].content, rejected[-1].content)


def format_name(data_format: DataFormat) -> str:
    """Return a format's name, without the names of columns."""
    return "columns" if isinstance(data_format, ColumnsFormat) else data_format


def describe_counts(counts: Mapping[str, int]) -> str:
    """Return counts by reason as a phrase."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()) if count)


READERS: dict[FormatName, Reader] = {
    "alpaca": _alpaca,
    "fingpt": _alpaca,
    "codealpaca": _alpaca,
    "medalpaca": _medalpaca,
    "mathinstruct": _mathinstruct,
    "prompt-completion": _prompt_completion,
    "messages": _messages,
    "preference": _preference,
    "ultrafeedback": _ultrafeedback,
    "ultrafeedback-binarized": _binarized,
    "hh-rlhf": _hh_rlhf,
}
UNIQUE: frozenset[object] = frozenset({"mathinstruct"})
"""Formats of which rows that repeat an instruction are left out."""


def _columns_reader(columns: Columns) -> Reader:
    def read(fields: Fields, _: Context) -> Item:
        if columns.response is None:
            prompt, chosen, rejected = (_plain(fields, str(name)) for name in columns.pair)
            return Preference((Turn("user", prompt),), chosen, rejected)
        extra = ""
        if columns.input is not None and fields.get(columns.input) is not None:
            extra = _plain(fields, columns.input)
        return instruct(_plain(fields, str(columns.instruction)), _plain(fields, columns.response), extra)

    return read


def _text(fields: Fields, column: str) -> str:
    value = fields.get(column)
    if not isinstance(value, str):
        raise LeftOut(MALFORMED, f"{'no text in' if column in fields else 'no'} column {column!r}{_found(fields)}")
    return value


def _plain(fields: Fields, column: str) -> str:
    """Return a column as text; numbers (labels, scores) as they are written."""
    value = fields.get(column)
    return str(value) if isinstance(value, bool) or _is_finite(value) else _text(fields, column)


def _found(fields: Fields) -> str:
    return f"; it has {', '.join(map(str, fields)) or 'none'}"


def _prompt(fields: Fields) -> Prompt:
    """Return the column prompt, a text or a list of messages."""
    prompt = fields.get("prompt")
    return (Turn("user", _text(fields, "prompt")),) if not isinstance(prompt, list) else _turns(prompt, "prompt")


def _turns(messages: object, column: str) -> tuple[Turn, ...]:
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


def _example(turns: tuple[Turn, ...]) -> Example:
    if len(turns) < 2 or turns[-1].role != "assistant":
        raise LeftOut(MALFORMED, "the conversation does not end with the assistant's answer")
    return Example(turns)


def _is_finite(score: object) -> bool:
    try:
        return isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
    except OverflowError:
        return False
