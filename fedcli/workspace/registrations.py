"""Joined parties: what the workspace learns of them (clients/<id>.json), and what their own homes keep."""

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from fedcli.config import DataFormat, SelectConfig
from fedcli.errors import ConfigError, IntegrityError, WorkspaceError
from fedcli.stores.objects import UnlistableError
from fedcli.workspace.floors import USUAL_FLOORS, Floors
from fedcli.workspace.history import read_identity, read_record
from fedcli.workspace.layout import Home, Workspace, default_home, server_home
from fedcli.workspace.publish import PRIVATE_FOLDER_MODE, explained, make_folder, publish_file
from fedcli.workspace.record import Natural, Record
from fedcli.workspace.records import Identity, PublicKeys
from fedcli.workspace.relay_records import WorkspaceId

MAX_REGISTRATION_BYTES = 64 * 1024
_MADE_HERE = "made-here"
_COPIED = ".copied"


class DataCard(Record):
    """What a party tells of its rows; only their number where it shares the minimum.

    `num_rows` counts the rows that the format can use; quantiles are of tokens a row, as templated and not cut. Where
    privacy has a unit a card tells the format alone, and the number of rows stays in the party's home.
    """

    num_rows: Natural | None = None
    format: str | None = None
    left_out: dict[str, Natural] | None = None
    token_quantiles: dict[str, Natural] | None = None
    region: WorkspaceId | None = None
    """The workspace whose parties hold the rows; None, and not written, of a party that holds its own."""


class Registration(Record):
    """clients/<id>.json."""

    arrives = True
    protocol: Literal[1] = 1
    workspace: str
    client: Natural
    data: DataCard
    keys: PublicKeys | None = None
    """None where signatures are off."""

    def to_bytes(self) -> bytes:
        """Return UTF-8 JSON with sorted keys; what is not shared is not there."""
        return json.dumps(self.model_dump(mode="json", exclude_none=True), sort_keys=True, indent=1).encode() + b"\n"


class RegionRecord(Record):
    """party.json's region: whose parties hold the rows, where that workspace lies, and its parent."""

    workspace: WorkspaceId
    child: str
    parent: str


class PartyRecord(Record):
    """party.json in a party's home: where its rows and its base model lie, and whether remote code is trusted."""

    unwritten = ("num_rows", "region", "select", "shares_scores", "allow_code_execution")

    workspace: str
    client: Natural
    source: str
    format: DataFormat | None
    """None of a region alone."""
    subset: str | None
    split: str | None
    base: str | None
    trust_remote_code: bool
    delimiter: str | None = None
    encoding: str | None = None
    is_format_given: bool = False
    """Whether it was named, and not guessed."""
    share: Literal["full", "minimal"] = "full"
    server: str | None = None
    """The fingerprint of the server's keys when it joined; None where signatures are off."""
    floors: Floors = USUAL_FLOORS
    num_rows: Natural | None = None
    """What its registration does not tell, where privacy has a unit; None, and not written, where it tells it."""
    select: SelectConfig | Literal["off"] | None = None
    """Which of its rows it trains on, whatever a round asks for; None, and not written: as the round asks."""
    shares_scores: bool = False
    """Whether its updates tell how many rows have which score; not written where they do not."""
    region: RegionRecord | None = None
    """None, and not written, of a party that holds its rows itself."""
    allow_code_execution: bool = False
    """Whether code that the model wrote may run in a sandbox while it trains; not written where it may not."""


def read_registration(workspace: Workspace, client: int) -> Registration | None:
    """Return what a joined party said of itself, or None where it has not joined."""
    path, hint = workspace.registration(client), "Let the party join again."
    registration = read_record(workspace, Registration, path, MAX_REGISTRATION_BYTES, hint=hint)
    if registration is not None and registration.client != client:
        raise IntegrityError(f"{path} is client {registration.client}'s", hint=hint)
    return registration


def is_own(workspace: Workspace) -> bool:
    """Return whether fedcli.yaml and workspace.json, where they are there, are this user's; links are not followed.

    Those of a workspace elsewhere are its who made it, on the machine where that was done; those of a copy are whose
    they were before.
    """
    if workspace.store.is_remote:
        with suppress(OSError):
            return (workspace.root / _MADE_HERE).read_text() == read_identity(workspace).id
        return False
    if os.path.lexists(workspace.root / _COPIED):
        return False
    files = [path for path in (workspace.config, workspace.identity) if os.path.lexists(path)]
    return all(os.lstat(path).st_uid == os.geteuid() for path in files)


def mark_as_own(workspace: Workspace, workspace_id: str) -> None:
    """Note on this machine that a workspace elsewhere is made here."""
    if workspace.store.is_remote:
        make_folder(workspace.root)
        publish_file(workspace.root / _MADE_HERE, workspace_id.encode(), mode=0o600)


def mark_as_copy(workspace: Workspace) -> None:
    """Note in a folder that it is a copy of what somebody else made: its fedcli.yaml runs no code as this user."""
    if not workspace.store.is_remote:
        publish_file(workspace.root / _COPIED, b"Copied from another place: fedcli.yaml is not this user's own.\n")


def require_own(workspace: Workspace, what: str, instead: str) -> None:
    """Raise ConfigError where fedcli.yaml is another user's, for what it would do as this user."""
    if not is_own(workspace):
        raise ConfigError(f"{workspace.config} is another user's: {what} would run or send things as you", hint=instead)


