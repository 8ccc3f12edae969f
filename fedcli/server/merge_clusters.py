"""Merging a round of several adapters: each from the updates made from it; a cluster that splits gives two."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from fedcli.algos.clusters import bipartition, disagreement
from fedcli.observer import Observer
from fedcli.server.merge import Merged, MergeInputs, combine
from fedcli.server.merge_by_rule import Survey
from fedcli.workspace.cluster_records import Split
from fedcli.workspace.history import Round
from fedcli.workspace.inbox import ChangedUpdate, look_at_update
from fedcli.workspace.layout import ADAPTER_FILE, ADAPTER_NAME, adapter_name
from fedcli.workspace.merge_records import Aggregation
from fedcli.workspace.refusal import Refusal


def combine_clusters(inputs: MergeInputs) -> Merged:
    """Merge the updates of each cluster as `merge.combine` does; a cluster without a valid one keeps its adapter.

    Returns the next round's files and the record of all clusters together. Raises what `combine` does.
    """
    base = inputs.base
    members, hashes = _members(base, inputs.order)
    files = {name: base.read(name) for name in map(adapter_name, range(base.manifest.num_clusters))}
    merges, splits = [], []
    for cluster, clients in enumerate(members):
        slot, of_cluster = cluster, replace(inputs, base=base.of_cluster(cluster), order=clients, count=len(clients))
        for number, part in enumerate(_parts(of_cluster, len(files))):
            if number:
                slot = len(files)
                splits.append(Split(cluster=cluster, into=slot, clients=sorted(part)))
                files[adapter_name(slot)] = files[adapter_name(cluster)]
            found, merge = combine(replace(of_cluster, order=part, count=len(part)))
            for entry in merge.counted:
                if entry.update != hashes.get(entry.client):  # it may be another cluster's now
                    raise ChangedUpdate(entry.client)
            files[adapter_name(slot)] = files[adapter_name(cluster)] if found is None else found[ADAPTER_NAME]
            merges.append((cluster, merge))
    joined = _joined(merges, splits)
    return files if joined.counted else None, joined


def _members(base: Round, order: Sequence[int]) -> tuple[list[list[int]], dict[int, str]]:
    """Return the clients of each cluster, in this order, and the hashes of their updates.

    Whose update cannot be read stands in the first one, where it is refused, or missing.
    """
    clusters, hashes = base.manifest.clusters, {}
    assert clusters is not None
    members: list[list[int]] = [[] for _ in range(clusters.count)]
    for client in order:
        cluster = 0
        with suppress(Refusal):
            if (found := look_at_update(base, client)) is not None:
                hashes[client] = found.sha256
                cluster = clusters.of_client(client, found.record.cluster)
        members[cluster].append(client)
    return members, hashes


def _parts(inputs: MergeInputs, num_adapters: int) -> Iterator[Sequence[int]]:
    """Yield the clients of a cluster together, or in the two parts that it splits into, as its record says."""
    clusters, clients = inputs.base.manifest.clusters, inputs.order
    assert clusters is not None
    if clusters.split_below is None or clusters.most is None or num_adapters >= clusters.most:
        yield clients
        return
    survey = Survey(replace(inputs, observer=Observer()))
    survey.read()
    valid = [submission.client for submission in survey.found]
    if len(valid) < 2:
        yield clients
        return
    products = survey.products[ADAPTER_FILE]
    weights = np.array([submission.record.num_samples for submission in survey.found], float)
    if disagreement(products, weights / weights.sum()) >= clusters.split_below:
        yield clients
        return
    second = [valid[number] for number in bipartition(products)[1]]
    yield [client for client in clients if client not in second]
    yield [client for client in clients if client in second]


def _joined(merges: Sequence[tuple[int, Aggregation]], splits: list[Split]) -> Aggregation:
    """Return the record of all clusters' merges, every list sorted by client."""
    refused = [entry for _, merge in merges for entry in merge.refused]
    counted = [entry.model_copy(update={"cluster": cluster}) for cluster, merge in merges for entry in merge.counted]
    return merges[0][1].model_copy(
        update={
            "counted": sorted(counted, key=lambda entry: entry.client),
            "refused": sorted(refused, key=lambda entry: entry.client),
            "missing": sorted(client for _, merge in merges for client in merge.missing),
            "surplus": sorted(client for _, merge in merges for client in merge.surplus),
            "splits": splits or None,
        }
    )
