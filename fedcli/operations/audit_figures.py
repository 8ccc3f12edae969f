"""What is made of an audit's readings: figures for each model and each number of copies; numbers alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from fedcli.operations.audit_models import Promise
from fedcli.privacy.audit_statistics import (
    Bound,
    Estimate,
    Separation,
    exposure,
    min_k,
    min_k_plus,
    one_run_bound,
    separate,
    share,
)
from fedcli.workspace.canaries import Canary

if TYPE_CHECKING:
    from fedcli.model.token_figures import TokenFigures

METHODS = ("likelihood", "min_k", "min_k_plus")
"""How a row is scored: its log-likelihood, Min-K% and Min-K%++; always less the base's."""
Scores = dict[str, float]


@dataclass(frozen=True)
class CanaryReading:
    """What a model says of one canary: its scores, and how it stands among fillings, where it was in."""

    scores: Scores
    rank: int | None = None
    is_written: bool = False
    """Whether greedy decoding writes the secret behind the prompt."""


@dataclass(frozen=True)
class CanaryFigures:
    """Of the canaries that are repeated so often; None: of all together.

    Exposures are of those that were in. `bound` is of epsilon for `repeat` rows (all: the most) being there or not,
    `promised` the ledger's (epsilon, delta) for the same.
    """

    repeat: int | None
    num_canaries: int
    num_included: int
    highest_exposure: float | None
    median_exposure: float | None
    num_full_exposure: int
    extracted: Estimate | None
    separation: dict[str, Separation]
    bound: Bound | None
    promised: tuple[float, float] | None

    @property
    def is_contradicted(self) -> bool:
        """Whether the lower bound is above the upper one."""
        return self.bound is not None and self.promised is not None and self.bound.epsilon > self.promised[0]


@dataclass(frozen=True)
class RowFigures:
    """Of the client's own rows against held-out ones; None where there are none of those."""

    num_rows: int
    separation: dict[str, Separation] | None
    extracted: Estimate | None
    """Of rows that are long enough."""
    num_shared: int = 0
    """Held-out rows that are among the client's own, and do not count."""


@dataclass(frozen=True)
class ModelFigures:
    """All that was measured of one model."""

    name: str
    what: str
    seen_by: str
    promise: Promise | None
    canaries: list[CanaryFigures]
    rows: RowFigures


def scores_of(sides: "Sequence[TokenFigures]") -> Scores:
    """Return a row's scores: of a preference those of the chosen response less those of the rejected one."""
    scores = dict.fromkeys(METHODS, 0.0)
    for sign, figures in zip((1, -1), sides, strict=False):
        log_probs, means, deviations = (
            array.tolist() for array in (figures.log_probs, figures.means, figures.deviations)
        )
        scores["likelihood"] += sign * math.fsum(log_probs)
        scores["min_k"] += sign * min_k(log_probs)
        scores["min_k_plus"] += sign * min_k_plus(log_probs, means, deviations)
    return scores


def less(scores: Scores, base: Scores) -> Scores:
    """Return scores less the base's."""
    return {method: scores[method] - base[method] for method in METHODS}


def separations(members: Sequence[Scores], others: Sequence[Scores]) -> dict[str, Separation]:
    """Return how well each method tells members from others; none where a side is empty."""
    found = {
        method: separate([each[method] for each in members], [each[method] for each in others]) for method in METHODS
    }
    return {method: separation for method, separation in found.items() if separation is not None}


def canary_figures(
    canaries: Sequence[Canary],
    readings: Sequence[CanaryReading],
    base: Mapping[int, Scores] | None,
    promise: Promise | None,
    num_fillings: int,
) -> list[CanaryFigures]:
    """Return the figures of each number of copies, then of all together; `base` has the base's scores by place.

    For None the model is the base itself, from which no canary differs.
    """
    repeats = sorted({canary.repeat for canary in canaries})
    groups = {repeat: [place for place, each in enumerate(canaries) if each.repeat == repeat] for repeat in repeats}
    differences = [less(each.scores, base[place]) for place, each in enumerate(readings)] if base is not None else None

    def figures(repeat: int | None, members: list[list[int]], most: int) -> CanaryFigures:
        places = [place for group in members for place in group]
        inside = [place for place in places if canaries[place].is_included]
        outside = [place for place in places if not canaries[place].is_included]
        exposures = [exposure(rank, num_fillings) for place in inside if (rank := readings[place].rank) is not None]
        promised = None if promise is None else promise.of_rows(most)
        separation, bound = {}, None
        if differences is not None:
            separation = separations(
                [differences[place] for place in inside], [differences[place] for place in outside]
            )
            guessed = [
                (
                    [differences[place]["likelihood"] for place in group],
                    [canaries[place].is_included for place in group],
                )
                for group in members
            ]
            bound = one_run_bound(guessed, 0.0 if promised is None else promised[1])
        return CanaryFigures(
            repeat=repeat,
            num_canaries=len(places),
            num_included=len(inside),
            highest_exposure=max(exposures, default=None),
            median_exposure=median(exposures) if exposures else None,
            num_full_exposure=sum(readings[place].rank == 1 for place in inside),
            extracted=share(sum(readings[place].is_written for place in inside), len(inside)) if inside else None,
            separation=separation,
            bound=bound,
            promised=promised,
        )

    each = [figures(repeat, [groups[repeat]], repeat) for repeat in repeats]
    return [*each, figures(None, [*groups.values()], repeats[-1])] if len(repeats) > 1 else each
