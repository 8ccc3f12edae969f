"""The inbox: how a client drops an update, and how the server reads one that may be hostile."""

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedcli.algos import Array, Arrays
from fedcli.algos.reducer import PIECE, Fill, filling
from fedcli.errors import ArrivingError, IntegrityError, WorkspaceError
from fedcli.stores.objects import UnlistableError
from fedcli.workspace.encoded_differences import locate_differences
from fedcli.workspace.history import Round
from fedcli.workspace.layout import ADAPTER_FILE, UPDATE_RECORD, Workspace, is_round_name
from fedcli.workspace.parsing import is_cut_short, sha256
from fedcli.workspace.privacy_records import claim_fault
from fedcli.workspace.records import PROTOCOL, UpdateRecord, parse_update_record
from fedcli.workspace.refusal import Arriving, Refusal
from fedcli.workspace.registrations import inbox_owner, is_server, is_stranger, read_registration
from fedcli.workspace.store import Folder
from fedcli.workspace.tensors import Span, check_values, largest_file, numbers

MAX_UPDATE_RECORD_BYTES = 64 * 1024
SIGNATURE_BYTES = 128
"""Of a signature in hexadecimal digits, at least: what is shorter is not whole."""
MAX_SIGNATURE_BYTES = 4096
"""Of a file of signatures."""


@dataclass(frozen=True)
class Update:
    """A checked update: what the client says of it, and its arrays by file and tensor name."""

    record: UpdateRecord
    sha256: str
    files: dict[str, dict[str, Array]]
    num_bytes: int
    """Of all its files."""
    stored: "dict[str, StoredFile]" = field(default_factory=dict)
    """Its files on disk, if they are to be read again."""

    def origin(self, adapter: "Arrays | None") -> "Arrays | None":
        """Return what its adapter file is to be compared with: the round's adapter, or None where it is encoded."""
        return origin_of(self.record, ADAPTER_FILE, adapter)

    def values(self, adapter: Arrays) -> "dict[str, Array]":
        """Return the values of the tensors that it carries, float32 where it sent differences from the adapter."""
        found = self.files[ADAPTER_FILE]
        return found if self.record.encoding is None else {name: adapter[name] + found[name] for name in found}


def origin_of(record: UpdateRecord, name: str, adapter: "Arrays | None") -> "Arrays | None":
    """Return what one of an update's files is to be compared with; None where it holds differences already."""
    return adapter if name == ADAPTER_FILE and record.encoding is None else None


Authenticate = Callable[[int, bytes, Folder], None]
"""Raises Refusal where a client has not signed these contents of update.json, with what lies beside it."""


@dataclass(frozen=True)
class Submission:
    """An update of which only update.json and the headers of its files have been looked at."""

    client: int
    record: UpdateRecord
    sha256: str
    spans: dict[str, dict[str, Span]]
    num_bytes: int


class ChangedUpdate(WorkspaceError):
    """A client's update is not what it was a moment ago, when it was checked."""

    def __init__(self, client: int) -> None:
        super().__init__(
            f"client {client}'s update changed while it was merged",
            hint=f"Merge again; or set it aside with `fedcli server discard --id {client}`.",
        )
        self.client = client

    @staticmethod
    def refusal() -> Refusal:
        """Return what is noted of a client whose update does so again."""
        return Refusal("hash", "its files changed while they were read and merged, and again after that")


