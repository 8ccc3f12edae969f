"""Where secure aggregation's records lie: attempts/, repair/, masked updates and answers; nothing of it is trusted."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from pydantic import ValidationError

from fedcli.errors import IntegrityError, UsageError, WorkspaceError
from fedcli.secure_aggregation.fixed_point import Ring
from fedcli.workspace.history import Round, read_checked, read_if_there
from fedcli.workspace.inbox import (
    MAX_SIGNATURE_BYTES,
    MAX_UPDATE_RECORD_BYTES,
    Authenticate,
    check_whole,
    discard_update,
    expected,
    given_up,
    new_buffer,
    opened_drop,
    opened_update,
)
from fedcli.workspace.layout import ATTEMPT, MASKED_FILE, SHARES_FILE, UPDATE_RECORD, update_name
from fedcli.workspace.parsing import is_unchanged, parse_object, parse_record, sha256
from fedcli.workspace.privacy_records import claim_fault
from fedcli.workspace.publish import TEMPORARY_PREFIX
from fedcli.workspace.record import Record
from fedcli.workspace.records import PROTOCOL
from fedcli.workspace.refusal import Arriving, Refusal
from fedcli.workspace.secure_records import (
    ANSWER_RECORD,
    ANSWER_SIGNATURE,
    AnswerRecord,
    AttemptRecord,
    MaskedUpdate,
    RepairRecord,
    RepairShares,
    SharesFile,
    masked_schema,
    num_masked,
)
from fedcli.workspace.store import Folder
from fedcli.workspace.tensors import RING, largest_file, locate

MAX_BYTES = 2**24
"""Of a record of an attempt, a repair or an answer, and of a client's shares."""
MOST_SHARES_BYTES = 2**29
"""Of what a repair gathers of them."""
RecordT = TypeVar("RecordT", bound=Record)


@dataclass(frozen=True)
class Stored(Generic[RecordT]):
    """A record as it lies on disk, with the signature beside it."""

    record: RecordT
    sha256: str
    signature: bytes
    path: Path


def read_attempt(base: Round) -> Stored[AttemptRecord] | None:
    """Read who takes part in a round; None where that is not fixed yet. Raises IntegrityError for another round's."""
    return _read(base, AttemptRecord, base.workspace.attempt(base.number))


def read_repair(base: Round) -> Stored[RepairRecord] | None:
    """Read whose sum of a round may be revealed; None where nobody has asked. Raises IntegrityError as above."""
    return _read(base, RepairRecord, base.workspace.repair_of(base.number))


def _read(base: Round, kind: type[RecordT], path: Path) -> Stored[RecordT] | None:
    contents = read_if_there(base.workspace, path, MAX_BYTES)
    if contents is None:
        return None
    signature = read_if_there(base.workspace, path.with_suffix(".sig"), MAX_SIGNATURE_BYTES)
    return parse_signed(base, kind, path, contents, signature or b"")


def parse_signed(base: Round, kind: type[RecordT], path: Path, contents: bytes, signature: bytes) -> Stored[RecordT]:
    """Return a record of a round as it lies there; raise IntegrityError where it is another round's."""
    record: Any = parse_record(kind, contents, path)
    if (record.workspace, record.round, record.attempt) != (base.manifest.workspace, base.number, ATTEMPT):
        raise IntegrityError(
            f"{path} is of another workspace, round or attempt",
            hint="Ask the server's operator: somebody may have put it there again to learn more than one sum.",
        )
    if record.base != base.sha256:
        raise IntegrityError(f"{path} is of another manifest of round {base.number}", hint="Ask the server's operator.")
    return Stored(record, sha256(contents), signature, path)


Standing = Literal["waiting", "too_late", "due", "already_submitted", "repair_due", "already_answered"]


def standing(base: Round, client: int) -> Standing:
    """Return how a client of the cohort stands in a round; nothing that this rests on has been checked."""
    attempt, repair = read_attempt(base), read_repair(base)
    if attempt is None:
        return "waiting"
    if client not in attempt.record.cohort:
        return "too_late"
    if repair is not None and client in repair.record.dropped:
        is_bare = attempt.record.mode == "pairwise" and base.has_update(client)  # the others reveal its masks
        return "repair_due" if is_bare else "too_late"
    if repair is None:
        return "already_submitted" if base.has_update(client) else "due"
    return "already_answered" if has_answered(base, client) else "repair_due"


def publish_signed(base: Round, path: Path, contents: bytes, signature: bytes) -> bool:
    """Write a record behind its signature, which alone means nothing; return False where another one stands."""
    return base.workspace.store.put_new_signed(base.workspace.name(path), contents, signature)


