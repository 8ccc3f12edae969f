"""Cutting a batch into micro-batches: rows of like length together, so that little is padded."""

from collections.abc import Sequence

from fedcli.data.encoded import EncodedRow

OVERHEAD = {"cpu": 64, "cuda": 512}
"""What a further micro-batch costs, in tokens, by the kind of device; measured on a CPU, an estimate for a GPU."""
LARGEST = {"cpu": 1024, "cuda": 4096}
"""Padded tokens of a micro-batch: activations and logits stay bounded however long the rows are."""


def cut(batch: Sequence[EncodedRow], *, size: int | None, overhead: int, largest: int) -> list[list[EncodedRow]]:
    """Return a batch's rows, sorted by length, in micro-batches of `size`, or where that is None in the cheapest ones.

    A micro-batch costs its padded tokens, and `overhead` tokens beside; it has at most `largest` padded tokens, unless
    one row alone has more.
    """
    rows = sorted(batch, key=lambda row: row.length)
    if size is not None:
        return [rows[start : start + size] for start in range(0, len(rows), size)]
    best: list[tuple[int, int]] = [(0, 0)]  # of the first n rows: the least cost, and where their last part begins
    for end in range(1, len(rows) + 1):
        longest = rows[end - 1].length
        parts = ((best[start][0] + (end - start) * longest + overhead, start) for start in range(end))
        best.append(min(part for part in parts if part[1] == end - 1 or (end - part[1]) * longest <= largest))
    cuts, end = [], len(rows)
    while end:
        start = best[end][1]
        cuts.append(rows[start:end])
        end = start
    return cuts[::-1]
