"""What a federation has communicated, and which algorithms merged it: running totals that every manifest carries on."""

import math

from fedcli.config import algorithm_from
from fedcli.workspace.layout import ADAPTER_CONFIG_NAME, ADAPTER_NAME, adapter_name
from fedcli.workspace.records import AlgorithmRun, Cost, Manifest
from fedcli.workspace.tensors import encoded_size


def cost_of(manifest: Manifest, previous: Manifest | None) -> Cost:
    """Count what is communicated in a round, and add up what was in all rounds before it.

    Raises IntegrityError where this version does not know the round's algorithm.
    """
    num_files = len(manifest.update_files)
    algorithm = algorithm_from(manifest.algorithm)
    read = {ADAPTER_NAME, ADAPTER_CONFIG_NAME} | ({algorithm.state_file} if algorithm.clients_read_state else set())
    if manifest.clusters is not None and manifest.clusters.of is None:  # a client compares all of them
        read |= {*map(adapter_name, range(manifest.num_clusters))}
    trainable, sent = (
        sum(math.prod(entry.shape) for entry in tensors.values())
        for tensors in (manifest.tensors, manifest.sent_tensors)
    )
    down = up = 0
    if manifest.aggregation is not None and previous is not None and previous.cost is not None:
        merge = manifest.aggregation
        num_readers = len(merge.counted) + len(merge.refused) + len(merge.surplus)
        down = previous.cost.total_bytes_down + num_readers * previous.cost.client_bytes_down
        up = previous.cost.total_bytes_up + sum(entry.bytes or 0 for entry in merge.counted)
    return Cost(
        base_parameters=manifest.model.num_parameters,
        trainable_parameters=trainable,
        communicated_parameters=sent * num_files,
        client_bytes_down=sum(entry.bytes for name, entry in manifest.files.items() if name in read),
        client_bytes_up=_bytes_up(manifest, num_files),
        total_bytes_down=down,
        total_bytes_up=up,
    )


def history_of(manifest: Manifest, previous: Manifest | None) -> list[AlgorithmRun]:
    """Return which algorithm merged which rounds, one entry for each change."""
    if manifest.aggregation is None or previous is None:
        return []
    history = previous.history
    if history and history[-1].algorithm == manifest.aggregation.algorithm:
        return history
    return [*history, AlgorithmRun(round=previous.round, algorithm=manifest.aggregation.algorithm)]


def _bytes_up(manifest: Manifest, num_files: int) -> int:
    """Return the bytes that a client sends: masked, eight a number, and its weight with them."""
    if manifest.secure_aggregation is None:
        return num_files * encoded_size(manifest.sent_tensors)
    from fedcli.workspace.secure_records import masked_header, num_masked

    return len(masked_header(manifest)) + 8 * num_masked(manifest)