def put_shares(base: Round, contents: bytes) -> None:
    """Write a repair's sealed shares; the repair that names their hash comes after."""
    path = base.workspace.repair_shares(base.number, sha256(contents))
    base.workspace.store.put(base.workspace.name(path), contents)


def read_shares(base: Round, repair: RepairRecord) -> RepairShares:
    """Read a repair's sealed shares; raise IntegrityError where they are not those that it names."""
    if repair.shares is None:
        raise IntegrityError(f"{base.workspace.repair_of(base.number)} names no shares", hint="Ask the operator.")
    path = base.workspace.repair_shares(base.number, repair.shares.sha256)
    if repair.shares.bytes > MOST_SHARES_BYTES:
        raise IntegrityError(
            f"{path} would have {repair.shares.bytes:,} bytes, and the shares of 128 clients have fewer than "
            f"{MOST_SHARES_BYTES:,}",
            hint="Ask the operator.",
        )
    return parse_record(RepairShares, read_checked(base.workspace, path, repair.shares), path)


def traces(base: Round, client: int) -> list[str]:
    """Return what lies in a client's inbox of an update of the round: sent, set aside, half-written, copied."""
    workspace = base.workspace
    name = update_name(base.number)
    names = workspace.store.names(workspace.name(workspace.client_inbox(client)))
    return [found for found in names if name in found or found.startswith(TEMPORARY_PREFIX)]


def remove_update(base: Round, client: int) -> None:
    """Remove a client's update, and what was set aside of it: nothing of it stays that a later repair would unmask."""
    workspace = base.workspace
    own = workspace.client_inbox(client)
    for name in traces(base, client):
        if not name.startswith(TEMPORARY_PREFIX):
            workspace.store.delete(workspace.name(own / name))


def discard_masked(base: Round, client: int) -> bool:
    """Remove a client's update, which then sends the same once more; return whether there was one.

    Raises UsageError where a repair has been asked for: whose sum may be revealed is fixed. What belongs to another
    user is noted as discarded, and removed by that one.
    """
    if read_repair(base) is not None:
        raise UsageError(
            f"round {base.number} has a repair: whose updates are summed is fixed, and nothing can be set aside",
            hint="`fedcli server aggregate --abandon` ends the round without its updates.",
        )
    try:
        remove_update(base, client)
    except WorkspaceError as error:
        if not isinstance(error.__cause__, PermissionError):
            raise
        return discard_update(base, client)
    return True


def has_answered(base: Round, client: int) -> bool:
    """Return whether something lies where a client's answer to the repair belongs."""
    return base.workspace.store.exists(base.workspace.name(base.workspace.answer(base.number, client)))


def drop_answer(base: Round, client: int, record: bytes, signature: bytes) -> bool:
    """Publish a client's answer; return False where one stands."""
    folder = base.workspace.name(base.workspace.answer(base.number, client))
    return base.workspace.store.publish(folder, [(ANSWER_SIGNATURE, signature)], (ANSWER_RECORD, record))


def read_answer(base: Round, client: int, repair: str) -> tuple[AnswerRecord, bytes, bytes] | None:
    """Read a client's answer to the repair with this hash, its bytes and its signature; None where there is none.

    Raises Refusal where it is another's, or of something else.
    """
    try:
        with opened_drop(base.workspace, client, base.workspace.answer(base.number, client)) as folder:
            contents = folder.read(ANSWER_RECORD, MAX_BYTES)
            signature = folder.read(ANSWER_SIGNATURE, MAX_SIGNATURE_BYTES)
    except FileNotFoundError:
        return None
    return parse_answer(base, client, repair, contents), contents, signature


def parse_answer(base: Round, client: int, repair: str, contents: bytes) -> AnswerRecord:
    """Return a client's answer to the repair with this hash; raise Refusal where it is another's."""
    record = _parse(AnswerRecord, contents, ANSWER_RECORD)
    wanted = (base.manifest.workspace, base.number, ATTEMPT, client, repair)
    if (record.workspace, record.round, record.attempt, record.client, record.repair) != wanted:
        raise Refusal("wrong_round", "the answer is of another workspace, round, client or repair")
    return record


@dataclass(frozen=True)
class Masked:
    """A checked masked update; `parts` are its numbers, each with where it begins among all."""

    record: MaskedUpdate
    sha256: str
    num_bytes: int
    parts: Sequence[tuple[int, Ring]]
    shares: SharesFile | None

    def add_to(self, total: Ring) -> None:
        """Add its numbers to a sum."""
        for begin, numbers in self.parts:
            part = total[begin : begin + numbers.size]
            np.add(part, numbers, out=part)


