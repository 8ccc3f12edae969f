"""Cutting a batch into micro-batches: rows of like length together, so that little is padded."""

from collections.abc import Sequence

from fedcli.data.encoded import EncodedRow
from fedcli.model.padding import cheapest_parts

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
    parts = cheapest_parts([row.length for row in rows], overhead=overhead, largest=largest)
    return [rows[part.start : part.stop] for part in parts]
