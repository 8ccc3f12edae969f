"""Splitting rows among simulated clients; every draw comes from the seed."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedcli.config import By, Dirichlet, Partition, ShardsBy, Sizes
from fedcli.data.file_rows import Row
from fedcli.data.topics import find_topics
from fedcli.errors import ConfigError
from fedcli.randomness import stream
from fedcli.tasks.conversation import Item, Prompt
from fedcli.tasks.format import is_finite

UNUSED = -1
"""The client of a row that nobody gets."""
NUM_LENGTH_CLASSES = 10
NUM_DRAWS = 1000
"""How often Dirichlet shares are drawn until every client has min_rows."""

Rows: TypeAlias = NDArray[np.int64]
"""Row numbers, or a number for each row."""


@dataclass
class Survey:
    """What a split must know of every usable row, in the order in which the sources give them."""

    partition: Partition
    num_clients: int
    seed: int
    sources: "array[int]" = field(default_factory=lambda: array("H"))
    _codes: "array[int]" = field(default_factory=lambda: array("q"))
    _names: dict[str, int] = field(default_factory=dict)
    _texts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._by: str | None = None
        match self.partition:
            case By(by=column) | ShardsBy(shards_by=column):
                self._by = column
            case Dirichlet(dirichlet=options):
                self._by = options.by

    @property
    def column(self) -> str | None:
        """The column that rows are split by, where one is."""
        return self._by

    def add(self, row: Row, item: Item, source: int) -> None:
        """Note a usable row; raise ConfigError where it lacks the column that rows are split by."""
        self.sources.append(source)
        if self._by == "topic" and isinstance(self.partition, Dirichlet):
            self._texts.append(_asked(item.conversations[0]))
        elif self._by == "length" and isinstance(self.partition, Dirichlet):
            self._codes.append(_length(item))
        elif self._by is not None:
            if self._by not in row.fields:
                raise ConfigError(
                    f"{row.where} has no column {self._by!r}; it has {', '.join(map(str, row.fields)) or 'none'}",
                    hint="Correct data.partition (iid needs no column), or mend the row.",
                )
            value = row.fields[self._by]
            if isinstance(self.partition, By) and not is_client(value):
                raise ConfigError(
                    f"{row.where}: column {self._by!r} is {value!r}, which names no client",
                    hint="data.partition.by makes a client of each text or number there: mend the row, or take it out.",
                )
            name = str(value)
            self._codes.append(self._names.setdefault(name, len(self._names)))

    def groups(self) -> tuple[list[str], Rows]:
        """Return the names of the groups that rows are split by, sorted, and every row's group; no names for iid."""
        if self.partition == "sources":
            codes = np.array(self.sources, np.int64)
            return [f"source {number}" for number in range(int(codes.max(initial=0)) + 1)], codes
        if self._by is None:
            return [], np.zeros(len(self.sources), np.int64)
        if isinstance(self.partition, Dirichlet) and self._by == "topic":
            return find_topics(self._texts, self.partition.dirichlet.topics, self.seed)
        codes = np.array(self._codes, np.int64)
        if isinstance(self.partition, Dirichlet) and self._by == "length":
            edges = np.unique(np.quantile(codes, np.linspace(0, 1, NUM_LENGTH_CLASSES + 1)[1:-1], method="higher"))
            names = [f"from {low} characters" for low in (0, *map(int, edges))]
            return names, np.searchsorted(edges, codes, side="right")
        names = sorted(self._names, key=_natural)
        rank = np.empty(len(names), np.int64)
        rank[[self._names[name] for name in names]] = np.arange(len(names))
        return names, rank[codes]


