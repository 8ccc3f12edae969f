"""The sum of a round's masked updates, and the next round that follows from it; `verify` computes it again."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fedcli.algos import Algorithm, Array, MergedUpdates
from fedcli.algos.reducer import WeightedMean
from fedcli.errors import ConfigError, IntegrityError
from fedcli.observer import Observer
from fedcli.secure_aggregation.agreement import commitment
from fedcli.secure_aggregation.fixed_point import LARGEST, from_ring_in_place
from fedcli.secure_aggregation.party import SELF
from fedcli.secure_aggregation.summation import disagreements, recover, unmask
from fedcli.secure_aggregation.terms import Terms
from fedcli.server.merge import files_of, next_step
from fedcli.workspace.history import Round
from fedcli.workspace.inbox import Authenticate
from fedcli.workspace.layout import ADAPTER_FILE
from fedcli.workspace.merge_records import Aggregation, CountedUpdate, RefusedUpdate
from fedcli.workspace.privacy_records import SecureSum
from fedcli.workspace.refusal import Arriving, Refusal
from fedcli.workspace.registrations import read_registration
from fedcli.workspace.secure_files import Masked, Stored, read_masked
from fedcli.workspace.secure_records import WEIGHT, AnswerRecord, MaskedUpdate, RepairRecord, masked_schema, num_masked

if TYPE_CHECKING:
    from fedcli.secure_aggregation.fixed_point import Ring

_ABANDON = "`fedcli server aggregate --abandon` ends the round without its updates."


@dataclass
class Reading:
    """What was read of the masked updates of a round's clients, and their sum."""

    base: Round
    total: "Ring"
    counted: list[CountedUpdate] = field(default_factory=list)
    records: dict[int, MaskedUpdate] = field(default_factory=dict)
    shares: dict[int, Mapping[str, Mapping[str, str]]] = field(default_factory=dict)
    refused: list[RefusedUpdate] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)

    @property
    def clients(self) -> list[int]:
        """Those whose updates are in the sum."""
        return sorted(self.records)

    def add(self, client: int, masked: Masked) -> None:
        """Take a client's update into the sum."""
        masked.add_to(self.total)
        self.records[client] = masked.record
        self.shares[client] = {} if masked.shares is None else masked.shares.sealed
        self.counted.append(
            CountedUpdate(
                client=client,
                update=masked.sha256,
                weight=None,
                num_samples=None,
                train_loss=None,
                delta_norm=None,
                bytes=masked.num_bytes,
                privacy=masked.record.privacy,
            )
        )


def read_all(base: Round, clients: list[int], started: str, authenticate: Authenticate, observer: Observer) -> Reading:
    """Read the masked updates of some clients, and add up those that are valid."""
    reading = Reading(base, np.zeros(num_masked(base.manifest), np.uint64))
    buffers: dict[str, memoryview] = {}
    for client in clients:
        try:
            masked = read_masked(base, client, started, authenticate, buffers)
            if masked is None:
                reading.missing.append(client)
                continue
            reading.add(client, masked)
        except Arriving:
            reading.missing.append(client)
        except Refusal as refusal:
            reading.refused.append(RefusedUpdate.of(client, refusal))
        observer.update_read(base.number, client)
    return reading


def check_agreement(reading: Reading) -> None:
    """Raise IntegrityError where two counted clients do not share a mask: their sum would be noise."""
    odd = disagreements({client: record.commitments for client, record in reading.records.items()})
    if odd:
        pairs = ", ".join(f"{low} and {high}" for low, high in odd[:5])
        raise IntegrityError(
            f"the masks of clients {pairs} do not cancel: one of each pair has other keys than it is enrolled under",
            hint=f"Ask both parties, and revoke who is at fault (`fedcli server revoke --id N`). {_ABANDON}",
        )


@dataclass(frozen=True)
class Revelation:
    """What the answers to a repair give; `lacking` are the counted clients of whose masks too little is known."""

    seeds: dict[tuple[int, int], bytes]
    own: dict[int, bytes]
    lacking: list[int]


def reveal(
    terms: Terms,
    repair: RepairRecord,
    commitments: Mapping[int, Mapping[str, str]],
    answers: Mapping[int, AnswerRecord],
) -> Revelation:
    """Return the secrets of what is left of masks in a sum, each checked against what its client committed to."""
    seeds: dict[tuple[int, int], bytes] = {}
    own: dict[int, bytes] = {}
    lacking = []
    for client in repair.clients:
        found: dict[str, bytes | None] = {}
        for name in [*map(str, repair.dropped), *([SELF] if terms.mode == "double" else [])]:
            committed = commitments[client].get(name, "")
            if terms.mode == "double":
                parts = {holder: _share(answer, client, name) for holder, answer in answers.items()}
                shares = {holder: part for holder, part in parts.items() if len(part) == 64}
                found[name] = recover(shares, terms.fewest, committed)
            elif client in answers:
                seed = bytes.fromhex(answers[client].seeds.get(name, ""))
                found[name] = seed if len(seed) == 32 and commitment(seed) == committed else None
            else:
                found[name] = None
        if None in found.values():
            lacking.append(client)
        seeds |= {(client, int(name)): seed for name, seed in found.items() if name != SELF and seed is not None}
        if (secret := found.get(SELF)) is not None:
            own[client] = secret
    return Revelation(seeds, own, lacking)


