"""How far a client has come in its rows: where the next round's draw goes on."""

from collections.abc import Sequence

from fedcli.workspace.history import Round
from fedcli.workspace.inbox import read_update_record
from fedcli.workspace.records import parse_update_record
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.window import base_of, may_still_count


def first_draw(rounds: Sequence[Round], client: int) -> int:
    """Return how many rows a client has drawn before the last of some rounds, which it is to train in.

    Of rounds that ask for a number of steps these are all rows of the rounds whose cohorts held it, as ever. Where
    clients may make fewer, or late updates count, it is what went into updates that were counted or may still be: what
    no update brought to the server is drawn again, and no row is passed over.
    """
    counted: dict[int, int | None] = {}
    for closing in rounds:
        merge = closing.manifest.aggregation
        for entry in [] if merge is None else merge.counted:
            if entry.client == client:
                counted[base_of(closing, entry)] = entry.steps
    total = 0
    for earlier in rounds[:-1]:
        if client in earlier.manifest.cohort:
            total += _steps(earlier, client, counted, rounds) * earlier.manifest.train.rows_per_step
    return total


def _steps(earlier: Round, client: int, counted: dict[int, int | None], rounds: Sequence[Round]) -> int:
    """Return the steps that a client made in a round, as far as they brought something to the server."""
    train = earlier.manifest.train
    if not train.is_uneven and earlier.manifest.staleness is None:
        return train.steps
    if earlier.number in counted:
        return counted[earlier.number] or train.steps
    if not may_still_count(rounds, earlier.number):
        return 0
    try:  # where it lies there
        return min(parse_update_record(read_update_record(earlier, client)).steps, train.steps)
    except (FileNotFoundError, Refusal):
        return 0