def is_stranger(workspace: Workspace, owner: int | None) -> bool:
    """Return whether a user who has not joined may send nothing: where anybody can make an inbox, all but its owner."""
    return workspace.store.is_open("inbox") and owner != inbox_owner(workspace)


def inbox_owner(workspace: Workspace) -> int | None:
    """Return the user id of the server, whose inbox/ is; None where the store knows no users."""
    return workspace.store.owner("inbox")


def is_server(workspace: Workspace) -> bool:
    """Return whether this user may work as the server."""
    return inbox_owner(workspace) in (None, os.geteuid())


def any_registered(workspace: Workspace) -> bool:
    """Return whether any party has joined."""
    try:
        return any(re.fullmatch(r"[0-9]+\.json", name) for name in workspace.store.names("clients"))
    except UnlistableError:  # simulated clients put nothing there
        return True


def joined_clients(workspace: Workspace, num_clients: int) -> dict[int, Registration]:
    """Return the parties that have joined, by id; what any user may put there, and is no registration, is none."""
    wanted = {f"clients/{client}.json": client for client in range(num_clients)}
    try:
        listed = {f"clients/{name}" for name in workspace.store.names("clients")}
    except UnlistableError:  # somebody has put a key there that is no path
        listed = workspace.store.existing([*wanted])
    there = {name: client for name, client in wanted.items() if name in listed}
    workspace.store.fetch_ahead([*there])
    joined = {}
    for client in there.values():
        with suppress(IntegrityError, PermissionError):
            joined[client] = read_registration(workspace, client)
    return {client: registration for client, registration in joined.items() if registration is not None}


def foreign_clients(workspace: Workspace, clients: Sequence[int]) -> list[int]:
    """Return those of some clients whose inbox is of a user who has not joined as them, nor is the server."""
    return [client for client in clients if _is_foreign(workspace, client)]


def _is_foreign(workspace: Workspace, client: int) -> bool:
    owner = workspace.store.owner(workspace.name(workspace.client_inbox(client)))
    registered = workspace.store.owner(workspace.name(workspace.registration(client)))
    return is_stranger(workspace, owner) if registered is None else registered != owner


def register(workspace: Workspace, registration: Registration, signature: bytes | None = None) -> None:
    """Write a party's registration with its signature, and make the folder that it will drop its updates in."""
    client = registration.client
    inbox = workspace.client_inbox(client)
    if not workspace.store.claim(workspace.name(inbox)):
        problem = f"client {client} belongs to another user: {inbox} is not yours"
        raise WorkspaceError(problem, hint="Ask the server's operator which id is yours.")
    workspace.store.put(workspace.name(workspace.registration(client)), registration.to_bytes())
    if signature is not None:
        workspace.store.put(workspace.name(workspace.registration_signature(client)), signature)


def open_to_parties(workspace: Workspace, *, multi_user: bool) -> None:
    """Make inbox/ and clients/; for parties of several unix users, writable for all who can reach the workspace."""
    for folder in ("inbox", "clients"):
        workspace.store.share(folder, multi_user=multi_user)


def check_still_unsigned(workspace: Workspace, identity: Identity) -> None:
    """Raise IntegrityError where this user is the server, with keys, of a workspace that says that it needs none."""
    home = None
    with suppress(WorkspaceError):  # a user without a home directory has no keys
        home = None if "FEDCLI_SERVER_HOME" in os.environ else server_home(identity.id)
    if home is not None and home.keys.exists():
        raise IntegrityError(
            f"{workspace.identity} no longer says that signatures are required, and {home.keys} stands",
            hint="Restore it from a backup: whoever changed it wants unsigned updates to count.",
        )


def read_party(home: Home) -> PartyRecord | None:
    """Return what a home keeps of its party; None where there is nothing."""
    try:
        return PartyRecord.model_validate_json(home.party.read_bytes(), strict=False)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        where = ".".join(map(str, error.errors(include_url=False, include_input=False)[0]["loc"]))
        if where.startswith("floors."):
            raise ConfigError(
                f"{home.party}: this version of fedcli cannot keep the floor {where.removeprefix('floors.')!r}",
                hint="Use the version that wrote it, or mend it by hand.",
            ) from error
        raise ConfigError(f"{home.party} is damaged", hint="Run `fedcli client join` again.") from error


def own_homes(workspace_id: str) -> dict[int, Home]:
    """Return the homes of the clients that this user has joined as; an empty one where that is elsewhere."""
    named, homes = os.environ.get("FEDCLI_HOME"), dict[int, Home]()
    names: list[str] = []
    with suppress(OSError, WorkspaceError):  # a user without a home directory has none
        names = os.listdir(default_home(workspace_id, 0).folder.parent)
    for client in map(int, filter(str.isdecimal, names)):
        homes[client] = default_home(workspace_id, client)
    record = read_party(Home(Path(named))) if named else None
    if named and record is not None and record.workspace == workspace_id:
        homes[record.client] = Home(Path(named).absolute())
    return homes


def make_home(home: Home) -> None:
    """Make a party's home, or close one that stands there, for its own user alone."""
    make_folder(home.folder, PRIVATE_FOLDER_MODE)
    with explained(home.folder):
        os.chmod(home.folder, PRIVATE_FOLDER_MODE)


def save_party(home: Home, record: PartyRecord) -> None:
    """Keep a party's record in its home."""
    publish_file(home.party, record.to_bytes(), mode=0o600)
