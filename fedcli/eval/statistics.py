"""Scores of items, with standard errors, bootstrap intervals (Efron 1979) and paired differences.

Items of one cluster (the questions about one passage) are not independent: whole clusters are resampled (Davison and
Hinkley 1997, section 3.8). An item that is in no cluster is one by itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedcli.eval.benchmark import Mark, Metric
from fedcli.randomness import stream

NUM_RESAMPLES = 1000
LEVEL = 0.95
Marks = Mapping[str, Mark]
"""Of one metric, by item."""
Clusters = Mapping[str, str]
"""The cluster of each item that is in one."""


@dataclass(frozen=True)
class Score:
    """A metric's value on its items, the bootstrap's standard error, and the 95 % percentile interval."""

    value: float
    standard_error: float
    low: float
    high: float
    num_items: int


def score(metric: Metric, parts: Sequence[Marks], clusters: Sequence[Clusters] | None = None) -> Score:
    """Return the score of one set of items, or the mean over several; each needs an item. `clusters` are by part."""
    return _summary(_value(metric, parts), _resampled(metric, parts, clusters), sum(map(len, parts)))


def difference(
    metric: Metric, parts: Sequence[Marks], others: Sequence[Marks], clusters: Sequence[Clusters] | None = None
) -> Score | None:
    """Return the paired difference (first minus second) on the items that both have; None where they share none."""
    shared = [sorted(mine.keys() & theirs.keys()) for mine, theirs in zip(parts, others, strict=True)]
    if not shared or not all(shared):
        return None
    mine = [{item: marks[item] for item in items} for marks, items in zip(parts, shared, strict=True)]
    theirs = [{item: marks[item] for item in items} for marks, items in zip(others, shared, strict=True)]
    resampled = _resampled(metric, mine, clusters) - _resampled(metric, theirs, clusters)
    return _summary(_value(metric, mine) - _value(metric, theirs), resampled, sum(map(len, shared)))


def difference_over_seeds(
    metric: Metric,
    ours: Sequence[Sequence[Sequence[Marks]]],
    theirs: Sequence[Sequence[Sequence[Marks]]],
    clusters: Sequence[Clusters] | None = None,
) -> Score | None:
    """Return the mean difference (ours minus theirs) over seeds, with an interval over seeds and items.

    Each side has, for every seed, the marks by part of one model or of several, whose mean counts. In a seed those
    items are used that all its models have; None where there are none. Every resample draws seeds, and the clusters of
    items once for all seeds of as many. With one seed of one model a side it is what `difference` gives.
    """
    num_parts = len(ours[0][0])
    num_items = 0
    values, resampled = np.zeros(len(ours)), np.zeros((len(ours), NUM_RESAMPLES))
    for seed, (mine, others) in enumerate(zip(ours, theirs, strict=True)):
        for part in range(num_parts):
            items = sorted(set.intersection(*(set(model[part]) for model in (*mine, *others))))
            if not items:
                return None
            num_items += len(items) if seed == 0 else 0
            for sign, models in ((1, mine), (-1, others)):
                for model in models:
                    marks = {name: model[part][name] for name in items}
                    matrix = _clustered(_matrix(metric, marks), marks, clusters[part] if clusters else {})
                    share = sign / (len(models) * num_parts)
                    values[seed] += share * _of(metric, matrix.sum(axis=0))
                    resampled[seed] += share * _of_each(metric, _draws(part, len(matrix)) @ matrix)
    seeds = stream(0, "bootstrap-seeds", part=str(len(ours))).integers(len(ours), size=(NUM_RESAMPLES, len(ours)))
    over_seeds = resampled[seeds, np.arange(NUM_RESAMPLES)[:, None]].mean(axis=1)
    return _summary(float(values.mean()), over_seeds, num_items)


def _of_each(metric: Metric, sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the metric's value of each row of sums."""
    return np.array([_of(metric, row) for row in sums]) if metric.of_sum else sums[:, 0] / sums[:, 1]


@lru_cache(maxsize=4)
def _draws(part: int, count: int) -> NDArray[np.int64]:
    """Return how often each of `count` clusters is in each resample: the draws of `_resampled`."""
    draws = stream(0, "bootstrap", client=part, part=str(count))
    return np.array([np.bincount(draws.integers(count, size=count), minlength=count) for _ in range(NUM_RESAMPLES)])


def average_ranks(values: Mapping[str, Sequence[float]], higher_is_better: Sequence[bool]) -> dict[str, float]:
    """Return each target's mean rank over metrics, 1 the best; equal values share the mean of their ranks."""
    if not higher_is_better:
        return {}
    signed = np.array([*values.values()]) * np.where(higher_is_better, -1, 1)
    better = (signed < signed[:, None]).sum(axis=1)
    equal = (signed == signed[:, None]).sum(axis=1)
    return dict(zip(values, (better + (equal + 1) / 2).mean(axis=1).tolist(), strict=True))


def _value(metric: Metric, parts: Sequence[Marks]) -> float:
    return math.fsum(_of(metric, _matrix(metric, marks).sum(axis=0)) for marks in parts) / len(parts)


def _of(metric: Metric, sums: NDArray[np.float64]) -> float:
    return metric.of_sum([float(value) for value in sums]) if metric.of_sum else float(sums[0] / sums[1])


def _matrix(metric: Metric, marks: Marks) -> NDArray[np.float64]:
    """Return the items' vectors, (items, length), in the order of their names; a plain mark x is (x, 1)."""
    rows = [marks[item] if metric.of_sum else (marks[item], 1.0) for item in sorted(marks)]
    return np.array(rows, np.float64)


def _clustered(matrix: NDArray[np.float64], marks: Marks, clusters: Clusters) -> NDArray[np.float64]:
    """Return the sums of the items' vectors, (clusters, length), in the order of the clusters' first items."""
    places: dict[tuple[str, bool], int] = {}
    keys = ((clusters.get(item, item), item in clusters) for item in sorted(marks))
    rows = [places.setdefault(key, len(places)) for key in keys]
    sums = np.zeros((len(places), matrix.shape[1]))
    np.add.at(sums, rows, matrix)
    return sums


def _resampled(metric: Metric, parts: Sequence[Marks], clusters: Sequence[Clusters] | None) -> NDArray[np.float64]:
    """Return the metric's values on resamples of the clusters; equal numbers are drawn equally, so that they pair."""
    values = np.zeros(NUM_RESAMPLES)
    for part, marks in enumerate(parts):
        matrix = _clustered(_matrix(metric, marks), marks, clusters[part] if clusters else {})
        count = len(matrix)
        draws = stream(0, "bootstrap", client=part, part=str(count))
        for resample in range(NUM_RESAMPLES):
            times = np.bincount(draws.integers(count, size=count), minlength=count)
            values[resample] += _of(metric, times @ matrix) / len(parts)
    return values


def _summary(value: float, resampled: NDArray[np.float64], num_items: int) -> Score:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Score(value, float(resampled.std(ddof=1)), float(low), float(high), num_items)