def read_masked(
    base: Round, client: int, started: str, authenticate: Authenticate, buffers: dict[str, memoryview]
) -> Masked | None:
    """Read and check a client's masked update, of the attempt with this hash; None where there is none.

    Every byte is read once; `buffers` is memory that the next call takes, too. Raises Refusal, Arriving where a file is
    not there yet.
    """
    try:
        with opened_update(base, client) as folder:
            with expected(UPDATE_RECORD):
                contents = folder.read(UPDATE_RECORD, MAX_UPDATE_RECORD_BYTES)
            try:
                return _read_folder(folder, contents, base, client, started, authenticate, buffers)
            except Refusal as refusal:
                refusal.update = sha256(contents)
                raise
    except FileNotFoundError:
        return None
    except Arriving as refusal:
        raise given_up(refusal, base, client) from refusal


def _read_folder(
    folder: Folder,
    contents: bytes,
    base: Round,
    client: int,
    started: str,
    authenticate: Authenticate,
    buffers: dict[str, memoryview],
) -> Masked:
    check_whole(contents)
    record = _parse(MaskedUpdate, contents, UPDATE_RECORD)
    _check_record(record, base, client, started)
    authenticate(client, contents, folder)
    schema = masked_schema(base.manifest)
    limits = {MASKED_FILE: largest_file(schema, 8)}
    if base.manifest.secure_aggregation == "double":
        limits[SHARES_FILE] = MAX_BYTES
    files: dict[str, memoryview] = {}
    for name, limit in limits.items():
        if name not in record.files:
            raise Refusal("json", f"update.json does not list {name}")
        if name not in buffers:
            buffers[name] = new_buffer(limit + 1)
        with expected(name):
            files[name], digest = folder.read_hashed(name, buffers[name])
        if len(files[name]) != record.files[name].bytes:
            problem = f"{name} has {len(files[name])} bytes, update.json says {record.files[name].bytes}"
            is_short = len(files[name]) < record.files[name].bytes <= limit
            raise Arriving("size", problem) if is_short else Refusal("size", problem)
        if digest != record.files[name].sha256:
            raise Refusal("hash", f"{name} does not have the hash that update.json gives")
    shares = _parse(SharesFile, bytes(files[SHARES_FILE]), SHARES_FILE) if SHARES_FILE in files else None
    num_bytes = len(contents) + sum(map(len, files.values()))
    return Masked(record, sha256(contents), num_bytes, [*_parts(files[MASKED_FILE], base)], shares)


def _parts(data: memoryview, base: Round) -> Iterator[tuple[int, Ring]]:
    schema = masked_schema(base.manifest)
    spans, begin = locate(data, schema, dtypes=RING), 0
    for name in schema:
        numbers = np.frombuffer(data[spans[name].start : spans[name].end], "<u8")
        yield begin, numbers
        begin += numbers.size
    assert begin == num_masked(base.manifest)


def _parse(kind: type[RecordT], contents: bytes, name: str) -> RecordT:
    """Read a client's record; raise Refusal(json), (duplicate) or (hash)."""
    document = parse_object(contents, name)
    try:
        record = kind.model_validate(document)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        raise Refusal("json", f"{name}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from error
    if not is_unchanged(document):
        raise Refusal("hash", f"{name} has changed: its contents do not have the checksum that it names")
    return record


def _check_record(record: MaskedUpdate, base: Round, client: int, started: str) -> None:
    """Check that a masked update answers this attempt of this round, for this client."""
    if record.protocol != PROTOCOL:
        raise Refusal("protocol", f"protocol {record.protocol}, this workspace speaks {PROTOCOL}")
    if record.workspace != base.manifest.workspace:
        raise Refusal("workspace", f"made for workspace {record.workspace[:80]!r}")
    if (record.round, record.attempt) != (base.number, ATTEMPT):
        raise Refusal("wrong_round", f"made for attempt {record.attempt} of round {record.round}")
    if record.base != base.sha256:
        raise Refusal("wrong_base", "made from another manifest of this round")
    if record.started != started:
        raise Refusal("wrong_base", "masked for another attempt of this round")
    if record.client != client:
        raise Refusal("wrong_client", f"made by client {record.client}, dropped by client {client}")
    if fault := claim_fault(base.manifest.privacy, record.privacy):
        raise Refusal("privacy", fault)