@dataclass(frozen=True)
class StoredFile:
    """A checked update's file: it may be read again piece by piece, and each piece must be the one that was checked."""

    base: Round
    client: int
    name: str
    spans: dict[str, Span]
    digests: dict[str, list[bytes]]
    """By tensor, the hashes of its pieces of PIECE numbers."""
    holds_differences: bool = False

    def filling(self, adapter: "Arrays | None") -> Fill:
        """Return what fills memory with the file's differences; `adapter` is what its values are compared with."""
        return filling(self.numbers, None if self.holds_differences else adapter)

    def numbers(self, tensor: str, part: slice) -> Array:
        """Return a part of a flattened tensor; it begins at a multiple of PIECE, and ends at one or at the end.

        Raises WorkspaceError where the file is not what it was.
        """
        span = self.spans[tensor].part(part)
        workspace = self.base.workspace
        try:
            with workspace.store.opened(workspace.name(workspace.update(self.base.number, self.client))) as folder:
                data = folder.read_part(self.name, span.start, span.end)
        except (FileNotFoundError, Refusal):
            data = b""
        whole = span.moved(0)
        if _digests(data, whole) != self.digests[tensor][part.start // PIECE : -(-part.stop // PIECE)]:
            raise ChangedUpdate(self.client)
        return numbers(data, whole)


def drop_update(base: Round, client: int, files: Sequence[tuple[str, bytes]]) -> bool:
    """Publish a client's update of a round, update.json last; return False where another one stands."""
    workspace = base.workspace
    return workspace.store.publish(workspace.name(workspace.update(base.number, client)), files[:-1], files[-1])


def submitted_rounds(workspace: Workspace, client: int) -> list[int]:
    """Return the rounds for which something lies in a client's inbox, the latest first."""
    names = workspace.store.names(workspace.name(workspace.client_inbox(client)))
    numbers = (name.removeprefix("round-") for name in names if name.startswith("round-"))
    return sorted(map(int, filter(is_round_name, numbers)), reverse=True)


def discard_update(base: Round, client: int) -> bool:
    """Set a client's update of a round aside; return whether there was one.

    The server may move nothing of another user's: it leaves a note, by which the update is none.
    """
    workspace = base.workspace
    try:
        return workspace.store.set_aside(workspace.name(workspace.update(base.number, client)))
    except WorkspaceError as error:
        owner = workspace.store.owner(workspace.name(workspace.client_inbox(client)))
        if isinstance(error.__cause__, PermissionError) and owner not in (os.geteuid(), inbox_owner(workspace)):
            if is_server(workspace):
                return _note_discarded(base, client)
            raise WorkspaceError(
                f"client {client}'s inbox belongs to another user ({owner}), who alone can set its update aside",
                hint=f"Ask that party to run `fedcli server discard --id {client}`, while the server does not merge.",
            ) from error
        raise


def _note_discarded(base: Round, client: int) -> bool:
    """Note that an update which the server may not move counts for nothing; its client moves it when it comes back."""
    workspace, number = base.workspace, base.number
    if not workspace.has_update(number, client):
        return False
    modified = workspace.store.modified(workspace.name(workspace.update(number, client)))
    note = {"protocol": PROTOCOL, "round": number, "client": client, "modified": modified}
    workspace.store.put(workspace.name(workspace.discarded(number, client)), json.dumps(note).encode() + b"\n")
    return True


def clear_discarded(base: Round, client: int) -> None:
    """Set aside one's own update where the server has discarded it."""
    if base.workspace.is_discarded(base.number, client):
        discard_update(base, client)


def read_update(
    base: Round,
    client: int,
    buffers: dict[str, memoryview] | None = None,
    *,
    reads_again: bool = False,
    authenticate: Authenticate | None = None,
) -> Update | None:
    """Read and check a client's update of a round; None where there is none.

    Every byte is read once, into memory; what is checked is what is used. `buffers` holds that memory, by file, for
    the next call: this one's arrays are views of it. With `reads_again` the files can be read again as they were.
    `authenticate` looks at the signature before the files are read.
    Raises Refusal with the code of the first fault that is found, Arriving where a file is not there yet or grows.
    """
    buffers = {} if buffers is None else buffers
    try:
        with opened_update(base, client) as folder:
            with expected(UPDATE_RECORD):
                contents = folder.read(UPDATE_RECORD, MAX_UPDATE_RECORD_BYTES)
            try:
                update = _read_folder(folder, contents, base, client, buffers, reads_again, authenticate)
                for arrays in update.files.values():
                    check_values(arrays)
            except Refusal as refusal:
                refusal.update = sha256(contents)
                raise
    except FileNotFoundError:
        return None
    except Arriving as refusal:
        raise given_up(refusal, base, client) from refusal
    return update


def given_up(arriving: Arriving, base: Round, client: int) -> Refusal:
    """Return what is to be raised for an update that is not whole: of whom nothing more is waited for, a refusal."""
    if client not in base.given_up:
        return arriving
    refusal = Refusal(arriving.code, arriving.reason)
    refusal.update = arriving.update
    return refusal


@contextmanager
def opened_update(base: Round, client: int) -> Iterator[Folder]:
    """Open an update's folder; raise FileNotFoundError, or Refusal where it is not of the user who joined."""
    path = base.workspace.update(base.number, client)
    if base.workspace.is_discarded(base.number, client):
        raise FileNotFoundError(path)
    with opened_drop(base.workspace, client, path) as folder:
        yield folder


@contextmanager
def opened_drop(workspace: Workspace, client: int, path: Path) -> Iterator[Folder]:
    """Open what a client has dropped; raise FileNotFoundError, or Refusal where it is not of the user who joined."""
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(workspace.store.opened(workspace.name(path)))
        except UnlistableError as error:
            raise Refusal("not_regular", error.message) from error
        registered = workspace.store.owner(workspace.name(workspace.registration(client)))
        if registered is None and is_stranger(workspace, folder.owner):
            raise Refusal("unknown_client", f"nobody has joined as client {client}")
        if registered not in (None, folder.owner):
            raise Refusal("owner", f"the client's inbox belongs to user {folder.owner}, it joined as user {registered}")
        yield folder


def check_rows(base: Round, client: int, update: Update | Submission) -> None:
    """Raise Refusal(samples) where an update claims more rows than its party has registered.

    A simulation has not; and where privacy has a unit no number is registered, and none counts beyond row_cap.
    """
    num_samples, problem, is_arriving = update.record.num_samples, None, False
    try:
        registration = read_registration(base.workspace, client)
        registered = None if registration is None else registration.data.num_rows
        if registration is not None and registered is None and not base.manifest.withholds:
            problem = "the client's registration does not tell how many rows it has: it joins again to register them"
        elif registered is not None and num_samples > registered:
            problem = (
                f"num_samples is {num_samples}, and the client registered {registered} rows: "
                "it joins again to register more"
            )
    except IntegrityError as error:
        problem = f"it claims {num_samples} rows, and {error.message}"
        is_arriving = isinstance(error, ArrivingError)
    if problem is not None:
        refusal = Arriving("samples", problem) if is_arriving else Refusal("samples", problem)
        refusal.update = update.sha256
        raise given_up(refusal, base, client) if isinstance(refusal, Arriving) else refusal


def look_at_update(base: Round, client: int, authenticate: Authenticate | None = None) -> Submission | None:
    """Read an update's update.json and its files' headers; None where there is none.

    Raises Refusal where they are not what they should be; of the files nothing else is known.
    """
    try:
        with opened_update(base, client) as folder:
            with expected(UPDATE_RECORD):
                contents = folder.read(UPDATE_RECORD, MAX_UPDATE_RECORD_BYTES)
            record = _parse_whole(contents)
            _check_record(record, base, client)
            if authenticate is not None:
                authenticate(client, contents, folder)
            files = {name: record.files[name] for name in base.manifest.update_files if name in record.files}
            spans = {}
            for name, entry in files.items():
                with expected(name):
                    spans[name] = _read_spans(folder, name, entry.bytes, base, record)
    except FileNotFoundError:
        return None
    except Arriving as refusal:
        raise given_up(refusal, base, client) from refusal
    if spans.keys() != {*base.manifest.update_files}:
        raise Refusal("json", "update.json does not list each file")
    num_bytes = len(contents) + sum(entry.bytes for entry in files.values())
    return Submission(client, record, sha256(contents), spans, num_bytes)


def read_update_record(base: Round, client: int) -> bytes:
    """Return the update.json of an update that was counted; raise FileNotFoundError or Refusal."""
    path = base.workspace.update(base.number, client) / UPDATE_RECORD
    return base.workspace.store.read(base.workspace.name(path), MAX_UPDATE_RECORD_BYTES)


def _read_spans(folder: Folder, name: str, num_bytes: int, base: Round, record: UpdateRecord) -> dict[str, Span]:
    """Return where a file's tensors lie, by its header alone."""
    tensors = base.manifest.sent_by(record.client)
    if num_bytes > largest_file(tensors):
        raise Refusal("size", f"{name} has {num_bytes} bytes, at most {largest_file(tensors)} are allowed")
    beginning = folder.read_part(name, 0, 8)
    length = int.from_bytes(beginning, "little") if len(beginning) == 8 else 0
    return _locate(folder.read_part(name, 0, min(8 + length, num_bytes)), name, base, record, num_bytes)


def _locate(
    data: bytes | memoryview, name: str, base: Round, record: UpdateRecord, num_bytes: int | None = None
) -> dict[str, Span]:
    """Return where one of an update's files has its tensors; the adapter's may be encoded."""
    encoding = base.manifest.encoding if name == ADAPTER_FILE and record.encoding is not None else None
    return locate_differences(data, base.manifest.sent_by(record.client), encoding, num_bytes)


def _read_folder(
    folder: Folder,
    contents: bytes,
    base: Round,
    client: int,
    buffers: dict[str, memoryview],
    reads_again: bool,
    authenticate: Authenticate | None,
) -> Update:
    record = _parse_whole(contents)
    _check_record(record, base, client)
    if authenticate is not None:
        authenticate(client, contents, folder)
    files, stored = {}, {}
    num_bytes = len(contents)
    tensors = base.manifest.sent_by(client)
    for name in base.manifest.update_files:
        entry = record.files.get(name)
        if entry is None:
            raise Refusal("json", f"update.json does not list {name}")
        if entry.bytes > largest_file(tensors):
            raise Refusal("size", f"{name} would have {entry.bytes} bytes, at most {largest_file(tensors)} are allowed")
        if name not in buffers:
            buffers[name] = new_buffer(largest_file(base.manifest.sent_tensors) + 1)  # of any client
        with expected(name):
            data, digest = folder.read_hashed(name, buffers[name])
        if len(data) < entry.bytes:
            raise Arriving("size", f"{name} has {len(data)} bytes, update.json says {entry.bytes}")
        if len(data) != entry.bytes:
            raise Refusal("size", f"{name} has {len(data)} bytes, update.json says {entry.bytes}")
        if digest != entry.sha256:
            raise Refusal("hash", f"{name} does not have the hash that update.json gives")
        spans = _locate(data, name, base, record)
        files[name] = {tensor: numbers(data, span).reshape(tensors[tensor].shape) for tensor, span in spans.items()}
        if reads_again:
            digests = {tensor: _digests(data, span) for tensor, span in spans.items()}
            is_encoded = name == ADAPTER_FILE and record.encoding is not None
            stored[name] = StoredFile(base, client, name, spans, digests, is_encoded)
        num_bytes += len(data)
    return Update(record, sha256(contents), files, num_bytes, stored)


def _parse_whole(contents: bytes) -> UpdateRecord:
    try:
        return parse_update_record(contents)
    except Refusal:
        check_whole(contents)
        raise


def check_whole(contents: bytes) -> None:
    """Raise Arriving where update.json is cut short."""
    if is_cut_short(contents):
        raise Arriving("json", f"{UPDATE_RECORD} is not whole: it has {len(contents)} bytes")


def _digests(data: bytes | memoryview, span: Span) -> list[bytes]:
    """Return the hashes of a tensor's pieces."""
    tensor, step = memoryview(data)[span.start : span.end], span.num_bytes(PIECE)
    return [hashlib.sha256(tensor[begin : begin + step]).digest() for begin in range(0, len(tensor), step)]


def new_buffer(num_bytes: int) -> memoryview:
    """Return memory that begins with a page: into any other the kernel copies a file three times as slowly."""
    return memoryview(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE))


