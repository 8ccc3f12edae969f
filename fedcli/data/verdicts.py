"""Columns that say whether the one response of a row is good, which no format of examples may learn from.

True and false are certain. Numbers and words ("good", "rejected") may be a class as well: they are one where each
response has one of them and responses repeat, as the answers of a classifier do.
"""

from dataclasses import dataclass, field

from fedcli.data.file_rows import Row
from fedcli.tasks.verdict_formats import WORDS, verdict_word


def is_certain_verdict(value: object) -> bool:
    """Return whether a value is true or false, or spells it."""
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))


@dataclass
class _Column:
    first: Row
    num_rows: int = 0
    words: set[str] = field(default_factory=set)
    of_response: dict[int, str] = field(default_factory=dict)
    """The word of each response, by the response's hash."""
    is_contradicted: bool = False
    """Whether a response has two words: what is good for one prompt is bad for another."""

    @property
    def is_class(self) -> bool:
        """Whether these are classes, so far: three of them, or an answer for each that repeats."""
        repeats = not self.is_contradicted and 2 * len(self.of_response) <= self.num_rows
        return not self.words <= WORDS.keys() or len(self.words) > 2 or repeats


class Verdicts:
    """The numbers and words of such columns, seen row by row; what they are is known after the last."""

    def __init__(self) -> None:
        self._columns: dict[str, _Column] = {}

    def add(self, row: Row, name: str, value: object, response: str) -> None:
        """See a row's value in a column."""
        word = verdict_word(value)
        column = self._columns.setdefault(name, _Column(row))
        if column.words <= WORDS.keys() and len(column.words) <= 2:  # else it is decided
            column.num_rows += 1
            column.words.add(word)
            column.is_contradicted |= column.of_response.setdefault(hash(response.strip()), word) != word

    def found(self) -> tuple[Row, str] | None:
        """Return the first row and the name of a column of verdicts; None where there is none."""
        columns = ((column.first, name) for name, column in self._columns.items() if not column.is_class)
        return next(columns, None)
