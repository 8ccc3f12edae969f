"""A prefix tree over prompts' token ids: which prefixes are worth computing once, and for which prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

LEAST_TOKENS = 16
"""Of a prefix beyond the one before it: less is not worth a forward pass of its own."""
LEAST_SAVED = 64
"""Tokens that a prefix must save in all."""
LEAST_SHARE = 0.2
"""Of its prompts' tokens, that a prefix must save: else larger batches are worth more."""


@dataclass
class Prefix:
    """Tokens that prompts begin with: those that end with it, and the longer prefixes of the others."""

    length: int
    row: int
    """One of the prompts that begin so."""
    rows: list[int] = field(default_factory=list)
    """The prompts whose longest prefix this is."""
    longer: list["Prefix"] = field(default_factory=list)


def prefix_tree(prompts: Sequence[Sequence[int]], most: Sequence[int]) -> Prefix:
    """Return the root, of length 0, of the prefixes that are worth computing once.

    most: how many tokens of each prompt may be in a prefix.
    """
    root = Prefix(0, 0)
    ids = [np.asarray(prompt[:length], dtype=">u4") for prompt, length in zip(prompts, most, strict=True)]
    keys = [prompt.tobytes() for prompt in ids]  # big-endian: they sort as the ids do
    order = sorted(range(len(keys)), key=keys.__getitem__)
    common = np.array([0, *(_common(ids[one], ids[other]) for one, other in pairwise(order))])
    before = np.cumsum([0, *(len(prompts[row]) for row in order)])
    open_ranges = [(0, len(order), root)] if order else []
    while open_ranges:
        start, end, above = open_ranges.pop()
        if end - start == 1:
            above.rows.append(order[start])
            continue
        within = common[start + 1 : end]
        shortest = int(within.min())
        new = shortest - above.length
        saved = (end - start - 1) * new
        num_tokens = int(before[end] - before[start]) - (end - start) * above.length
        if new >= LEAST_TOKENS and saved >= max(LEAST_SAVED, LEAST_SHARE * num_tokens):
            prefix = Prefix(shortest, order[start])
            above.longer.append(prefix)
            above = prefix
        cuts = [start, *(start + 1 + np.flatnonzero(within == shortest)).tolist(), end]
        open_ranges += [(first, last, above) for first, last in reversed([*pairwise(cuts)])]
    return root


def _common(one: "np.ndarray", other: "np.ndarray") -> int:
    """Return how many tokens two prompts begin with alike."""
    shorter = min(len(one), len(other))
    differ = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(differ[0]) if len(differ) else shorter
