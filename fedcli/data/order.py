"""Which rows a client uses: epochs without end, each a new random order, every row once before any twice."""

from fedcli.randomness import stream


def draw(num_rows: int, *, seed: int, client: int, first: int, count: int) -> list[int]:
    """Return the row indices of draws `first` to `first + count` - 1 of a client's stream."""
    indices: list[int] = []
    while len(indices) < count:
        epoch, offset = divmod(first + len(indices), num_rows)
        order = stream(seed, "rows", client=client, part=f"epoch {epoch}").permutation(num_rows)
        indices.extend(int(index) for index in order[offset : offset + count - len(indices)])
    return indices
