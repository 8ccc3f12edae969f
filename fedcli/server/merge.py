"""Merging a round's updates: two are read and checked at once, then both threads sum each; no more are in memory."""

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import TypeAlias

import numpy as np

from fedcli.algos import Algorithm, Array, Arrays, MergedUpdates
from fedcli.algos.algorithm import NextStep
from fedcli.algos.reducer import Reducer, Stacks
from fedcli.algos.share import without_unsent
from fedcli.errors import ConfigError, IntegrityError
from fedcli.observer import Observer
from fedcli.workspace.history import Round
from fedcli.workspace.inbox import Authenticate, StoredFile, Update, check_rows, read_update
from fedcli.workspace.layout import ADAPTER_FILE, ADAPTER_NAME, BASE_DELTA_CONFIG_NAME, BASE_DELTA_NAME, adapter_name
from fedcli.workspace.merge_records import Aggregation, CountedUpdate, RefusedUpdate
from fedcli.workspace.records import UpdateRecord
from fedcli.workspace.refusal import Arriving, Refusal
from fedcli.workspace.tensors import encode

Merged: TypeAlias = "tuple[dict[str, bytes] | None, Aggregation]"
"""The next round's files, None without a valid update, and the record of the merge."""


@dataclass(frozen=True)
class MergeInputs:
    """What every way of merging gets: a round, the clients whose updates it reads, and who looks at them."""

    base: Round
    algorithm: Algorithm
    num_clients: int
    """Of the federation, who have not left."""
    order: Sequence[int]
    """In which updates are read and added up."""
    count: int
    """How many valid ones are enough."""
    observer: Observer
    recorded: Mapping[int, CountedUpdate] | None = None
    """What a manifest says of each counted update, where a round that was merged is computed again."""
    authenticate: Authenticate | None = None
    """Raises Refusal for an update that its client has not signed."""

    @property
    def is_again(self) -> bool:
        """Whether a round that was merged is computed again: nothing is awaited then, and rows are not asked for."""
        return self.recorded is not None

    def file_reducers(self) -> dict[str, Reducer]:
        """Return what merges the files that the algorithm's clients send beside their adapters."""
        return {name: self.algorithm.file_reducer(self.num_clients) for name in self.algorithm.update_files}


def combine(inputs: MergeInputs) -> Merged:
    """Read the updates of a round's clients in their order, until enough are valid, and merge them in this order.

    The merged files are the adapter and the algorithm's state. An update of which a file is not there yet is missing,
    and refused where the round is computed again. Raises IntegrityError where they would not be finite, ConfigError
    where the algorithm gives no usable weight.
    """
    base, algorithm = inputs.base, inputs.algorithm
    merge = Merge(base, algorithm, algorithm.reducer(), inputs.file_reducers())
    read_all(inputs, merge)
    aggregation = merge.aggregation()
    if not merge.counted:
        return None, aggregation
    with np.errstate(over="ignore", invalid="ignore"):  # the result is checked instead
        following, state = next_step(base, algorithm, merge.adapter, merge.result())
    check_finite(base, following, state, merge.magnitudes)
    return files_of(algorithm, following, state), aggregation


def next_step(base: Round, algorithm: Algorithm, adapter: Arrays, merged: MergedUpdates) -> NextStep:
    """Return the algorithm's next adapter and state; what aggregation.share kept out of updates stays as it is."""
    before, unshared = base.state(algorithm), base.manifest.unshared_tensors
    found = algorithm.apply(adapter, merged, before)
    return without_unsent(algorithm, found, unshared, adapter, before) if unshared else found


def files_of(algorithm: Algorithm, adapter: Arrays, state: Arrays) -> dict[str, bytes]:
    """Return the files of a round with this adapter and state."""
    files = {ADAPTER_NAME: encode(adapter)}
    if state:
        files[algorithm.state_file] = encode(state)
    return files


def unchanged_files(base: Round, algorithm: Algorithm) -> dict[str, bytes]:
    """Return the files of the round behind one that ends without an update: the same adapter, the same state."""
    names = [
        *map(adapter_name, range(base.manifest.num_clusters)),
        *([algorithm.state_file] if base.state(algorithm) else []),
    ]
    return {name: base.read(name) for name in names} | delta_files(base)


def delta_files(base: Round) -> dict[str, bytes]:
    """Return base_delta/ as it is in a round: it stays so unless a merge changes it."""
    names = (BASE_DELTA_NAME, BASE_DELTA_CONFIG_NAME)
    return {name: base.read(name) for name in names if name in base.manifest.files}


def weight_of(base: Round, algorithm: Algorithm, client: int, record: UpdateRecord) -> float:
    """Return an update's weight before normalisation; raise ConfigError where it is no finite number above 0."""
    weight = base.weight(algorithm, record.num_samples)
    if not 0 < weight < math.inf:
        raise ConfigError(
            f"the algorithm {algorithm.name} gives client {client}'s update the weight {weight}",
            hint="A weight is a finite number above 0. Mend the algorithm, or choose another with --algo.",
        )
    return weight


def told_steps(base: Round, record: UpdateRecord, by_steps: bool = False) -> int | None:
    """Return the steps that the manifest tells of an update: where they weigh, or may differ."""
    return record.steps if by_steps or base.manifest.train.is_uneven else None