@dataclass(frozen=True)
class Split:
    """Every usable row's client (UNUSED for none), and the groups that the rows were split by."""

    clients: NDArray[np.int32]
    num_clients: int
    group_names: list[str]
    groups: Rows
    remarks: tuple[str, ...] = ()
    """What of the rows no client has, and why."""

    def sizes(self) -> list[int]:
        """Return every client's number of rows."""
        return _counts(self.clients[self.clients != UNUSED], self.num_clients)

    def group_counts(self, client: int) -> list[int]:
        """Return how many rows of each group a client has."""
        return _counts(self.groups[self.clients == client], len(self.group_names))


def split(
    survey: Survey, *, min_rows: int = 1, max_rows: int | None = None, source_limits: Sequence[int | None] = ()
) -> Split:
    """Give every row a client, as the survey's partition says.

    `max_rows` first takes that many of all rows at random, `source_limits` so many of each source. Raises ConfigError
    where a client would get fewer than `min_rows`.
    """
    num_clients = survey.num_clients
    names, groups = survey.groups()
    order = _chosen(survey, max_rows, source_limits)
    if len(order) < num_clients * min_rows and not isinstance(survey.partition, By):  # whose error says how many fit
        raise ConfigError(
            f"{len(order)} rows cannot be split among {num_clients} clients with at least {min_rows} each",
            hint="Lower federation.clients or data.min_rows, or give more rows in data.source or data.max_rows.",
        )
    clients = np.full(len(survey.sources), UNUSED, np.int32)
    remarks: tuple[str, ...] = ()
    match survey.partition:
        case Dirichlet(dirichlet=options):
            shares = _dirichlet(order, groups, survey, options.alpha, min_rows)
        case By() as by:
            shares, remarks = _values(order, groups, names, survey, by, min_rows)
        case Sizes(sizes=options_):
            weights = np.arange(1, num_clients + 1, dtype=np.float64) ** -options_.power
            shares = _cut(order, weights / weights.sum())
        case "sources":
            shares = _sources(order, groups, len(names), num_clients)
        case _:  # shards are cut of the sorted rows; for iid all are of one group, and stay as they are
            shares = _equal(order[np.argsort(groups[order], kind="stable")], num_clients)
    for client, share in enumerate(shares):
        if len(share) < min_rows:
            raise ConfigError(
                f"client {client} would get {len(share)} rows, fewer than data.min_rows ({min_rows})",
                hint="Lower data.min_rows or federation.clients, or choose a less uneven data.partition.",
            )
        clients[share] = client
    return Split(clients, num_clients, names, groups, remarks)


def is_client(value: object) -> bool:
    """Return whether a value of a column can name a client: a text that is not empty, or a finite number."""
    return bool(value.strip()) if isinstance(value, str) else isinstance(value, bool) or is_finite(value)


def _counts(numbers: NDArray[Any], length: int) -> list[int]:
    return [int(count) for count in np.bincount(numbers, minlength=length)]


def _chosen(survey: Survey, max_rows: int | None, source_limits: Sequence[int | None]) -> Rows:
    """Return the rows that are used, in random order."""
    order = stream(survey.seed, "partition").permutation(len(survey.sources))
    sources = np.array(survey.sources, np.int64)
    for number, limit in enumerate(source_limits):
        if limit is not None:
            of_source = sources[order] == number
            order = order[~of_source | (np.cumsum(of_source) <= limit)]
    return order[:max_rows]


def _cut(order: Rows, shares: NDArray[np.float64]) -> list[Rows]:
    """Cut rows into consecutive parts in proportion to shares that add up to 1."""
    ends = np.floor(np.cumsum(shares) * len(order) + 1e-9).astype(np.int64)
    ends[-1] = len(order)
    return [order[start:end] for start, end in pairwise([0, *map(int, ends)])]


def _equal(order: Rows, num_parts: int) -> list[Rows]:
    return _cut(order, np.full(num_parts, 1 / num_parts))


