"""Batches of rows, longest first; what rows begin with alike is computed once, and kept while these are answered."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedcli.eval.prefix_tree import Prefix, prefix_tree
from fedcli.model.prefix_cache import Kept, Row

BATCH_SIZE = 64
FIRST_BATCH = {"cpu": 4}
"""Items of the first batch, by the kind of device, where nobody says how many; of others BATCH_SIZE."""
SAMPLED_BATCH = {"cpu": 8}
"""The same of every batch of sampled answers, which depend on it: no clock may decide."""
GREEDY_BATCH = 16
"""Greedy answers of a batch behind prefixes, however long it takes: a token of each takes three times as long as one of
a single answer. Fewer where their keys and values would take more memory than those of prefixes may."""
BATCH_SECONDS = 30.0
"""About as long as a batch may take: what is answered is kept, and shown, after each."""
MOST_GROWTH = 4
MAX_BATCH_TOKENS = 2**16
"""Of a batch with its padding and what may be generated."""
PREFIX_TOKENS = {"cpu": 1024}
"""Of the prefixes that are computed together, by the kind of device; of others MAX_BATCH_TOKENS."""


@dataclass
class Pace:
    """The rows of a batch: as many as the one before would have had in BATCH_SECONDS, unless that is fixed."""

    size: int
    is_fixed: bool = False
    least: int = 1

    @classmethod
    def of(cls, device: str, batch_size: int | None, *, is_sampled: bool = False) -> "Pace":
        """Return as many rows as a user asks for, else as many as suit the kind of device and of answers."""
        if batch_size is not None or is_sampled:
            return cls(batch_size or SAMPLED_BATCH.get(device, BATCH_SIZE), is_fixed=True)
        # elsewhere than on a CPU in half precision, which batches change: no clock decides there either
        return cls(FIRST_BATCH.get(device, BATCH_SIZE), is_fixed=device not in FIRST_BATCH)

    def took(self, num_rows: int, seconds: float) -> None:
        """Take note of how long a batch took."""
        if not self.is_fixed:
            in_time = int(num_rows * BATCH_SECONDS / max(seconds, 1e-9))
            self.size = max(self.least, min(BATCH_SIZE, num_rows * MOST_GROWTH, in_time))

    def at_least(self, num_rows: int) -> None:
        """Take no fewer rows than so many, unless their number is fixed."""
        if not self.is_fixed:
            self.least = max(num_rows, 1)
            self.size = max(self.size, self.least)


@dataclass(frozen=True)
class Keeper:
    """Computes prefixes, and bounds them."""

    keep: Callable[[list[Row]], list[Kept | None]]
    """Given prefixes, what is to be kept of each; None of those that memory is too small for."""
    num_tokens: int
    """Of prefixes, that may be kept at a time; a single one has at most half of them."""
    at_once: int
    """Tokens, with padding, of prefixes that are computed together."""


def batches(
    rows: Mapping[int, Sequence[int]],
    most: Mapping[int, int],
    room: int,
    pace: Pace,
    keeper: Callable[[], Keeper | None],
) -> Iterator[list[tuple[int, Row]]]:
    """Yield rows' indices and tokens in batches: those that share no prefix, then prefix by prefix, depth first.

    most: how many of a row's tokens may be in a prefix. room: tokens that an answer may have. keeper: asked where there
    are prefixes; None keeps none. Whoever iterates answers a batch before it asks for the next one, whose size depends
    on how long that took.
    """
    if not rows:
        return
    indices, ids = list(rows), list(rows.values())
    root = prefix_tree(ids, [most[index] for index in indices])
    keeping = keeper() if root.longer else None
    if keeping is None:
        root = Prefix(0, 0, list(range(len(ids))))
    elif room:
        pace.at_least(min(GREEDY_BATCH, keeping.num_tokens // (max(map(len, ids)) + room)))

    def asked(above: Prefix, kept: Kept | None) -> list[tuple[int, Row]]:
        return [(indices[row], Row(ids[row], kept)) for row in above.rows]

    yield from _in_order(asked(root, None), room, pace)
    levels = [_Level([(prefix, None) for prefix in root.longer])]
    while keeping is not None and levels:
        if not levels[-1].open:
            levels.pop()
            continue
        num_kept = sum(level.num_tokens for level in levels)
        chosen = levels[-1].next(pace.size, keeping.at_once, keeping.num_tokens // 2 - num_kept)
        found: list[Kept | None] = [None] * len(chosen)
        if all(prefix.length <= keeping.num_tokens // 2 for prefix, _ in chosen):
            found = keeping.keep([Row(ids[prefix.row][: prefix.length], before) for prefix, before in chosen])
        here: list[tuple[int, Row]] = []
        below = _Level([])
        for (prefix, before), kept in zip(chosen, found, strict=True):
            if kept is None:
                here += [row for each in _all(prefix) for row in asked(each, before)]
            else:
                here += asked(prefix, kept)
                below.open += [(longer, kept) for longer in prefix.longer]
                below.num_tokens += prefix.length - (before.length if before else 0)
        levels.append(below)
        del chosen, found
        yield from _in_order(here, room, pace)


class _Level:
    """Prefixes that are still to be computed, each with what is kept of its beginning, which is so many tokens."""

    def __init__(self, prefixes: list[tuple[Prefix, Kept | None]]) -> None:
        self.open = prefixes
        self.num_tokens = 0

    def next(self, num_rows: int, at_once: int, may_keep: int) -> list[tuple[Prefix, Kept | None]]:
        """Take out the next prefixes: at least one, no more than answer so many rows and than fit."""
        taken: list[tuple[Prefix, Kept | None]] = []
        found = widest = num_new = 0
        while self.open:
            prefix, before = self.open[-1]
            new = prefix.length - (before.length if before else 0)
            num_new, widest = num_new + new, max(widest, new)
            if taken and (found >= num_rows or widest * (len(taken) + 1) > at_once or num_new > may_keep):
                break
            found += len(prefix.rows)
            taken.append(self.open.pop())
        return taken


def _all(prefix: Prefix) -> Iterator[Prefix]:
    """Yield a prefix and all longer ones."""
    waiting = [prefix]
    while waiting:
        waiting += (first := waiting.pop()).longer
        yield first


def _in_order(rows: list[tuple[int, Row]], room: int, pace: Pace) -> Iterator[list[tuple[int, Row]]]:
    """Yield batches of rows, those with most to compute first: what does not fit into memory fails at once."""
    batch: list[tuple[int, Row]] = []
    longest = 0
    for index, row in sorted(rows, key=lambda indexed: -indexed[1].num_new):
        longest = max(longest, len(row.ids) + room)
        if batch and (len(batch) >= pace.size or longest * (len(batch) + 1) > MAX_BATCH_TOKENS):
            started = time.monotonic()
            yield batch
            pace.took(len(batch), time.monotonic() - started)
            batch, longest = [], len(row.ids) + room
        batch.append((index, row))
    if batch:
        yield batch
