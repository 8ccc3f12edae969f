"""Rows as token ids, kept so that a million of them fit into memory."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedcli.data.row_report import RowReport


@dataclass(frozen=True)
class EncodedExample:
    """Token ids (int32) of a conversation, and which of them are supervised: responses and their end tokens."""

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]

    @property
    def prompt_length(self) -> int:
        """The number of tokens before the first supervised one."""
        return int(self.supervised.argmax())


@dataclass(frozen=True)
class EncodedRow:
    """A row as token ids: of one conversation, or of several, such as a pair's two, the chosen one first."""

    sides: tuple[EncodedExample, ...]
    numbers: tuple[float, ...] = ()
    """The item's."""
    reference: tuple[float, ...] = ()
    """The log-probabilities that the reference gives to the responses, where the task has a reference."""
    group: int | None = None
    """The number of its group, where rows are hidden by groups."""
    check: str = ""
    """What a reward function compares an answer with."""

    @property
    def key(self) -> bytes:
        """A hash of the token ids, and so of row, template, tokenizer and max_length."""
        shape = f"{[(len(side.ids), side.prompt_length) for side in self.sides]}"
        return hashlib.sha256(b"".join([shape.encode(), *(side.ids.tobytes() for side in self.sides)])).digest()

    def cut(self, max_length: int) -> "EncodedRow":
        """Return the row with the first `max_length` tokens of each side."""
        sides = (EncodedExample(side.ids[:max_length], side.supervised[:max_length]) for side in self.sides)
        return replace(self, sides=tuple(sides))

    @property
    def num_tokens(self) -> int:
        """The tokens of all sides."""
        return sum(len(side.ids) for side in self.sides)

    @property
    def length(self) -> int:
        """The tokens of all sides once the shorter is padded to the longer: what a micro-batch is padded by."""
        return len(self.sides) * max(len(side.ids) for side in self.sides)

    @property
    def num_supervised(self) -> int:
        """The supervised tokens; the first of all tokens, which nothing predicts, is none of them."""
        return sum(int(side.supervised[1:].sum()) for side in self.sides)


class EncodedRows(RowReport, Sequence[EncodedRow]):
    """A client's usable rows, and how many were cut or could not be used.

    The rows, which have equally many sides and numbers, lie end to end in arrays: a million of them fit into memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_truncated = 0
        """Rows whose response was cut to fit max_length."""
        self.num_planted = 0
        """Rows, the last ones, that are an audit's canaries: nobody is told of them."""
        self._num_sides = 1
        self._ids = array("i")
        self._supervised = bytearray()
        self._ends = array("q", [0])
        self._numbers = array("d")
        self._groups = array("q")
        self._checks: list[str] = []

    @property
    def num_own(self) -> int:
        """The rows without an audit's canaries: how many a client says that it has."""
        return len(self) - self.num_planted

    def append(self, row: EncodedRow) -> None:
        """Add a row."""
        self._num_sides = len(row.sides)
        for side in row.sides:
            self._ids.frombytes(side.ids.tobytes())
            self._supervised += side.supervised.tobytes()
            self._ends.append(len(self._ids))
        self._numbers.extend(row.numbers)
        if row.group is not None:
            self._groups.append(row.group)
        if row.check:
            self._checks.append(row.check)

    def plant(self, canaries: Iterable[tuple[EncodedRow, int]]) -> None:
        """Add an audit's canaries, each so many times; where rows have groups each is one by itself."""
        group = max(self._groups) + 1 if self._groups else None
        for row, copies in canaries:
            for _ in range(copies):
                self.append(replace(row, group=group))
            self.num_planted += copies
            group = None if group is None else group + 1

    def extend(self, other: "EncodedRows") -> None:
        """Take in another client's rows and counts; groups, which are a client's own, are forgotten."""
        self._groups = array("q")
        start = len(self._ids)
        self._num_sides = max(self._num_sides, other._num_sides)
        self._ids.extend(other._ids)
        self._supervised += other._supervised
        self._ends.extend(start + end for end in other._ends[1:])
        self._numbers.extend(other._numbers)
        self._checks += other._checks
        self.num_truncated += other.num_truncated
        self.num_planted += other.num_planted
        self.include(other)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name; of the sides' ends there is one more than sides, and a row of numbers a row.

        There are groups, and checks, as JSON, only where rows have some.
        """
        groups: dict[str, NDArray[Any]] = {"groups": np.array(self._groups, np.int64)} if self._groups else {}
        if self._checks:
            groups["checks"] = np.frombuffer(json.dumps(self._checks).encode(), np.uint8)
        return {
            "ids": np.array(self._ids, np.int32),
            "supervised": np.frombuffer(bytes(self._supervised), np.uint8),
            "ends": np.array(self._ends, np.int64),
            "numbers": np.array(self._numbers, np.float64).reshape(len(self), -1),
            **groups,
        }

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Return the rows that `arrays` gave, one at least; raise KeyError where an array is missing."""
        made = cls()
        made._ids = array("i", arrays["ids"].tobytes())
        made._supervised = bytearray(arrays["supervised"])
        made._ends = array("q", arrays["ends"].tobytes())
        made._numbers = array("d", arrays["numbers"].tobytes())
        made._groups = array("q", arrays["groups"].tobytes() if "groups" in arrays else b"")
        made._checks = json.loads(arrays["checks"].tobytes()) if "checks" in arrays else []
        made._num_sides = (len(made._ends) - 1) // len(arrays["numbers"])
        return made

    @property
    def checks(self) -> Sequence[str]:
        """What rows give to check answers against, row by row; none where they give nothing."""
        return self._checks

    def groups(self) -> list[NDArray[np.int64]]:
        """Return the rows of each group, by their places; none where rows have no groups."""
        groups = np.array(self._groups, np.int64)
        order = np.argsort(groups, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1) if len(groups) else []

    def lengths(self) -> NDArray[np.int64]:
        """Return each row's number of tokens in the longest of its sides."""
        ends = np.array(self._ends, np.int64)
        lengths: NDArray[np.int64] = np.diff(ends).reshape(-1, self._num_sides).max(axis=1)
        return lengths

    def __len__(self) -> int:
        return (len(self._ends) - 1) // self._num_sides

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        width = len(self._numbers) // len(self)
        numbers = tuple(self._numbers[index * width : (index + 1) * width])
        first = index * self._num_sides
        group = self._groups[index] if self._groups else None
        sides = tuple(self._side(first + n) for n in range(self._num_sides))
        return EncodedRow(sides, numbers, group=group, check=self._checks[index] if self._checks else "")

    def _side(self, number: int) -> EncodedExample:
        part = slice(self._ends[number], self._ends[number + 1])
        ids = np.array(self._ids[part], np.int32)
        return EncodedExample(ids, np.array(self._supervised[part], np.uint8).astype(np.bool_))
