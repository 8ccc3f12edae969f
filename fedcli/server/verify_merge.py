"""Rounds merged again by `fedcli verify`: their counted updates give the adapter and the state that are stored."""

from collections.abc import Mapping, Sequence

from fedcli.config import algorithm_from, lora_from, rule_from
from fedcli.errors import FedError
from fedcli.observer import Observer
from fedcli.server.merge import MergeInputs, unchanged_files
from fedcli.server.merge_round import merge_round
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
from fedcli.server.verify_privacy import is_same_noise, noise_again
from fedcli.server.verify_relay import is_beginning
from fedcli.server.verify_signatures import check_of_merge, gone_clients
from fedcli.server.verify_unequal import is_unequal, recompute_unequal
from fedcli.workspace.history import Round, is_hidden, prunable
from fedcli.workspace.layout import PRUNED
from fedcli.workspace.merge_records import Aggregation, CountedUpdate
from fedcli.workspace.records import file_entry


def recompute(
    current: Round,
    aggregation: Aggregation,
    previous: Round,
    rounds: Sequence[Round],
    num_clients: int,
    keys: Mapping[str, bytes],
    result: Verification,
) -> None:
    """The counted updates still lie in the inbox, and give this round's adapter and state, byte for byte."""
    entries = {entry.client: entry for entry in aggregation.counted}
    if not entries and is_beginning(current, previous):
        return  # no update made it, but a parent's round
    files: Mapping[str, bytes] | None = None
    try:
        if entries and (previous.manifest.secure_aggregation is not None or aggregation.secure is not None):
            from fedcli.server.verify_masked import recompute_masked  # of no other federation: it needs cryptography

            files = recompute_masked(current, aggregation, previous, num_clients, result)
        elif entries and is_unequal(previous, aggregation):
            files = recompute_unequal(current, aggregation, previous, rounds, num_clients, result)
        elif _are_readable(previous, entries, result):
            if entries:
                _merge_again(current, aggregation, previous, num_clients, keys, result)
            else:
                files = unchanged_files(previous, algorithm_from(aggregation.algorithm))
        if files is not None:
            _check_merged(current, files, result)
    except FedError as error:
        if isinstance(error.__cause__, OSError):
            raise
        result.report(current.folder, f"cannot be computed again: {error}")


def _are_readable(previous: Round, entries: Mapping[int, CountedUpdate], result: Verification) -> bool:
    """Return whether all counted updates may be read and are there; else check those that are one by one."""
    hidden = [client for client in entries if is_hidden(previous.workspace, client)]
    seen = sorted(entries.keys() - {*hidden})
    if previous.has(PRUNED) and is_reduced(previous):
        result.num_hidden += len(hidden)
        result.num_pruned += not hidden
        for client in seen:
            check_record(previous, entries[client], result, is_pruned=True)
        return False
    gone = gone_updates(previous, seen)
    if hidden or gone:  # of other users, whom the server can check and this user cannot; or deleted by their clients
        result.num_hidden += len(hidden)
        for client in seen:
            (check_record if client in gone else check_counted)(previous, entries[client], result)
    return not (hidden or gone)


def _merge_again(
    current: Round,
    aggregation: Aggregation,
    previous: Round,
    num_clients: int,
    keys: Mapping[str, bytes],
    result: Verification,
) -> None:
    """Merge a round's own updates again, and compare; raise FedError where the merge does."""
    entries = {entry.client: entry for entry in aggregation.counted}
    order = [client for client in previous.draw_order if client in entries]
    algorithm = algorithm_from(aggregation.algorithm)
    if not {*algorithm.update_files} <= {*previous.manifest.update_files}:
        result.report(current.folder, f"was merged with {algorithm.name}, for which no client sent anything")
        return
    num_clients -= len(gone_clients(current))
    inputs = MergeInputs(
        previous,
        algorithm,
        num_clients,
        order,
        len(order),
        Observer(),
        recorded=entries,
        authenticate=check_of_merge(current, previous),
    )
    files, again = merge_round(
        rule_from(aggregation.rule),
        inputs,
        noise=noise_again(aggregation, keys),
        lora=lora_from(None if aggregation.lora is None else aggregation.lora.settings()),
    )
    result.num_updates += len(again.counted)
    lost = [(client, "was counted, and has gone meanwhile") for client in again.missing]
    lost += [(refused.client, no_longer_valid(refused)) for refused in again.refused]
    lost += [(entry.client, ANOTHER) for entry in again.counted if entry.update != entries[entry.client].update]
    for client, problem in lost:
        result.report(current.workspace.update(previous.number, client), problem)
    if lost or len(again.counted) != len(aggregation.counted):
        return
    if not all(map(is_same_record, again.counted, aggregation.counted)):
        result.report(current.folder, "records other weights, losses or norms than the counted updates give")
    if (aggregation.lora is None) != (again.lora is None):
        result.report(current.folder, "does not tell how products of factors were merged, or tells it for nothing")
    elif files is None:
        result.noisy_rounds.append(current.number)
    elif again.lora is not None:
        from fedcli.server.verify_lora import check_products  # other rounds are compared byte for byte

        check_products(current, again.lora, files, result)
    else:
        if again.splits != aggregation.splits:
            result.report(current.folder, "splits other clusters than the counted updates do")
        if again.privacy is not None and not is_same_noise(again.privacy, aggregation.privacy):
            result.report(current.folder, "records another noise than the counted updates and the key give")
        _check_merged(current, files, result)


def _check_merged(current: Round, files: Mapping[str, bytes], result: Verification) -> None:
    """The round's adapter and state are the ones that were computed again."""
    result.num_recomputed += 1
    stored = prunable(current.manifest)
    for name in sorted(stored.keys() | files.keys()):
        if stored.get(name) != (file_entry(files[name]) if name in files else None):
            result.report(current.folder / name, "is not what the counted updates give")
