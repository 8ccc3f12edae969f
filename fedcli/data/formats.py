"""Which format and split a source has, and reading its rows; what is left out is counted by reason."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from fedcli.config import Columns, ColumnsFormat, DataFormat, MessagesFormat
from fedcli.data.file_rows import Row
from fedcli.data.row_report import RowReport, describe_counts
from fedcli.data.verdicts import Verdicts, is_certain_verdict
from fedcli.errors import ConfigError
from fedcli.tasks import FORMATS, TASKS, first_task, formats_of
from fedcli.tasks.builtin_formats import conversation, whole_text
from fedcli.tasks.conversation import Example, Item, Judged, Preference, Turn, instruct, is_text
from fedcli.tasks.format import (
    DUPLICATE,
    EMPTY,
    EQUAL,
    MALFORMED,
    NO_PROMPT,
    REPEATED,
    UNANSWERED,
    Context,
    Fields,
    Format,
    LeftOut,
    is_finite,
    is_given,
    plain,
)
from fedcli.tasks.verdict_formats import VERDICT_COLUMNS, verdict_of


def known_format(source: str) -> Format | None:
    """Return the format of a known data set of the hub."""
    return next((known for known in FORMATS.usable() if source in known.hub), None)


def choose_format(source: str | None, given: DataFormat | None, task: str) -> DataFormat:
    """Return a source's format: the one given, else the one that a known data set of the hub has, else the task's.

    Raises ConfigError for a known data set whose rows are for another task.
    """
    if given is not None:
        return given
    item = TASKS[task].item
    known = known_format(source or "")
    if known is None:
        return next(formats_of(item))
    if known.item is not item:
        raise ConfigError(
            f"{source} has rows of the format {known.name}, which is not for task {task}",
            hint=f"Set task to {first_task(known.item)}, or name another source.",
        )
    return known.name


@dataclass(frozen=True)
class Choice:
    """A source's format; `guess` says so in a sentence where it was guessed from the columns."""

    format: DataFormat
    guess: str | None = None


def guess_format(source: str, given: DataFormat | None, task: str, rows: Iterable[Row], key: str) -> Choice:
    """Return a source's format as `choose_format` does; where nothing names it, as its first rows can be read.

    The task's default comes first, then the format that reads most of these rows. `key` is what sets another.
    """
    chosen = choose_format(source, given, task)
    if given is not None or known_format(source) is not None:
        return Choice(chosen)
    first = list(islice(rows, NUM_GUESSED))
    item = TASKS[task].item
    candidates: list[DataFormat] = [*formats_of(item), *(_pairs(first) if item is Example else ())]
    usable = [_count_usable(candidate, first) for candidate in candidates]
    if "text" in candidates:  # a text may stand beside what it was made of
        last = candidates.index("text")
        usable[last] *= not any(usable[:last] + usable[last + 1 :])
    best = 0 if usable[0] else max(range(len(usable)), key=usable.__getitem__)
    marked = next((name for name, columns in _MARKS.items() if name in candidates and _have(first, columns)), None)
    if marked is not None and (not usable[best] or candidates[best] == "text"):
        return Choice(marked)  # none of the rows is usable, and its reader says why
    if not usable[best]:
        return Choice(chosen)
    reader = RowReader(candidates[best])
    list(reader.read(first))
    columns = ", ".join(reader.used)
    told = f"format: {written_format(reader.format)}, guessed from the columns {columns}; {key} sets another"
    return Choice(reader.format, told)


_MARKS = {"oasst": ("parent_id", "role", "text"), "messages": ("messages",), "sharegpt": ("conversations",)}
"""Columns that no other format has."""


def _have(rows: Sequence[Row], columns: Sequence[str]) -> bool:
    return bool(rows) and all(column in row.fields for row in rows for column in columns)


def _pairs(rows: Iterable[Row]) -> Iterator[ColumnsFormat]:
    """Yield the formats of two columns, and input and system beside them, whose columns the rows have."""
    names = {name for row in rows for name, value in row.fields.items() if is_given(value)}
    for pair in _PAIRS:
        if names.issuperset(pair):
            given = dict(zip(("instruction", "response"), pair, strict=True))
            for key, known in (("input", ("input", "context")), ("system", ("system", "system_prompt"))):
                if beside := [name for name in known if name in names - set(pair)]:
                    given[key] = beside[0]
            yield ColumnsFormat(columns=Columns.model_validate(given))


def _count_usable(candidate: DataFormat, rows: Iterable[Row]) -> int:
    try:
        return sum(1 for _ in RowReader(candidate).read(rows))
    except ConfigError:  # rows with verdicts: whoever reads them says so
        return 1


def written_format(given: DataFormat) -> str:
    """Return a format as fedcli.yaml names it, on one line."""
    if isinstance(given, str):
        return given
    import yaml

    return yaml.safe_dump(given.model_dump(exclude_none=True), default_flow_style=True, width=10**6).strip()


