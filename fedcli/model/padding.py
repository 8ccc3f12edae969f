"""Cutting sequences into batches of like length, so that little is padded."""

from collections.abc import Sequence


def cheapest_parts(lengths: Sequence[int], *, overhead: int, largest: int) -> list[range]:
    """Return where to cut ascending lengths: each part costs its padded tokens, and `overhead` tokens beside.

    A part has at most `largest` padded tokens, unless one sequence alone has more.
    """
    best: list[tuple[int, int]] = [(0, 0)]  # of the first n: the least cost, and where their last part begins
    for end in range(1, len(lengths) + 1):
        longest = lengths[end - 1]
        parts = ((best[start][0] + (end - start) * longest + overhead, start) for start in range(end))
        best.append(min(part for part in parts if part[1] == end - 1 or (end - part[1]) * longest <= largest))
    cuts, end = [], len(lengths)
    while end:
        start = best[end][1]
        cuts.append(range(start, end))
        end = start
    return cuts[::-1]
