"""What `fedcli verify` checks of a round whose merge weighed steps, or counted updates of several rounds."""

from collections.abc import Mapping, Sequence

from fedcli.config import algorithm_from, rule_from
from fedcli.observer import Observer
from fedcli.server.merge import MergeInputs
from fedcli.server.merge_round import merge_round
from fedcli.server.merge_unequal import Unequal
from fedcli.server.updates_again import (
    ANOTHER,
    check_counted,
    check_record,
    gone_updates,
    is_reduced,
    is_same_record,
    no_longer_valid,
)
from fedcli.server.verification import Verification
from fedcli.server.verify_signatures import check_of_merge, gone_clients
from fedcli.workspace.history import Round, is_hidden
from fedcli.workspace.layout import PRUNED
from fedcli.workspace.merge_records import Aggregation, CountedUpdate
from fedcli.workspace.window import Sent, base_of, entries_of, is_alike, settled, times_counted, window_start


def is_unequal(previous: Round, aggregation: Aggregation) -> bool:
    """Return whether a round was merged so: not where products were, of the round's own updates alone."""
    if aggregation.lora is not None:
        return False
    return aggregation.step_weighting is not None or previous.manifest.staleness is not None


def check_window(
    current: Round, aggregation: Aggregation, previous: Round, rounds: Sequence[Round], result: Verification
) -> None:
    """Updates of earlier rounds are of the window, of clients of that round's cohort, and within what a client may."""
    if aggregation.most_counted is None and all(entry.base is None for entry in entries_of(aggregation)):
        return
    known = {each.number: each for each in rounds}
    for entry in entries_of(aggregation):
        if entry.base is None:
            continue
        base, who = known.get(entry.base), f"client {entry.client}'s update of round {entry.base}"
        if not window_start(previous) <= entry.base < previous.number:
            result.report(current.folder, f"speaks of {who}, which is not in its window")
        elif base is not None and entry.client not in base.manifest.cohort:
            result.report(current.folder, f"speaks of {who}, which was not in that round's cohort")
        elif base is not None and not is_alike(base, previous):
            result.report(current.folder, f"speaks of {who}, whose updates carry other files or tensors")
    for entries in (aggregation.counted, aggregation.refused):
        places = [(entry.client, base_of(current, entry)) for entry in entries]
        if places != sorted(set(places)):
            result.report(current.folder, f"lists updates out of order or twice: {places}")
    if aggregation.most_counted is not None:
        before = times_counted(previous, [each for each in rounds if each.number <= previous.number])
        for client in sorted({entry.client for entry in aggregation.counted}):
            times = before[client] + sum(entry.client == client for entry in aggregation.counted)
            if times > aggregation.most_counted:
                result.report(
                    current.folder,
                    f"counts client {client} for the {times}th time in its window, and {aggregation.most_counted} may",
                )


def recompute_unequal(
    current: Round,
    aggregation: Aggregation,
    previous: Round,
    rounds: Sequence[Round],
    num_clients: int,
    result: Verification,
) -> Mapping[str, bytes] | None:
    """Compute a round again from its counted updates, each beside the round that it was made from.

    None where that cannot be: something of it is gone, another user's or not what was counted. Raises FedError where
    the merge does.
    """
    known = {each.number: each for each in rounds}
    entries = [(known.get(base_of(current, entry)), entry) for entry in aggregation.counted]
    sent: list[tuple[Round, CountedUpdate]] = [(base, entry) for base, entry in entries if base is not None]
    if len(sent) < len(entries):
        return None  # a round that is missing is told by itself
    if not all(is_alike(base, previous) for base, _ in sent):
        return None  # told with the window
    if not _is_all_there(previous, sent, result):
        return None
    algorithm = algorithm_from(aggregation.algorithm)
    if not {*algorithm.update_files} <= {*previous.manifest.update_files}:
        result.report(current.folder, f"was merged with {algorithm.name}, for which no client sent anything")
        return None
    place = {(base.number, client): number for base, _ in sent for number, client in enumerate(base.draw_order)}
    order: list[Sent] = [(base, entry.client) for base, entry in sent]
    order.sort(key=lambda each: (each[0].number, place.get((each[0].number, each[1]), 0)))
    num_clients -= len(gone_clients(current))
    recorded = {entry.client: entry for _, entry in sent}
    files, again = merge_round(
        rule_from(aggregation.rule),
        MergeInputs(previous, algorithm, num_clients, [], len(order), Observer(), recorded=recorded),
        unequal=Unequal(
            by_steps=aggregation.step_weighting is not None,
            order=order,
            count=len(order),
            authenticate=lambda base: check_of_merge(current, base),
        ),
    )
    return files if _is_same(current, aggregation, again, known, result) else None


def check_lapsed(rounds: Sequence[Round], result: Verification) -> None:
    """Tell of updates that came when their round's window had passed: no violation."""
    head, done = rounds[-1], settled(rounds)
    for base in rounds[:-1]:
        if base.manifest.staleness is None or (head.manifest.state == "open" and base.number >= window_start(head)):
            continue
        for client in sorted(base.workspace.sent_updates(base.number, base.manifest.cohort)):
            if (base.number, client) not in done and not is_hidden(base.workspace, client):
                path = base.workspace.update(base.number, client)
                result.remark(path, "was never counted: it came late, or others filled the merges of its window")


def _is_all_there(previous: Round, sent: Sequence[tuple[Round, CountedUpdate]], result: Verification) -> bool:
    """Check updates one by one where a merge of a round cannot be made again; return whether it can.

    That is where not all updates may be read, or the round's own adapter was pruned, of which none may have come.
    """
    missing: set[tuple[int, int]] = set()
    is_pruned = previous.has(PRUNED) and is_reduced(previous)
    hidden = {entry.client for base, entry in sent if is_hidden(base.workspace, entry.client)}
    for base in {base.number: base for base, _ in sent}.values():
        clients = [entry.client for each, entry in sent if each.number == base.number and entry.client not in hidden]
        if base.has(PRUNED) and is_reduced(base):
            is_pruned = True
            missing |= {(base.number, client) for client in clients}
        else:
            missing |= {(base.number, client) for client in gone_updates(base, clients)}
    if not hidden and not missing and not is_pruned:
        return True
    result.num_hidden += len(hidden)
    result.num_pruned += is_pruned and not hidden
    for base, entry in sent:
        if entry.client in hidden:
            continue
        if (base.number, entry.client) in missing:
            check_record(base, entry, result, is_pruned=base.has(PRUNED) and is_reduced(base))
        else:
            check_counted(base, entry, result)
    return False


def _is_same(
    current: Round, aggregation: Aggregation, again: Aggregation, known: Mapping[int, Round], result: Verification
) -> bool:
    """Return whether the very updates were counted again, and tell where what is recorded of them is not theirs."""
    result.num_updates += len(again.counted)
    hashes = {(base_of(current, entry), entry.client): entry.update for entry in aggregation.counted}
    found = {(base_of(current, entry), entry.client): entry.update for entry in again.counted}
    refused = {(base_of(current, entry), entry.client): entry for entry in again.refused}
    for place, digest in hashes.items():
        problem = None
        if place in refused:
            problem = no_longer_valid(refused[place])
        elif place not in found:
            problem = "was counted, and has gone meanwhile"
        elif found[place] != digest:
            problem = ANOTHER
        if problem is not None:
            result.report(current.workspace.update(*place), problem)
    if found != hashes:
        return False
    if not all(map(is_same_record, again.counted, aggregation.counted)):
        result.report(current.folder, "records other weights, steps, losses or norms than the counted updates give")
    return True
