"""Joined parties: what the workspace learns of them (clients/<id>.json), and what their own homes keep."""

import json
import os
import stat
from typing import Literal

from pydantic import ValidationError

from fedcli.config import DataFormat
from fedcli.errors import ConfigError, IntegrityError, WorkspaceError
from fedcli.workspace.layout import Home, Workspace
from fedcli.workspace.publish import DROPPED_FOLDER_MODE, PRIVATE_FOLDER_MODE, explained, make_folder, publish_file
from fedcli.workspace.read import read_file
from fedcli.workspace.records import Natural, Record, parse_record
from fedcli.workspace.refusal import Refusal

MAX_REGISTRATION_BYTES = 64 * 1024
OPEN_FOLDER_MODE = 0o3777
"""Everybody may make an entry and nobody another's away; entries get the server's group, which may read them."""


class DataCard(Record):
    """What a party tells of its rows; only their number where it shares the minimum.

    `num_rows` counts the rows that the format can use; quantiles are of tokens a row, as templated and not cut.
    """

    num_rows: Natural
    format: str | None = None
    left_out: dict[str, Natural] | None = None
    token_quantiles: dict[str, Natural] | None = None


class Registration(Record):
    """clients/<id>.json."""

    protocol: Literal[1] = 1
    workspace: str
    client: Natural
    data: DataCard

    def to_bytes(self) -> bytes:
        """Return UTF-8 JSON with sorted keys; what is not shared is not there."""
        return json.dumps(self.model_dump(mode="json", exclude_none=True), sort_keys=True, indent=1).encode() + b"\n"


class PartyRecord(Record):
    """party.json in a party's home: where its rows and its base model lie, and whether remote code is trusted."""

    workspace: str
    client: Natural
    source: str
    format: DataFormat
    subset: str | None
    split: str | None
    base: str | None
    trust_remote_code: bool


def read_registration(workspace: Workspace, client: int) -> Registration | None:
    """Return what a joined party said of itself, or None where it has not joined."""
    path = workspace.registration(client)
    try:
        contents = read_file(path, limit=MAX_REGISTRATION_BYTES)
    except FileNotFoundError:
        return None
    except Refusal as refusal:
        raise IntegrityError(f"{path} is damaged: {refusal.reason}", hint="Let the party join again.") from refusal
    registration = parse_record(Registration, contents, path)
    if registration.client != client:
        raise IntegrityError(f"{path} is client {registration.client}'s", hint="Let the party join again.")
    return registration


def registered_owner(workspace: Workspace, client: int) -> int | None:
    """Return the user id that a party joined under, or None where it has not joined."""
    try:
        return os.lstat(workspace.registration(client)).st_uid
    except FileNotFoundError:
        return None


def is_stranger(workspace: Workspace, owner: int) -> bool:
    """Return whether a user who has not joined may send nothing: where anybody can make an inbox, all but its owner."""
    inbox = os.stat(workspace.inbox)
    return bool(inbox.st_mode & stat.S_IWOTH) and owner != inbox.st_uid


def joined_clients(workspace: Workspace, num_clients: int) -> list[int]:
    """Return the ids of the parties that have joined."""
    if not workspace.clients.is_dir():
        return []
    stems = (name.removesuffix(".json") for name in os.listdir(workspace.clients) if name.endswith(".json"))
    ids = (int(stem) for stem in stems if stem.isascii() and stem.isdigit() and stem == str(int(stem)))
    return sorted(client for client in ids if client < num_clients)


def register(workspace: Workspace, registration: Registration) -> None:
    """Write a party's registration, and make the folder that it will drop its updates in."""
    client = registration.client
    inbox = workspace.client_inbox(client)
    make_folder(inbox, DROPPED_FOLDER_MODE)
    found = os.lstat(inbox)
    if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode):
        raise WorkspaceError(
            f"client {client} belongs to another user: {inbox} is not yours",
            hint="Ask the server's operator which id is yours.",
        )
    with explained(inbox):  # a join that was killed may have left it as the umask has it
        os.chmod(inbox, DROPPED_FOLDER_MODE | (found.st_mode & (stat.S_ISGID | 0o070)))
    publish_file(workspace.registration(client), registration.to_bytes())


def open_to_parties(workspace: Workspace, *, multi_user: bool) -> None:
    """Make inbox/ and clients/; for parties of several unix users, writable for all who can reach the workspace."""
    for folder in (workspace.inbox, workspace.clients):
        make_folder(folder)
        if multi_user and os.stat(folder).st_uid == os.geteuid():
            os.chmod(folder, OPEN_FOLDER_MODE)


def read_party(home: Home) -> PartyRecord | None:
    """Return what a home keeps of its party; None where there is nothing."""
    try:
        return PartyRecord.model_validate_json(home.party.read_bytes(), strict=False)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ConfigError(f"{home.party} is damaged", hint="Run `fedcli client join` again.") from error


def make_home(home: Home) -> None:
    """Make a party's home, or close one that stands there, for its own user alone."""
    make_folder(home.folder, PRIVATE_FOLDER_MODE)
    with explained(home.folder):
        os.chmod(home.folder, PRIVATE_FOLDER_MODE)


def save_party(home: Home, record: PartyRecord) -> None:
    """Keep a party's record in its home."""
    publish_file(home.party, record.to_bytes(), mode=0o600)
