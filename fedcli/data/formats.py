"""Which format and split a source has, and reading its rows; what is left out is counted by reason."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from fedcli.config import ColumnsFormat, DataFormat
from fedcli.data.source import Row
from fedcli.errors import ConfigError
from fedcli.tasks import FORMATS, TASKS, first_task, formats_of
from fedcli.tasks.conversation import Item, Preference, Turn, instruct
from fedcli.tasks.format import DUPLICATE, EMPTY, EQUAL, MALFORMED, NO_PROMPT, Context, Fields, Format, LeftOut, plain


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


def choose_split(source: str, given: str | None) -> str:
    """Return the split to read: the one given, else the one a known data set has its training rows in."""
    known = known_format(source)
    return given or (known.hub[source] if known else "train")


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
        known = _columns_format(self.format) if isinstance(self.format, ColumnsFormat) else FORMATS[self.format]
        self._read, self._item = known.read, known.item
        self._seen: set[str] | None = set() if known.is_unique else None

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
        assert isinstance(item, self._item), f"the format {format_name(self.format)} made no {self._item.__name__}"
        conversations = item.conversations
        learnt = [turn for turns in conversations for turn in (turns[-1:] if item.last_only else turns)]
        if not all(turn.content.strip() for turn in learnt if turn.role == "assistant"):
            raise LeftOut(EMPTY)
        prompt = conversations[0][:-1]
        if not prompt or prompt[-1].role != "user":
            raise LeftOut(MALFORMED, "the prompt does not end with the user's turn")
        instruction = prompt[-1].text
        if not instruction.strip():
            raise LeftOut(NO_PROMPT)
        if len(set(conversations)) < item.num_sides:
            raise LeftOut(EQUAL)
        if self._seen is not None:
            if instruction in self._seen:
                raise LeftOut(DUPLICATE)
            self._seen.add(instruction)
        return item


def format_name(data_format: DataFormat) -> str:
    """Return a format's name, without the names of columns."""
    return "columns" if isinstance(data_format, ColumnsFormat) else data_format


def describe_counts(counts: Mapping[str, int]) -> str:
    """Return counts by reason as a phrase."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()) if count)


def describe_notes(notes: Mapping[str, int]) -> str:
    """Return notes with the number of rows that each holds for."""
    counted = sorted((note, count) for note, count in notes.items() if count)
    return "; ".join(f"{note}: {count} {'row' if count == 1 else 'rows'}" for note, count in counted)


def _columns_format(given: ColumnsFormat) -> Format:
    columns = given.columns

    def read(fields: Fields, _: Context) -> Item:
        if columns.response is None:
            pair = (columns.prompt, columns.chosen, columns.rejected)
            prompt, chosen, rejected = (plain(fields, str(name)) for name in pair)
            return Preference((Turn("user", prompt),), chosen, rejected)
        has_input = columns.input is not None and fields.get(columns.input) is not None
        extra = plain(fields, str(columns.input)) if has_input else ""
        return instruct(plain(fields, str(columns.instruction)), plain(fields, columns.response), extra)

    return Format("columns", columns.item, read)