@dataclass
class Merge:
    """What is kept of the updates that were read."""

    base: Round
    algorithm: Algorithm
    differences: Reducer
    files: dict[str, Reducer]
    """What merges the files that the algorithm's clients send beside their adapters."""
    magnitudes: dict[int, float] = field(default_factory=dict)
    """The largest norm of an update's files, by client."""
    stored: list[dict[str, StoredFile]] = field(default_factory=list)
    counted: list[CountedUpdate] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    """Theirs, before normalisation."""
    refused: list[RefusedUpdate] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    surplus: list[int] = field(default_factory=list)

    @cached_property
    def adapter(self) -> Arrays:
        """The round's global adapter."""
        return self.base.adapter()

    @property
    def reads_again(self) -> bool:
        """Whether a reducer reads the updates again."""
        return any(reducer.reads_again for reducer in (self.differences, *self.files.values()))

    def add(self, client: int, update: Update) -> None:
        """Count one client's update."""
        weight = weight_of(self.base, self.algorithm, client, update.record)
        factor = self.factor_of(update)
        origin = update.origin(self.origin_of(update))
        delta_norm = self.differences.add(update.files[ADAPTER_FILE], weight * factor, origin)
        norms = [reducer.add(update.files[name], 1.0) for name, reducer in self.files.items()]
        self.magnitudes[client] = max(delta_norm, *norms, 0.0)
        self.note(client, update, weight, delta_norm)

    def origin_of(self, update: Update) -> Arrays:
        """Return the adapter that an update was made from."""
        return self.adapter

    def factor_of(self, update: Update) -> float:
        """Return what an update's difference is multiplied by beside its weight."""
        return 1.0

    def note(self, client: int, update: Update, weight: float, delta_norm: float) -> None:
        """Keep what the manifest will say of an update."""
        self.stored.append(update.stored)
        self.weights.append(weight)
        self.counted.append(
            CountedUpdate(
                client=client,
                update=update.sha256,
                weight=weight,
                num_samples=update.record.num_samples,
                train_loss=update.record.train_loss,
                delta_norm=delta_norm,
                bytes=update.num_bytes,
                privacy=update.record.privacy,
                steps=told_steps(self.base, update.record),
            )
        )

    def result(self) -> MergedUpdates:
        """Return the counted updates together, zero where they carry nothing."""
        zeros = {name: np.broadcast_to(np.float32(0), array.shape) for name, array in self.adapter.items()}
        return MergedUpdates(
            zeros | self._reduce(self.differences, ADAPTER_FILE, self.adapter),
            {name: zeros | self._reduce(reducer, name, None) for name, reducer in self.files.items()},
        )

    def _reduce(self, reducer: Reducer, name: str, origin: "Arrays | None") -> "dict[str, Array]":
        members = [stored[name].filling(origin) for stored in self.stored if stored]
        shapes = {tensor: entry.shape for tensor, entry in self.base.manifest.sent_tensors.items()}
        return reducer.result(Stacks(shapes, members))

    def aggregation(self) -> Aggregation:
        """Return the record of the merge, every list sorted by client; weights add up to 1."""
        total = 0.0
        for weight in self.weights:
            total += weight
        shares = [
            entry.model_copy(update={"weight": weight / total})
            for entry, weight in zip(self.counted, self.weights, strict=True)
        ]
        return Aggregation(
            algorithm=asdict(self.algorithm),
            counted=sorted(shares, key=lambda entry: entry.client),
            refused=sorted(self.refused, key=lambda entry: entry.client),
            missing=sorted(self.missing),
            surplus=sorted(self.surplus),
        )


def read_all(inputs: MergeInputs, merge: Merge) -> None:
    """Count the first valid updates, as many as are enough; note who was refused, is missing, or came beyond them."""
    base, num_read = inputs.base, 0
    for client, reading in read_pairs(base, inputs.order, merge.reads_again, inputs.authenticate):
        num_read += 1
        _ = merge.adapter  # is read while the threads read the first updates
        try:
            if (update := reading.result()) is None:
                merge.missing.append(client)
            else:
                if not inputs.is_again:  # what was counted once stays: a party may register fewer rows later
                    check_rows(base, client, update)
                merge.add(client, update)
        except Refusal as refusal:
            if isinstance(refusal, Arriving) and not inputs.is_again:
                merge.missing.append(client)
                continue
            merge.refused.append(RefusedUpdate.of(client, refusal))
        inputs.observer.update_read(base.number, client)
        if len(merge.counted) == inputs.count:
            break
    for client in inputs.order[num_read:]:
        (merge.surplus if base.has_update(client) else merge.missing).append(client)


def read_pairs(
    base: Round, clients: Sequence[int], reads_again: bool = False, authenticate: Authenticate | None = None
) -> "Iterator[tuple[int, Future[Update | None]]]":
    """Yield each client with its update, while a thread reads the other of a pair; a pair's memory is the next one's.

    Reading, hashing and numpy's arithmetic all let other threads run.
    """
    memory: tuple[dict[str, memoryview], ...] = ({}, {})
    with ThreadPoolExecutor(2) as readers:
        read = partial(read_update, base, reads_again=reads_again, authenticate=authenticate)
        for begin in range(0, len(clients), 2):
            pair = zip(clients[begin : begin + 2], memory, strict=False)  # the last may be alone
            readings = [(client, readers.submit(read, client, buffers)) for client, buffers in pair]
            yield from readings


def check_finite(base: Round, adapter: Arrays, state: Arrays, magnitudes: dict[int, float]) -> None:
    """Raise IntegrityError where finite updates add up to what float32 cannot hold."""
    if all(np.isfinite(array).all() for arrays in (adapter, state) for array in arrays.values()):
        return
    client, magnitude = max(magnitudes.items(), key=lambda item: item[1])
    raise IntegrityError(
        f"the updates of round {base.number} are too large for float32: the largest is client {client}'s, "
        f"of norm {magnitude:.3g}",
        hint=f"Set it aside with `fedcli server discard --id {client}`.",
    )
