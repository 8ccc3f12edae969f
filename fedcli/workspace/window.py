"""Updates that count late: the window of rounds that they may have been made from, and which of them have counted."""

from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

from fedcli.workspace.history import Round, read_past
from fedcli.workspace.layout import ADAPTER_NAME
from fedcli.workspace.merge_records import Aggregation, CountedUpdate, RefusedUpdate

Sent: TypeAlias = tuple[Round, int]
"""The round that an update was made from, and its client."""


def base_of(closing: Round, entry: CountedUpdate | RefusedUpdate) -> int:
    """Return the number of the round that an update was made from, which `closing` was merged of."""
    return closing.number - 1 if entry.base is None else entry.base


def window_start(head: Round) -> int:
    """Return the first round whose updates may count when a round is merged; its own number without staleness."""
    return max(0, head.number - (head.manifest.staleness or 0))


def window_of(head: Round) -> list[Round]:
    """Return the earlier rounds that lie in a round's window, the oldest first, whether or not they may count."""
    found: list[Round] = []
    following = head
    while following.number > window_start(head):
        following = read_past(head.workspace, following.number - 1, digest=following.manifest.parent)
        found.append(following)
    return found[::-1]


def earlier_bases(head: Round, past: Sequence[Round]) -> list[Round]:
    """Return the earlier rounds whose updates may still count in the open round's merge, the oldest first.

    Left out is what clients sent otherwise (other files, other tensors), and what `gc` has removed.
    """
    return [
        earlier
        for earlier in past
        if window_start(head) <= earlier.number < head.number
        and is_alike(earlier, head)
        and earlier.manifest.secure_aggregation is None
        and not earlier.manifest.withholds
        and not earlier.is_gone(ADAPTER_NAME)
    ]


def is_alike(one: Round, other: Round) -> bool:
    """Return whether the updates of two rounds carry the same files and tensors."""
    return (one.manifest.update_files, one.manifest.update_tensors) == (
        other.manifest.update_files,
        other.manifest.update_tensors,
    )


def settled(rounds: Sequence[Round]) -> set[tuple[int, int]]:
    """Return which updates some rounds have counted or refused: by the round that each was made from, and its client.

    Neither is looked at again.
    """
    return {
        (base_of(closing, entry), entry.client)
        for closing in rounds
        if closing.manifest.aggregation is not None
        for entry in entries_of(closing.manifest.aggregation)
    }


def entries_of(merge: Aggregation) -> list[CountedUpdate | RefusedUpdate]:
    """Return what a merge says of the updates that it counted and refused."""
    return [*merge.counted, *merge.refused]


def times_counted(head: Round, rounds: Sequence[Round]) -> Counter[int]:
    """Return how often each client counted in the merges before the open round's that lie in its window."""
    found: Counter[int] = Counter()
    for closing in rounds:
        merge = closing.manifest.aggregation
        if merge is not None and window_start(head) < closing.number <= head.number:
            found.update(entry.client for entry in merge.counted)
    return found


def late_updates(bases: Sequence[Round], rounds: Sequence[Round]) -> list[Sent]:
    """Return the updates of earlier rounds that lie there and are not settled: the oldest first, as they were drawn."""
    done = settled(rounds)
    found = []
    for base in bases:
        open_clients = [client for client in base.draw_order if (base.number, client) not in done]
        sent = base.workspace.sent_updates(base.number, open_clients)
        found += [(base, client) for client in open_clients if client in sent]
    return found


def counted_by_base(rounds: Sequence[Round]) -> dict[int, dict[int, str]]:
    """Return which updates some rounds counted: by the round that each was made from, and its client, their hashes."""
    found: dict[int, dict[int, str]] = {}
    for closing in rounds:
        for entry in [] if closing.manifest.aggregation is None else closing.manifest.aggregation.counted:
            found.setdefault(base_of(closing, entry), {})[entry.client] = entry.update
    return found


def refused_by_base(rounds: Sequence[Round]) -> dict[int, dict[int, str]]:
    """Return which updates some rounds refused, as above: the codes."""
    found: dict[int, dict[int, str]] = {}
    for closing in rounds:
        for entry in [] if closing.manifest.aggregation is None else closing.manifest.aggregation.refused:
            found.setdefault(base_of(closing, entry), {})[entry.client] = entry.code
    return found


def may_still_count(rounds: Sequence[Round], number: int) -> bool:
    """Return whether an update that was made from a round may count in the merge of the last of these, or a later."""
    head = rounds[-1]
    return head.manifest.state == "open" and head.manifest.staleness is not None and number >= window_start(head)
