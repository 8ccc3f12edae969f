"""Rows by their scores: which are kept, in which order a round trains on them, and how many have which score."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcli.config import OrderName, ScoreName, SelectConfig
from fedcli.config.select import RANGES

NUM_BINS = 32
MISALIGNED = 1.0
"""An IFD from which a prompt makes its response no likelier."""


@dataclass(frozen=True)
class Losses:
    """Of a response: the mean loss of its tokens given the prompt, the same without it, and how many they are."""

    given: float
    alone: float
    num_tokens: int


def score_of(name: ScoreName, losses: Losses) -> float:
    """Return a row's score.

    ira is alone - given (FedDQC, 2410.11540), ifd exp(given - alone), a ratio of perplexities (2308.12032).
    """
    if name == "length":
        return float(losses.num_tokens)
    difference = losses.alone - losses.given
    return difference if name == "ira" else math.exp(-difference)


def kept(select: SelectConfig, scores: Sequence[float]) -> NDArray[np.int64]:
    """Return the places of the rows that are kept, ascending: those of the highest scores, of equal ones the first.

    Of ifd those are dropped at first whose prompt makes the response no likelier.
    """
    values = np.asarray(scores, np.float64)
    best = np.argsort(-values, kind="stable")
    if select.score == "ifd":
        best = best[values[best] < MISALIGNED]
    return np.sort(best[: select.most(len(values))])


def in_order(order: OrderName, places: Sequence[int], scores: Sequence[float]) -> list[int]:
    """Return places in the order of their scores; those of equal scores, and all where there is none, as they are."""
    if order == "none":
        return [*places]
    sign = 1 if order == "ascending" else -1
    return sorted(places, key=lambda place: sign * scores[place])


def histogram(name: ScoreName, scores: Sequence[float]) -> list[int]:
    """Return how many scores lie in each of NUM_BINS equal parts of the score's range."""
    low, high = RANGES[name]
    bins = np.floor((np.asarray(scores, np.float64) - low) / (high - low) * NUM_BINS).clip(0, NUM_BINS - 1)
    return [int(count) for count in np.bincount(bins.astype(np.int64), minlength=NUM_BINS)]
