"""Merging a round of several adapters: each from the updates made from it; a cluster that splits gives two."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

import numpy as np

from fedcli.algos import Algorithm
from fedcli.algos.clusters import bipartition, disagreement
from fedcli.observer import Observer
from fedcli.server.merge import combine
from fedcli.server.merge_by_rule import Survey
from fedcli.workspace.cluster_records import Split
from fedcli.workspace.history import Round
from fedcli.workspace.inbox import Authenticate, ChangedUpdate, look_at_update
from fedcli.workspace.layout import ADAPTER_FILE, ADAPTER_NAME, adapter_name
from fedcli.workspace.records import Aggregation, CountedUpdate
from fedcli.workspace.refusal import Refusal


def combine_clusters(
    base: Round,
    algorithm: Algorithm,
    num_clients: int,
    order: Sequence[int],
    observer: Observer,
    *,
    recorded: Mapping[int, CountedUpdate] | None = None,
    authenticate: Authenticate | None = None,
) -> tuple[dict[str, bytes] | None, Aggregation]:
    """Merge the updates of each cluster as `merge.combine` does; a cluster without a valid one keeps its adapter.

    Returns the next round's files (None if no update is valid) and the record of all clusters together. `recorded` is
    what a manifest says of each counted update where the round is computed again. Raises what `combine` does.
    """
    members, hashes = _members(base, order)
    files = {name: base.read(name) for name in map(adapter_name, range(base.manifest.num_clusters))}
    merges, splits = [], []
    for cluster, clients in enumerate(members):
        view, slot = base.of_cluster(cluster), cluster
        for number, part in enumerate(_parts(view, clients, len(files), recorded, authenticate)):
            if number:
                slot = len(files)
                splits.append(Split(cluster=cluster, into=slot, clients=sorted(part)))
                files[adapter_name(slot)] = files[adapter_name(cluster)]
            found, merge = combine(
                view,
                algorithm,
                num_clients,
                part,
                len(part),
                observer,
                refuses_incomplete=recorded is not None,
                authenticate=authenticate,
            )
            for entry in merge.counted:
                if entry.update != hashes.get(entry.client):  # it may be another cluster's now
                    raise ChangedUpdate(entry.client)
            files[adapter_name(slot)] = files[adapter_name(cluster)] if found is None else found[ADAPTER_NAME]
            merges.append((cluster, merge))
    joined = _joined(algorithm, merges, splits)
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


def _parts(
    view: Round,
    clients: Sequence[int],
    num_adapters: int,
    recorded: Mapping[int, CountedUpdate] | None,
    authenticate: Authenticate | None,
) -> Iterator[list[int]]:
    """Yield the clients of a cluster together, or in the two parts that it splits into, as its record says."""
    clusters = view.manifest.clusters
    assert clusters is not None
    if clusters.split_below is None or clusters.most is None or num_adapters >= clusters.most:
        yield [*clients]
        return
    survey = Survey(view, Observer(), recorded, authenticate)
    survey.read(clients, len(clients))
    valid = [submission.client for submission in survey.found]
    if len(valid) < 2:
        yield [*clients]
        return
    products = survey.products[ADAPTER_FILE]
    weights = np.array([submission.record.num_samples for submission in survey.found], float)
    if disagreement(products, weights / weights.sum()) >= clusters.split_below:
        yield [*clients]
        return
    second = [valid[number] for number in bipartition(products)[1]]
    yield [client for client in clients if client not in second]
    yield [client for client in clients if client in second]


def _joined(algorithm: Algorithm, merges: Sequence[tuple[int, Aggregation]], splits: list[Split]) -> Aggregation:
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
