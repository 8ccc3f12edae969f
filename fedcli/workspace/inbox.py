"""The inbox: how a client drops an update, and how the server reads one that may be hostile."""

import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fedcli.algos import Array
from fedcli.errors import WorkspaceError
from fedcli.workspace.history import Round
from fedcli.workspace.layout import UPDATE_RECORD, update_name
from fedcli.workspace.publish import DROPPED_FOLDER_MODE, DROPPED_MODE, make_folder, publish_directory, set_aside
from fedcli.workspace.read import opened_folder, owner_of, read_file, read_hashed
from fedcli.workspace.records import PROTOCOL, UpdateRecord, parse_update_record, sha256
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.registrations import is_stranger, registered_owner
from fedcli.workspace.tensors import decode, largest_file

MAX_RECORD_BYTES = 64 * 1024


@dataclass(frozen=True)
class Update:
    """A checked update: what the client says of it, and its arrays by file and tensor name."""

    record: UpdateRecord
    sha256: str
    files: dict[str, dict[str, Array]]
    num_bytes: int
    """Of all its files."""


def drop_update(base: Round, client: int, files: Iterable[tuple[str, bytes]]) -> bool:
    """Publish a client's update of a round; return False where another process was first (its update stands)."""
    inbox = base.workspace.client_inbox(client)
    if inbox.is_symlink():  # whoever made it would get the update
        raise WorkspaceError(f"{inbox} is a symbolic link", hint="Ask the server's operator to remove it.")
    make_folder(inbox, DROPPED_FOLDER_MODE)
    return publish_directory(base.workspace.update(base.number, client), files, mode=DROPPED_MODE)


def discard_update(base: Round, client: int) -> bool:
    """Set a client's update of a round aside; return whether there was one."""
    workspace = base.workspace
    inbox = workspace.client_inbox(client)
    if inbox.is_symlink():  # through it another client's update would be moved
        set_aside(inbox)
        return True
    if not base.has_update(client):
        return False
    owner = os.lstat(inbox).st_uid
    if owner not in (os.geteuid(), os.stat(workspace.inbox).st_uid) and not os.access(inbox, os.W_OK):
        raise WorkspaceError(
            f"client {client}'s inbox belongs to another user ({owner}), who alone can set its update aside",
            hint=f"Ask that party to run `fedcli server discard --id {client}`, while the server does not merge.",
        )
    set_aside(workspace.update(base.number, client))
    return True


def read_update(base: Round, client: int, buffers: dict[str, memoryview] | None = None) -> Update | None:
    """Read and check a client's update of a round; None where there is none.

    Every byte is read once, into memory; what is checked is what is used. `buffers` holds that memory, by file, for
    the next call: this one's arrays are views of it. Raises Refusal with the code of the first fault that is found.
    """
    workspace = base.workspace
    try:
        with (
            opened_folder(workspace.inbox.resolve()) as inbox,
            opened_folder(str(client), parent=inbox) as own,
            opened_folder(update_name(base.number), parent=own) as folder,
        ):
            owner = owner_of(own, str(client))
            registered = registered_owner(workspace, client)
            if registered is None and is_stranger(workspace, owner):
                raise Refusal("unknown_client", f"nobody has joined as client {client}")
            if registered not in (None, owner):
                raise Refusal("owner", f"the client's inbox belongs to user {owner}, it joined as user {registered}")
            return _read_folder(folder, owner, base, client, {} if buffers is None else buffers)
    except FileNotFoundError:
        return None


def _read_folder(folder: int, owner: int, base: Round, client: int, buffers: dict[str, memoryview]) -> Update:
    if (found := owner_of(folder, update_name(base.number))) != owner:
        raise Refusal("owner", f"the update belongs to user {found}, the client's inbox to user {owner}")
    with _expected(UPDATE_RECORD):
        contents = read_file(UPDATE_RECORD, limit=MAX_RECORD_BYTES, parent=folder, owner=owner)
    record = parse_update_record(contents)
    _check_record(record, base, client)
    files = {}
    num_bytes = len(contents)
    for name in base.manifest.update_files:
        entry = record.files.get(name)
        if entry is None:
            raise Refusal("json", f"update.json does not list {name}")
        if name not in buffers:
            buffers[name] = _new_buffer(largest_file(base.manifest.tensors) + 1)
        with _expected(name):
            data, digest = read_hashed(name, buffers[name], parent=folder, owner=owner)
        if len(data) != entry.bytes:
            raise Refusal("size", f"{name} has {len(data)} bytes, update.json says {entry.bytes}")
        if digest != entry.sha256:
            raise Refusal("hash", f"{name} does not have the hash that update.json gives")
        files[name] = decode(data, base.manifest.tensors)
        num_bytes += len(data)
    return Update(record, sha256(contents), files, num_bytes)


def _new_buffer(num_bytes: int) -> memoryview:
    """Return memory that begins with a page: into any other the kernel copies a file three times as slowly."""
    return memoryview(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE))


@contextmanager
def _expected(name: str) -> Iterator[None]:
    """Refuse the update where the block finds no such file."""
    try:
        yield
    except FileNotFoundError as error:
        raise Refusal("not_regular", f"{name} is missing") from error


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