def _dirichlet(order: Rows, groups: Rows, survey: Survey, alpha: float, min_rows: int) -> list[Rows]:
    """Share out each group by its own draw of Dirichlet(alpha); draw again until every client has enough."""
    present, counts = np.unique(groups[order], return_counts=True)
    for attempt in range(NUM_DRAWS):
        generator = stream(survey.seed, "dirichlet", part=str(attempt))
        draws = generator.dirichlet(np.full(survey.num_clients, alpha), len(present))
        ends = (np.cumsum(draws, axis=1) * counts[:, None]).astype(np.int64)
        ends[:, -1] = counts
        sizes = np.diff(ends, axis=1, prepend=0)
        if sizes.sum(axis=0).min() >= min_rows:
            break
    else:
        raise ConfigError(
            f"none of {NUM_DRAWS} draws of data.partition.dirichlet gives every client data.min_rows ({min_rows}) rows",
            hint="Raise alpha, or lower data.min_rows or federation.clients.",
        )
    parts: list[list[Rows]] = [[] for _ in range(survey.num_clients)]
    for group, cuts in zip(present, ends, strict=True):
        members = order[groups[order] == group]
        for client, (start, end) in enumerate(pairwise([0, *map(int, cuts)])):
            parts[client].append(members[start:end])
    return [np.concatenate(own) for own in parts]


def _values(
    order: Rows, groups: Rows, names: list[str], survey: Survey, by: By, min_rows: int
) -> tuple[list[Rows], tuple[str, ...]]:
    """Make each value a client, in the order of the names; return what is left out, too, in a sentence each.

    Values with too few rows are left out, and with `keep: largest` those beyond the number of clients.
    """
    counts = _counts(groups[order], len(names))
    kept = [group for group, count in enumerate(counts) if count >= min_rows]
    few = [group for group, count in enumerate(counts) if count < min_rows]
    limit = survey.num_clients
    largest = sorted(kept, key=lambda group: -counts[group])[:limit] if by.keep == "largest" else kept
    if len(largest) != limit:
        other = "" if by.keep == "largest" or len(kept) < limit else ", or data.partition.keep to largest"
        raise ConfigError(
            f"column {by.by!r} has {len(names)} values, {len(kept)} of them with at least data.min_rows ({min_rows}) "
            f"rows; federation.clients is {limit}",
            hint=f"Set federation.clients to {len(kept)}: each value is a client{other}.",
        )
    dropped = {
        f"with fewer than data.min_rows ({min_rows}) rows": few,
        f"that are not the {limit} with most rows": sorted(set(kept) - set(largest)),
    }
    remarks = [
        f"{by.by}: {len(left)} of {len(names)} values, {why}, are left out with their {sum(counts[g] for g in left)} "
        f"rows; first, {names[left[0]]!r} with {counts[left[0]]}"
        for why, left in dropped.items()
        if left
    ]
    return [order[groups[order] == group] for group in sorted(largest)], tuple(remarks)


def _sources(order: Rows, groups: Rows, num_sources: int, num_clients: int) -> list[Rows]:
    """Give every source its own clients, equally many each, with equal shares of its rows."""
    if num_clients % num_sources:
        raise ConfigError(
            f"{num_clients} clients cannot be shared out equally among {num_sources} sources",
            hint=f"Set federation.clients to a multiple of {num_sources}.",
        )
    each = num_clients // num_sources
    return [share for source in range(num_sources) for share in _equal(order[groups[order] == source], each)]


def _asked(turns: Prompt) -> str:
    """Return the last question of a conversation; a text's is the text."""
    return next((turn.text for turn in reversed(turns[:-1]) if turn.role == "user"), turns[-1].text)


def _length(item: Item) -> int:
    responses = [turns[-1] for turns in item.conversations]
    return sum(len(turn.text) for turn in (*item.conversations[0][:-1], *responses))


def _natural(name: str) -> tuple[Any, ...]:
    """Sort numbers by value, ahead of other names."""
    return (0, int(name), "") if name.isascii() and name.isdigit() and len(name) < 20 else (1, 0, name)
