"""Splitting one source's rows among simulated clients."""

from itertools import pairwise

from fedcli.data.rows import Row
from fedcli.errors import ConfigError
from fedcli.randomness import stream


def partition(
    rows: list[Row], num_clients: int, seed: int, *, shards_by: str | None = None, max_rows: int | None = None
) -> list[list[Row]]:
    """Return each client's rows: equal shares (to within one row) of a random order, or of the order of a column.

    With `shards_by`, rows are sorted by that column and cut into one shard a client, the pathological non-IID split of
    McMahan et al. 2017, section 3. `max_rows` first takes that many rows at random. Raises ConfigError where a client
    would get none.
    """
    order = stream(seed, "partition").permutation(len(rows))[:max_rows]
    chosen = [rows[int(index)] for index in order]
    if len(chosen) < num_clients:
        raise ConfigError(
            f"{len(chosen)} rows cannot be split among {num_clients} clients",
            hint="Lower federation.clients, or give more rows in data.source or data.max_rows.",
        )
    if shards_by is not None:
        for row in chosen:
            if shards_by not in row.fields:
                raise ConfigError(
                    f"{row.where} has no column {shards_by!r}; it has {', '.join(row.fields)}",
                    hint="Correct data.partition.shards_by, or mend the row.",
                )
        chosen.sort(key=lambda row: str(row.fields[shards_by]))
    cuts = [len(chosen) * client // num_clients for client in range(num_clients + 1)]
    return [chosen[start:end] for start, end in pairwise(cuts)]