@contextmanager
def expected(name: str) -> Iterator[None]:
    """Wait for the update where the block finds no such file."""
    try:
        yield
    except FileNotFoundError as error:
        raise Arriving("not_regular", f"{name} is missing") from error


def _check_record(record: UpdateRecord, base: Round, client: int) -> None:
    """Check that the update answers this round of this workspace, for this client."""
    if record.protocol != PROTOCOL:
        raise Refusal("protocol", f"protocol {record.protocol}, this workspace speaks {PROTOCOL}")
    if record.workspace != base.manifest.workspace:
        raise Refusal("workspace", f"made for workspace {record.workspace[:80]!r}")
    if record.round != base.number:
        raise Refusal("wrong_round", f"made for round {record.round}, this is round {base.number}")
    if record.base != base.sha256:
        raise Refusal("wrong_base", "made from another manifest of this round")
    if record.client != client:
        raise Refusal("wrong_client", f"made by client {record.client}, dropped by client {client}")
    if base.manifest.clusters is not None and (fault := base.manifest.clusters.fault(client, record.cluster)):
        raise Refusal("wrong_cluster", fault)
    asked = base.manifest.encoding
    if record.encoding is not None and (asked is None or record.encoding != asked.name):
        wanted = "values" if asked is None else f"{asked.name}, or values"
        raise Refusal("schema", f"update.json names the encoding {record.encoding!r}: the round asks for {wanted}")
    if record.base_delta != base.manifest.base_delta:
        has = "trained without base_delta/, or with another" if base.manifest.base_delta else "names a base_delta/"
        raise Refusal("wrong_base", f"it {has}: the round's is {base.manifest.base_delta}")
    if fault := claim_fault(base.manifest.privacy, record.privacy, record.num_samples, record.train_loss):
        raise Refusal("privacy", fault)