NUM_GUESSED = 100
"""Rows, the first of a source, that a guess of its format looks at."""
_PAIRS = (
    *(("instruction", "response"), ("instruction", "answer"), ("instruction", "completion")),
    *(("question", "answer"), ("question", "response"), ("question", "output")),
    *(("query", "response"), ("query", "answer"), ("query", "output")),
    *(("prompt", "response"), ("prompt", "output"), ("prompt", "answer"), ("input", "output"), ("input", "response")),
)
"""Names of columns of an instruction and its response."""


def choose_split(source: str, given: str | None) -> str:
    """Return the split to read: the one given, else the one a known data set has its training rows in."""
    known = known_format(source)
    return given or (known.hub[source] if known else "train")


def group_of(row: Row, column: str) -> str:
    """Return a row's value of the column that tells groups, as text: a number and its digits are one group."""
    value = row.fields.get(column)
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, bool) or is_finite(value):
        return str(value)
    found = "is no text or number there" if is_given(value) else "is missing"
    raise ConfigError(
        f"{row.where}: column {column!r} {found}, and privacy.group_by tells by it whose row this is",
        hint="Give every row a value there; a row that belongs to nobody else has one of its own.",
    )


@dataclass
class RowReader(RowReport):
    """Reads rows of one format; its notes are decisions that the format had to take on rows that are used."""

    format: DataFormat
    seed: int = 0
    num_rows: int = 0

    def __post_init__(self) -> None:
        self._context = Context(self.seed)
        self._first: list[Row] = []
        self.used: dict[str, None] = {}
        """The columns that were used, in their order."""
        known = FORMATS[self.format] if isinstance(self.format, str) else _own_format(self.format)
        self._read, self._item, self._assemble = known.read, known.item, known.assemble
        self._seen: set[str] | None = set() if known.is_unique else None

    @property
    def num_usable(self) -> int:
        """The rows that were not left out."""
        return self.num_rows - self.left_out.total()

    def require_rows(self, where: object) -> None:
        """Raise ConfigError where not one row is usable."""
        if self.num_usable == 0:
            hint = "Set data.format (or --format) to what the rows are, or columns of any names with {columns: {...}}: "
            hint += "docs/DATA.md lists the formats."
            for task in TASKS.usable():
                fitting = (name for name in formats_of(task.item) if task.item is not self._item)
                if task.item is Example and any({*VERDICT_COLUMNS} & row.fields.keys() for row in self._first):
                    continue  # what is learnt there is every response, those with thumbs down, too
                if name := next((name for name in fitting if _count_usable(name, self._first)), None):
                    hint = f"They look like rows of the format {name}, which is for task {task.name}: set task to that."
                    break
            hint = next(filter(None, map(self._cure, self._first)), hint)
            if self.left_out.keys() <= {EMPTY, EQUAL}:
                hint = "Responses must not be empty (nor alike, in a pair): mend the rows."
            if self.left_out.keys() == {UNANSWERED}:
                hint = "The last turn of a conversation is what is learnt: add an answer, or take the question out."
            raise ConfigError(
                f"{where}: none of {self.num_rows} rows is usable as {format_name(self.format)} "
                f"({describe_counts(self.left_out)}); first, {next(iter(self.first_cases.values()), 'none')}",
                hint=hint,
            )

    def _cure(self, row: Row) -> str | None:
        """Return what to do about a row whose columns stand elsewhere; None where they do not."""
        if re.search(r"\.[ct]sv\b", row.where) and any(map(_looks_like_text, row.fields)):
            return "The first line, read as the header, looks like a row: put a line of column names before it."
        if self._is_keyed(row):
            return (
                "The file is an object of lists of rows: set data.keyed_by to a column for their keys, such as client, "
                "and data.partition to {by: client} to make each a client."
            )
        for name, value in row.fields.items():
            inner = [Row(value, row.where)] if isinstance(value, Mapping) else []
            if inner and any(_count_usable(one, inner) for one in (self.format, *formats_of(self._item))):
                return f"Column {name!r} holds the columns of a row: write each row as what it holds."
        return None

    def _is_keyed(self, row: Row) -> bool:
        """Return whether a row is a whole file: an object of lists of rows, of which some are usable."""
        lists = list(row.fields.values())
        if not lists or not all(isinstance(each, list) and each and isinstance(each[0], Mapping) for each in lists):
            return False
        first = [Row(each[0], row.where) for each in lists]
        pairs = _pairs(first) if self._item is Example else ()
        return any(_count_usable(one, first) for one in (self.format, *formats_of(self._item), *pairs))

    def read(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Item]]:
        """Yield every usable row and what it teaches; raise ConfigError for rows of single responses with a verdict."""
        rows, verdicts = self._unambiguous(rows), Verdicts()
        if self._assemble is not None:
            rows = (Row(*each) for each in self._assemble((row.fields, row.where) for row in rows))
        for row in rows:
            self.num_rows += 1
            self._context.notes.clear()
            self._context.unused.clear()
            columns = _Columns(row.fields)
            try:
                item = self._checked(self._read(columns, self._context))
            except LeftOut as left_out:
                self._leave_out(row, left_out)
                continue
            self.notes += self._context.notes
            for name, value in row.fields.items():
                if name in columns.used:
                    self.used.setdefault(name)
                elif is_given(value):
                    if name in VERDICT_COLUMNS and isinstance(item, Example):
                        if is_certain_verdict(value):
                            raise self._verdict(row, name)
                        verdicts.add(row, name, value, item.response)
                    self.unused[name] += 1
            self.unused.update(self._context.unused)
            yield row, item
        if (verdict := verdicts.found()) is not None:
            raise self._verdict(*verdict)

    def _unambiguous(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Pass rows on; leave those out that name a key twice, for either value may be meant."""
        for row in rows:
            if row.repeated is None:
                yield row
                continue
            self.num_rows += 1
            self._leave_out(row, LeftOut(REPEATED, f"it names the key {row.repeated!r} twice: keep one"))

    def _leave_out(self, row: Row, left_out: LeftOut) -> None:
        self._first = self._first or [row]
        self.leave_out(left_out.reason, left_out.detail, row.where)

    def _verdict(self, row: Row, name: str) -> ConfigError:
        return ConfigError(
            f"{row.where}: column {name!r} says whether a response is good ({row.fields[name]!r}), and the format "
            f"{format_name(self.format)} learns every response as a good one",
            hint="Task kto learns from such rows: set task to that. To learn the good ones alone, keep only those and "
            "remove the column.",
        )

    def _checked(self, item: Item) -> Item:
        assert isinstance(item, self._item), f"the format {format_name(self.format)} made no {self._item.__name__}"
        conversations = item.conversations
        learnt = [turn for turns in conversations for turn in (turns[-1:] if item.last_only else turns)]
        for turn in learnt:
            if turn.role == "assistant" and turn.is_learnt and not (turn.content.strip() or turn.tool_calls):
                raise LeftOut(EMPTY)
        prompt = conversations[0][:-1]
        if is_text(conversations[0]) and isinstance(item, Example):
            return item
        if not prompt or prompt[-1].role not in ("user", "tool"):
            raise LeftOut(MALFORMED, "the prompt does not end with the user's turn")
        asked = [turn.text for turn in prompt if turn.role == "user"]
        instruction = asked[-1] if asked else ""
        if not instruction.strip():
            raise LeftOut(NO_PROMPT)
        if len(set(conversations)) < item.num_sides:
            raise LeftOut(EQUAL)
        if self._seen is not None:
            if instruction in self._seen:
                raise LeftOut(DUPLICATE)
            self._seen.add(instruction)
        return item


class _Columns(Mapping[str, Any]):
    """A row's columns; remembers which were looked up."""

    def __init__(self, fields: Fields) -> None:
        self._fields = fields
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        value = self._fields[name]
        self.used.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


def _looks_like_text(name: str) -> bool:
    """Return whether the name of a column is rather a cell: a number, a sentence or long."""
    return bool(re.fullmatch(r"[+-]?\d+(\.\d+)?|.{61,}|.*\s.*[.?!]", str(name).strip(), re.DOTALL))


def format_name(data_format: DataFormat) -> str:
    """Return a format's name, without the names of columns."""
    if isinstance(data_format, str):
        return data_format
    return "columns" if isinstance(data_format, ColumnsFormat) else "messages"


def _own_format(given: ColumnsFormat | MessagesFormat) -> Format:
    if isinstance(given, MessagesFormat):
        return Format("messages", Example, lambda fields, context: conversation(given.messages, fields, context))
    columns = given.columns

    def read(fields: Fields, context: Context) -> Item:
        def optional(name: str | None) -> str:
            return plain(fields, name) if name is not None and fields.get(name) is not None else ""

        if columns.text is not None:
            return whole_text(plain(fields, columns.text))
        if columns.completion is not None:
            prompt, completion = plain(fields, str(columns.prompt)), plain(fields, columns.completion)
            label = str(columns.label)
            return Judged((Turn("user", prompt),), completion, verdict_of(fields.get(label), label))
        if columns.response is None:
            pair = (columns.prompt, columns.chosen, columns.rejected)
            prompt, chosen, rejected = (plain(fields, str(name)) for name in pair)
            return Preference((Turn("user", prompt),), chosen, rejected)
        extra = optional(columns.input)
        example = instruct(plain(fields, str(columns.instruction)), plain(fields, columns.response), extra)
        system = optional(columns.system)
        return Example((Turn("system", system), *example.turns)) if system else example

    return Format("columns", columns.item, read)
