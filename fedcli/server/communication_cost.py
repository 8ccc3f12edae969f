"""What a federation has communicated, and which algorithms merged it: running totals that every manifest carries on."""

from collections.abc import Iterable, Mapping, Sequence

from fedcli.config import FederationConfig, algorithm_from
from fedcli.quantities import describe_bytes, plural
from fedcli.workspace.encoded_differences import differences_size, numbers_sent
from fedcli.workspace.layout import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAME,
    BASE_DELTA_CONFIG_NAME,
    BASE_DELTA_NAME,
    DELTA_NAME,
    adapter_name,
)
from fedcli.workspace.records import AlgorithmRun, Cost, Manifest, TensorEntry
from fedcli.workspace.tensors import encoded_size


def cost_of(manifest: Manifest, previous: Manifest | None) -> Cost:
    """Count what is communicated in a round, and add up what was in all rounds before it.

    Raises IntegrityError where this version does not know the round's algorithm.
    """
    algorithm = algorithm_from(manifest.algorithm)
    read = {DELTA_NAME if DELTA_NAME in manifest.files else ADAPTER_NAME, ADAPTER_CONFIG_NAME}
    read |= {BASE_DELTA_NAME, BASE_DELTA_CONFIG_NAME}
    read |= {algorithm.state_file} if algorithm.clients_read_state else set()
    if manifest.clusters is not None and manifest.clusters.of is None:  # a client compares all of them
        read |= {*map(adapter_name, range(manifest.num_clusters))}
    tensors, sent = manifest.sent_tensors, _sent(manifest, previous)
    num_plain = len(manifest.update_files) - 1  # beside the adapter, which alone is encoded
    down = up = 0
    if manifest.aggregation is not None and previous is not None and previous.cost is not None:
        merge = manifest.aggregation
        num_readers = len(merge.counted) + len(merge.refused) + len(merge.surplus)
        down = previous.cost.total_bytes_down + num_readers * previous.cost.client_bytes_down
        up = previous.cost.total_bytes_up + sum(entry.bytes or 0 for entry in merge.counted)
    return Cost(
        base_parameters=manifest.model.num_parameters,
        trainable_parameters=numbers_sent(manifest.tensors, None),
        communicated_parameters=_mean(numbers_sent(each, manifest.encoding) for each in sent)
        + num_plain * numbers_sent(tensors, None),
        client_bytes_down=sum(entry.bytes for name, entry in manifest.files.items() if name in read),
        client_bytes_up=_bytes_up(manifest, sent, num_plain),
        total_bytes_down=down,
        total_bytes_up=up,
    )


def expected_bytes(manifest: Manifest, federation: FederationConfig) -> int | None:
    """Return what all rounds together move, both ways: those so far, and the rest as a client moves in the latest.

    It is an upper bound where more clients are drawn than count. None for rounds without a record of their cost.
    """
    cost = manifest.cost
    if cost is None:
        return None
    each = federation.cohort_size * (cost.client_bytes_down + cost.client_bytes_up)
    return cost.total_bytes_down + cost.total_bytes_up + max(federation.rounds - manifest.round, 0) * each


def describe_budget(manifest: Manifest, federation: FederationConfig) -> tuple[bool, str, str] | None:
    """Return whether all rounds keep within federation.budget, how much they move, and what lowers it.

    None without a budget, or without a record of costs.
    """
    expected = expected_bytes(manifest, federation)
    if federation.budget is None or expected is None:
        return None
    told = (
        f"{plural(federation.rounds, 'round')} of {plural(federation.cohort_size, 'client')} move "
        f"{describe_bytes(expected)} in all, federation.budget is {describe_bytes(federation.budget)}"
    )
    return expected <= federation.budget, told, "Lower adapter.rank, federation.rounds or federation.per_round."


def history_of(manifest: Manifest, previous: Manifest | None) -> list[AlgorithmRun]:
    """Return which algorithm merged which rounds, one entry for each change."""
    if manifest.aggregation is None or previous is None:
        return []
    history = previous.history
    if history and history[-1].algorithm == manifest.aggregation.algorithm:
        return history
    return [*history, AlgorithmRun(round=previous.round, algorithm=manifest.aggregation.algorithm)]


def _sent(manifest: Manifest, previous: Manifest | None) -> list[dict[str, TensorEntry]]:
    """Return what each client of the cohort sends, where their ranks differ; else what all of them send, once."""
    if manifest.lora is None or manifest.lora.ranks is None:
        return [manifest.sent_tensors]
    clients = manifest.cohort or ([] if previous is None else previous.cohort)
    return [manifest.sent_by(client) for client in clients] or [manifest.sent_tensors]


def _mean(numbers: Iterable[int]) -> int:
    found = [*numbers]
    return round(sum(found) / len(found))


def _bytes_up(manifest: Manifest, sent: Sequence[Mapping[str, TensorEntry]], num_plain: int) -> int:
    """Return the bytes that a client sends in the mean: masked, eight a number, and its weight with them."""
    if manifest.secure_aggregation is None:
        encoding = manifest.encoding
        adapter = _mean(encoded_size(each) if encoding is None else differences_size(each, encoding) for each in sent)
        return adapter + num_plain * encoded_size(manifest.sent_tensors)
    from fedcli.workspace.secure_records import masked_header, num_masked

    return len(masked_header(manifest)) + 8 * num_masked(manifest)
