"""What a report shows, as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedcli.algos import Array

BASE = "base"
POOLED = "pooled"


@dataclass(frozen=True)
class MergedRound:
    """A round that has been merged, and how."""

    number: int
    algorithm: str
    learning_rate: float
    cohort: Sequence[int]
    losses: Mapping[int, float | None]
    """By client, of the counted updates, as the two below."""
    norms: Mapping[int, float]
    """Of what an update changes in the adapter."""
    refused: Mapping[int, tuple[str, str]]
    """Code and reason, by client."""
    missing: Sequence[int]
    total_bytes_up: int | None
    """By all clients, from the first round to this one; None where the server did not count them."""
    total_bytes_down: int | None
    opened: float
    """When it was published, in seconds since 1970 by the disk's clock."""
    closed: float
    """When the next round was."""

    @property
    def seconds(self) -> float:
        """From the round's opening to the next one's."""
        return max(0.0, self.closed - self.opened)

    @property
    def mean_loss(self) -> float | None:
        """The mean over the counted updates that tell of theirs."""
        known = [loss for loss in self.losses.values() if loss is not None]
        return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class Point:
    """A score with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class MetricScores:
    """All scores in one metric of one benchmark."""

    benchmark: str
    metric: str
    unit: str
    higher_is_better: bool
    rounds: Mapping[int, Point]
    others: Mapping[str, Point]
    """By target: base, alone-3, pooled."""
    alone: Mapping[str, int]
    """Of them those that are a client alone, with its id."""

    @property
    def title(self) -> str:
        """The benchmark's name and the metric's name."""
        return f"{self.benchmark} {self.metric}"

    @property
    def heading(self) -> str:
        """Both names, the unit, and which way is better."""
        return f"{self.title} ({self.unit}{'' if self.higher_is_better else ', lower is better'})"

    @property
    def best_round(self) -> int | None:
        """The round with the best score, the first of equal ones; None where none was scored."""
        return max(sorted(self.rounds), key=lambda number: self._rank(self.rounds[number]), default=None)

    @property
    def best_alone(self) -> str | None:
        """The client alone with the best score; None where none was scored."""
        return max(self.alone, key=lambda target: self._rank(self.others[target]), default=None)

    def lines(self) -> dict[str, Point]:
        """Return what rounds are compared with, by its label: base, the best alone, pooled."""
        best = self.best_alone
        named = {BASE: BASE, POOLED: POOLED} | ({best: f"best alone ({self.alone[best]})"} if best else {})
        return {label: self.others[target] for target, label in named.items() if target in self.others}

    def references(self) -> list[Point | None]:
        """Return the scores of the base, the best client alone and all rows pooled; None for what has none."""
        return [self.others.get(target or "") for target in (BASE, self.best_alone, POOLED)]

    def _rank(self, point: Point) -> float:
        return point.value if self.higher_is_better else -point.value


@dataclass(frozen=True)
class Similarity:
    """The cosines between what the clients' updates of one round change: clients x clients."""

    round: int
    clients: Sequence[int]
    cosines: Array

    def pairs(self) -> Array:
        """Return the cosine of each pair of clients once."""
        pairs: Array = self.cosines[np.triu_indices(len(self.clients), 1)]
        return pairs


@dataclass(frozen=True)
class UpdateRow:
    """A counted update of a round, and which of its figures are far from the others'."""

    round: int
    client: int
    num_samples: int | None
    weight: float | None
    norm: float | None
    cosine: float | None
    change: float | None
    unusual: Sequence[str]
    steps: int | None = None
    base: int | None = None


@dataclass(frozen=True)
class ProductRow:
    """What a merge lacked of a module's mean product, as a share of its norm."""

    module: str
    of_means: float
    """The product of the means of A and B."""
    of_merge: float | None
    """What was published; None where that is the product of the means."""


@dataclass(frozen=True)
class Report:
    """All that a report shows; `merged` and `similarities` are in the order of rounds."""

    title: str
    state: str
    task: str
    """What a federation does with it, as in "instruction tuning"."""
    round: int
    rounds: int
    num_clients: int
    is_simulation: bool
    facts: Mapping[str, str]
    merged: Sequence[MergedRound]
    scores: Sequence[MetricScores]
    similarities: Sequence[Similarity]
    notes: Sequence[str]
    """What a reader must know: what was left out, and why."""
    config: str
    versions: Mapping[str, str]
    created: str
    updates: Sequence[UpdateRow] = ()
    """Of the last merged round, and of others what is unusual."""
    products: Sequence[ProductRow] = ()
    """Of the last merged round."""