def _share(answer: AnswerRecord, client: int, name: str) -> bytes:
    return bytes.fromhex(answer.shares.get(str(client), {}).get(name, ""))


def finish(
    reading: Reading,
    terms: Terms,
    algorithm: Algorithm,
    num_clients: int,
    started: str,
    repair: Stored[RepairRecord] | None = None,
    revelation: Revelation | None = None,
    answers: Mapping[int, str] | None = None,
    *,
    is_again: bool = False,
) -> tuple[dict[str, bytes], Aggregation]:
    """Take what is left of masks out of a sum, and return the next round's files with the record of the merge.

    Where it `is_again`, what parties register by now says nothing of the sum.
    Raises IntegrityError where the sum is none of such updates.
    """
    base = reading.base
    if revelation is not None:
        unmask(reading.total, revelation.seeds, revelation.own)
    arrays, weight = _arrays(reading)
    if not is_again:
        _check_sum(reading, algorithm, arrays, weight)
    elif weight <= 0:
        raise IntegrityError(f"the weights of round {base.number} add up to {weight:g}", hint=_ABANDON)
    adapter = base.adapter()
    for file, found in arrays.items():
        for array in found.values():
            np.divide(array, weight if file == ADAPTER_FILE else num_clients, out=array)
    differences = arrays.pop(ADAPTER_FILE)
    zeros = {name: np.broadcast_to(np.float64(0), array.shape) for name, array in adapter.items()}
    merged = MergedUpdates(zeros | differences, {file: zeros | found for file, found in arrays.items()})
    with np.errstate(over="ignore", invalid="ignore"):
        following, state = next_step(base, algorithm, adapter, merged)
    if not all(np.isfinite(array).all() for found in (following, state) for array in found.values()):
        raise IntegrityError(f"the sum of round {base.number} is too large for float32", hint=_ABANDON)
    accounted = {*reading.clients, *(entry.client for entry in reading.refused)}
    aggregation = Aggregation(
        algorithm=asdict(algorithm),
        counted=sorted(reading.counted, key=lambda entry: entry.client),
        refused=sorted(reading.refused, key=lambda entry: entry.client),
        missing=[client for client in base.manifest.cohort if client not in accounted],
        secure=SecureSum(
            mode=terms.mode,
            attempt=started,
            repair=None if repair is None else repair.sha256,
            answers={str(client): digest for client, digest in sorted((answers or {}).items())},
            weight=weight,
        ),
    )
    return files_of(algorithm, following, state), aggregation


def _arrays(reading: Reading) -> "tuple[dict[str, dict[str, Array]], float]":
    """Return the sums by file and tensor, in the memory of the vector's sum, and the sum of the weights."""
    found: dict[str, dict[str, Array]] = {file: {} for file in reading.base.manifest.update_files}
    begin, weight = 0, math.nan
    numbers = from_ring_in_place(reading.total)
    for key, entry in masked_schema(reading.base.manifest).items():
        size = math.prod(entry.shape)
        array = numbers[begin : begin + size].reshape(entry.shape)
        begin += size
        if key == WEIGHT:
            weight = float(array[0])
        else:
            file, _, name = key.partition("/")
            found[file][name] = array
    return found, weight


def _check_sum(
    reading: Reading, algorithm: Algorithm, arrays: "Mapping[str, Mapping[str, Array]]", weight: float
) -> None:
    """Raise IntegrityError where a sum is none of updates of these parties: then masks are left in it, or worse."""
    base, clients = reading.base, reading.clients
    least = most = 0.0
    for client in clients:
        registration = read_registration(base.workspace, client)
        rows = None if registration is None else registration.data.num_rows
        ends = sorted(base.weight(algorithm, number) for number in (1, max(1, int(LARGEST) if rows is None else rows)))
        least, most = least + ends[0], most + ends[1]
    problem = None
    if not least * (1 - 1e-9) <= weight <= most * (1 + 1e-9):
        problem = f"its weights add up to {weight:.6g}, and what its parties registered gives {least:g} to {most:g}"
    elif any(
        np.abs(array).max(initial=0) > len(clients) * LARGEST for found in arrays.values() for array in found.values()
    ):
        problem = f"it has numbers beyond {len(clients) * LARGEST:,.0f}"
    if problem is not None:
        raise IntegrityError(
            f"the sum of round {base.number} is none of updates: {problem}. Masks are left in it, or somebody sent "
            "something else",
            hint=f"Nobody can tell who it was: ask the parties. {_ABANDON}",
        )


def check_algorithm(base: Round, algorithm: Algorithm, own: Algorithm) -> None:
    """Raise ConfigError where an algorithm cannot be used on a sum of masked updates."""
    problem = None
    if type(algorithm.reducer()) is not WeightedMean:
        problem = f"the algorithm {algorithm.name} merges in a way of its own, and masked updates can only be summed"
    elif type(algorithm).weight is not type(own).weight:
        problem = f"--algo {algorithm.name} weighs updates differently than {own.name}, as which they were masked"
    if problem is not None:
        raise ConfigError(problem, hint="Choose another algorithm, or set privacy.secure_aggregation to off.")
