"""Reducers: what takes the place of the weighted mean of the updates' differences from the global adapter.

Arithmetic is float64 and goes block by block: what is computed on the way stays in the processor's cache, and no result
depends on the number of threads.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ClassVar, TypeAlias

import numpy as np

from fedcli.algos.arrays import Array, Arrays
from fedcli.algos.packing import PIECE as PIECE

BLOCK = 2**15
"""Numbers that are added at once: a quarter of a megabyte in float64."""
_MOST_STACKED = 2**23
"""Numbers of all updates together that are in memory at once when updates are read again, if a piece of each fits."""


Fill: TypeAlias = "Callable[[str, slice, Array], None]"
"""Writes a slice of a flattened tensor of an update's difference, by the tensor's name, into float64 memory."""


def filling(numbers: "Callable[[str, slice], Array]", origin: "Arrays | None") -> Fill:
    """Return what fills memory with the difference of an update's numbers from `origin`, zero for None."""

    def fill(name: str, block: slice, out: Array) -> None:
        found = numbers(name, block)
        if origin is None:
            np.copyto(out, found)
        else:
            np.subtract(found, origin[name].reshape(-1)[block], out=out, dtype=np.float64)

    return fill


class Stacks:
    """The counted updates' differences side by side, read again from their files.

    `shapes` are by tensor; `members` fill memory with a slice, one for each update.
    """

    def __init__(self, shapes: "Mapping[str, tuple[int, ...]]", members: Sequence[Fill]) -> None:
        self._shapes = shapes
        self._members = members

    def blocks(self) -> "Iterator[tuple[str, slice, Array]]":
        """Yield a tensor's name, a slice of it flattened, and that part of all updates: float64, a row for each.

        All slices of all tensors come once; each call is another pass over the files. The rows are in memory that the
        block after the next takes: that is read while this one is worked on.
        """
        length = PIECE * max(1, _MOST_STACKED // (PIECE * len(self._members)))
        memory = [np.empty((len(self._members), length)) for _ in range(2)]
        blocks = [
            (name, slice(begin, min(begin + length, math.prod(shape))))
            for name, shape in self._shapes.items()
            for begin in range(0, math.prod(shape), length)
        ]
        with ThreadPoolExecutor(2) as readers:  # each reads every other update, block after block

            def read(number: int) -> "list[Future[None]]":
                name, block = blocks[number]
                rows = memory[number % 2][:, : block.stop - block.start]
                return [readers.submit(self._fill, rows, name, block, first) for first in range(2)]

            readings = read(0) if blocks else []
            for number, (name, block) in enumerate(blocks):
                for reading in readings:
                    reading.result()
                readings = read(number + 1) if number + 1 < len(blocks) else []
                yield name, block, memory[number % 2][:, : block.stop - block.start]

    def _fill(self, rows: Array, name: str, block: slice, first: int) -> None:
        """Fill every other row with a part of an update's difference."""
        for row, fill in list(zip(rows, self._members, strict=True))[first::2]:
            fill(name, block, row)

    def products(self) -> Array:
        """Return the Gram matrix of the updates' differences, by one pass."""
        found = np.zeros((len(self._members), len(self._members)))
        for _, _, rows in self.blocks():
            found += rows @ rows.T
        return found

    def reduce(self, function: "Callable[[Array], Array]") -> "dict[str, Array]":
        """Return what a function makes of the rows of each block: one number for each column."""
        result = {name: np.empty(shape) for name, shape in self._shapes.items()}
        for name, block, rows in self.blocks():
            result[name].reshape(-1)[block] = function(rows)
        return result


class Reducer(ABC):
    """Gets the counted updates one at a time, in the order in which they count, and then says what stands for all."""

    reads_again: ClassVar[bool] = False
    """Whether `result` uses the stacks: only then what is read first is remembered well enough to be read again."""

    def add(self, update: Arrays, weight: float, origin: "Arrays | None" = None) -> float:
        """Take an update with its weight (>= 0); return the norm of its difference from `origin` (zero for None)."""
        remaining = iter(_blocks(update))  # of both threads: each takes the next one

        def add_remaining() -> list[float]:
            squares = []
            for name, block, difference, spare in _differences(update, origin, remaining):
                squares.append(float(np.multiply(difference, difference, out=spare).sum()))
                self.add_block(name, block, difference, weight)
            return squares

        with ThreadPoolExecutor(1) as second:
            others = second.submit(add_remaining)
            return math.sqrt(math.fsum(add_remaining() + others.result()))  # fsum is exact: the order does not matter

    def add_block(self, name: str, block: slice, difference: Array, weight: float) -> None:  # noqa: B027 not abstract
        """Take a slice of a flattened tensor of an update's difference; its memory may be written to.

        Two threads call this at once, for different slices.
        """

    @abstractmethod
    def result(self, stacks: Stacks) -> "dict[str, Array]":
        """Return what stands for all updates, float64; it is asked for once."""


class WeightedMean(Reducer):
    """The sum of the weighted differences over the sum of the weights, or over `divisor`; only sums are in memory."""

    def __init__(self, divisor: float | None = None) -> None:
        self._divisor = divisor
        self._total_weight = 0.0
        self._sums: dict[str, Array] = {}
        self._is_first = True

    def add(self, update: Arrays, weight: float, origin: "Arrays | None" = None) -> float:
        """Add weight times the difference to the sums."""
        self._is_first = not self._sums
        if self._is_first:
            self._sums = {name: np.empty(array.shape) for name, array in update.items()}
        self._total_weight += weight
        return super().add(update, weight, origin)

    def add_block(self, name: str, block: slice, difference: Array, weight: float) -> None:
        """Add weight times the difference to one block of the sums."""
        total = self._sums[name].reshape(-1)[block]
        if self._is_first:
            np.multiply(difference, weight, out=total)
        else:
            np.multiply(difference, weight, out=difference)
            np.add(total, difference, out=total)

    def result(self, stacks: Stacks) -> "dict[str, Array]":
        """Return the mean, and forget the sums; raise ZeroDivisionError where all weights are zero."""
        divisor = self._total_weight if self._divisor is None else self._divisor
        if divisor == 0.0:
            raise ZeroDivisionError("the weights of all updates add up to zero")
        sums = self.sums()
        for total in sums.values():
            np.divide(total, divisor, out=total)  # in place: the sums are as large as two adapters
        return sums

    def sums(self) -> "dict[str, Array]":
        """Return the sum of the weighted differences, and forget it."""
        sums, self._sums = self._sums, {}
        return sums


def _blocks(update: Arrays) -> list[tuple[str, slice]]:
    """Return the slices of an update's flattened tensors, by tensor."""
    return [
        (name, slice(begin, min(begin + BLOCK, array.size)))
        for name, array in update.items()
        for begin in range(0, array.size, BLOCK)
    ]


def _differences(
    update: Arrays, origin: "Arrays | None", blocks: Iterator[tuple[str, slice]]
) -> "Iterator[tuple[str, slice, Array, Array]]":
    """Yield each slice with that part of an update's difference and as much spare memory; the next one takes both."""
    memory, spare = np.empty(BLOCK), np.empty(BLOCK)
    for name, block in blocks:
        size = block.stop - block.start
        difference, other = memory[:size], spare[:size]
        np.copyto(difference, update[name].reshape(-1)[block])
        if origin is not None:
            np.copyto(other, origin[name].reshape(-1)[block])
            np.subtract(difference, other, out=difference)
        yield name, block, difference, other
