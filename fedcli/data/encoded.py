"""Rows as token ids, kept so that a million of them fit into memory."""

import hashlib
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedcli.tasks.conversation import Example, Item, Preference


class EncodedRow(ABC):
    """A row as token ids: of a conversation, or of two responses to one prompt."""

    @property
    @abstractmethod
    def sides(self) -> "tuple[EncodedExample, ...]":
        """The conversations that are learnt from: one, or a pair's two, the chosen one first."""

    @property
    def key(self) -> bytes:
        """A hash of the token ids, and so of row, template, tokenizer and max_length."""
        shape = f"{[(len(side.ids), side.prompt_length) for side in self.sides]}"
        return hashlib.sha256(b"".join([shape.encode(), *(side.ids.tobytes() for side in self.sides)])).digest()

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


@dataclass(frozen=True)
class EncodedExample(EncodedRow):
    """Token ids (int32) of a conversation, and which of them are supervised: responses and their end tokens."""

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]

    @property
    def sides(self) -> "tuple[EncodedExample]":
        return (self,)

    @property
    def prompt_length(self) -> int:
        """The number of tokens before the first supervised one."""
        return int(self.supervised.argmax())


@dataclass(frozen=True)
class EncodedPair(EncodedRow):
    """Two responses to one prompt."""

    chosen: EncodedExample
    rejected: EncodedExample

    @property
    def sides(self) -> tuple[EncodedExample, EncodedExample]:
        return self.chosen, self.rejected


class EncodedExamples(Sequence[EncodedExample]):
    """Encoded examples end to end in three arrays, so that a million of them fit into memory."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._supervised = bytearray()
        self._ends = array("q", [0])

    def append(self, example: EncodedExample) -> None:
        """Add an example."""
        self._ids.frombytes(example.ids.tobytes())
        self._supervised += example.supervised.tobytes()
        self._ends.append(len(self._ids))

    def extend(self, other: "EncodedExamples") -> None:
        """Add another's examples."""
        start = len(self._ids)
        self._ids.extend(other._ids)
        self._supervised += other._supervised
        self._ends.extend(start + end for end in other._ends[1:])

    def arrays(self, prefix: str = "") -> dict[str, NDArray[Any]]:
        """Return the three arrays, under their names with a prefix."""
        return {
            f"{prefix}ids": np.array(self._ids, np.int32),
            f"{prefix}supervised": np.frombuffer(bytes(self._supervised), np.uint8),
            f"{prefix}ends": np.array(self._ends, np.int64),
        }

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, NDArray[Any]], prefix: str = "") -> Self:
        """Return the examples that `arrays` gave; raise KeyError where one is missing."""
        made = cls()
        made._ids = array("i", arrays[f"{prefix}ids"].tobytes())
        made._supervised = bytearray(arrays[f"{prefix}supervised"])
        made._ends = array("q", arrays[f"{prefix}ends"].tobytes())
        return made

    def lengths(self) -> NDArray[np.int64]:
        """Return each example's number of tokens."""
        return np.diff(np.array(self._ends, np.int64)).astype(np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = slice(self._ends[index], self._ends[index + 1])
        ids = np.array(self._ids[part], np.int32)
        return EncodedExample(ids, np.array(self._supervised[part], np.uint8).astype(np.bool_))


class EncodedPairs(Sequence[EncodedPair]):
    """Encoded pairs, kept as `EncodedExamples` keeps their sides."""

    def __init__(self) -> None:
        self._chosen = EncodedExamples()
        self._rejected = EncodedExamples()

    def append(self, pair: EncodedPair) -> None:
        """Add a pair."""
        self._chosen.append(pair.chosen)
        self._rejected.append(pair.rejected)

    def extend(self, other: "EncodedPairs") -> None:
        """Add another's pairs."""
        self._chosen.extend(other._chosen)
        self._rejected.extend(other._rejected)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays of both sides."""
        return self._chosen.arrays("chosen.") | self._rejected.arrays("rejected.")

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Return the pairs that `arrays` gave; raise KeyError where an array is missing."""
        made = cls()
        made._chosen = EncodedExamples.of_arrays(arrays, "chosen.")
        made._rejected = EncodedExamples.of_arrays(arrays, "rejected.")
        return made

    def lengths(self) -> NDArray[np.int64]:
        """Return each pair's number of tokens in the longer of its sides."""
        return np.maximum(self._chosen.lengths(), self._rejected.lengths())

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        return EncodedPair(self._chosen[index], self._rejected[index])


EncodedT = TypeVar("EncodedT", EncodedExamples, EncodedPairs)
STORES: "dict[type[Item], type[EncodedExamples] | type[EncodedPairs]]" = {
    Example: EncodedExamples,
    Preference: EncodedPairs,
}
"""How the rows that teach each kind of item are kept."""


@dataclass
class EncodedRows(Generic[EncodedT]):
    """A client's usable rows, and how many were cut or could not be used."""

    examples: EncodedT
    num_truncated: int = 0
    """Rows whose response was cut to fit max_length."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows that cannot be used, by reason: a prompt that leaves no room for one token of a response, and so on."""

    @property
    def num_unusable(self) -> int:
        """All rows that are left out."""
        return self.left_out.total()


def together(parts: Sequence[EncodedRows[EncodedT]]) -> EncodedRows[EncodedT]:
    """Return the rows of several clients as one's; the first part takes the others in."""
    first = parts[0]
    for other in parts[1:]:
        first.examples.extend(other.examples)
        first.num_truncated += other.num_truncated
        first.left_out += other.left_out
    return first
