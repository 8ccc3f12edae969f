"""Merging a round's updates: one is read and checked while another is summed, and two are in memory at once."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import numpy as np

from fedcli.algos import Algorithm, Arrays, MergedUpdates
from fedcli.algos.arrays import WeightedSum
from fedcli.errors import IntegrityError
from fedcli.observer import Observer
from fedcli.workspace.history import Round, state_file
from fedcli.workspace.inbox import Update, read_update
from fedcli.workspace.layout import ADAPTER_FILE, ADAPTER_NAME, CONTROL_DELTA_FILE
from fedcli.workspace.records import Aggregation, CountedUpdate, RefusedUpdate
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.tensors import encode


def combine(
    base: Round,
    algorithm: Algorithm,
    num_clients: int,
    order: Sequence[int],
    count: int,
    observer: Observer,
) -> tuple[dict[str, bytes] | None, Aggregation]:
    """Read the updates of a round's clients in this order, until `count` are valid, and sum them in this order.

    Returns the next round's merged files (None if no update is valid), which are the adapter and the algorithm's
    state. Raises IntegrityError where they would not be finite.
    """
    adapter = base.adapter()
    sums = _Sums()
    _read_all(base, algorithm, order, count, adapter, sums, observer)
    aggregation = sums.aggregation(algorithm)
    if not sums.counted:
        return None, aggregation
    with np.errstate(over="ignore", invalid="ignore"):  # the result is checked instead
        following, state = algorithm.apply(
            adapter,
            MergedUpdates(sums.differences.over(sums.differences.total_weight), sums.control.over(num_clients)),
            base.state(algorithm),
        )
    _check_finite(base, following, state, sums.magnitudes)
    files = {ADAPTER_NAME: encode(following)}
    if state:
        files[state_file(algorithm)] = encode(state)
    return files, aggregation


@dataclass
class _Sums:
    """What is kept of the updates that were read: the weighted differences, and the changes of control variates."""

    differences: WeightedSum = field(default_factory=WeightedSum)
    control: WeightedSum = field(default_factory=WeightedSum)
    magnitudes: dict[int, float] = field(default_factory=dict)
    """The largest norm of an update's files, by client."""
    counted: list[CountedUpdate] = field(default_factory=list)
    refused: list[RefusedUpdate] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    surplus: list[int] = field(default_factory=list)

    def add(self, client: int, update: Update, algorithm: Algorithm, adapter: Arrays) -> None:
        """Count one client's update."""
        weight = algorithm.weight(update.record.num_samples)
        delta_norm = self.differences.add(update.files[ADAPTER_FILE], weight, origin=adapter)
        self.magnitudes[client] = delta_norm
        if algorithm.uses_control:
            self.magnitudes[client] = max(delta_norm, self.control.add(update.files[CONTROL_DELTA_FILE], 1.0))
        self.counted.append(
            CountedUpdate(
                client=client,
                update=update.sha256,
                weight=weight,
                num_samples=update.record.num_samples,
                train_loss=update.record.train_loss,
                delta_norm=delta_norm,
                bytes=update.num_bytes,
            )
        )

    def aggregation(self, algorithm: Algorithm) -> Aggregation:
        """Return the record of the merge, every list sorted by client; weights add up to 1."""
        total = self.differences.total_weight
        if self.counted and total == 0.0:
            raise ZeroDivisionError("the weights of all updates add up to zero")
        shares = [entry.model_copy(update={"weight": entry.weight / total}) for entry in self.counted]
        return Aggregation(
            algorithm=asdict(algorithm),
            counted=sorted(shares, key=lambda entry: entry.client),
            refused=sorted(self.refused, key=lambda entry: entry.client),
            missing=sorted(self.missing),
            surplus=sorted(self.surplus),
        )


def _read_all(
    base: Round,
    algorithm: Algorithm,
    order: Sequence[int],
    count: int,
    adapter: Arrays,
    sums: _Sums,
    observer: Observer,
) -> None:
    """Count the first `count` valid updates; note who was refused, is missing, or came beyond them."""
    num_read = 0
    for client, reading in _read_ahead(base, order):
        num_read += 1
        try:
            update = reading.result()
        except Refusal as refusal:
            sums.refused.append(RefusedUpdate(client=client, code=refusal.code, reason=refusal.reason))
        else:
            if update is None:
                sums.missing.append(client)
            else:
                sums.add(client, update, algorithm, adapter)
        observer.update_read(base.number, client)
        if len(sums.counted) == count:
            break
    for client in order[num_read:]:
        (sums.surplus if base.has_update(client) else sums.missing).append(client)


def _read_ahead(base: Round, clients: Sequence[int]) -> "Iterator[tuple[int, Future[Update | None]]]":
    """Yield each client with its update, while a thread reads the next; an update lasts until the next is asked for.

    Reading, hashing and numpy's arithmetic all let other threads run.
    """
    memory: tuple[dict[str, memoryview], ...] = ({}, {})
    with ThreadPoolExecutor(1) as reader:
        present = None
        for number, client in enumerate(clients):
            ahead = reader.submit(read_update, base, client, memory[number % 2])
            if present is not None:
                yield present
            present = client, ahead
        if present is not None:
            yield present


def _check_finite(base: Round, adapter: Arrays, state: Arrays, magnitudes: dict[int, float]) -> None:
    """Raise IntegrityError where finite updates add up to what float32 cannot hold."""
    if all(np.isfinite(array).all() for arrays in (adapter, state) for array in arrays.values()):
        return
    client, magnitude = max(magnitudes.items(), key=lambda item: item[1])
    raise IntegrityError(
        f"the updates of round {base.number} are too large for float32: the largest is client {client}'s, "
        f"of norm {magnitude:.3g}",
        hint=f"Set it aside with `fedcli server discard --id {client}`.",
    )
