"""Bundles: what a party needs of a workspace, or what it sends, in one signed file; and taking one in."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from fedcli.errors import IntegrityError, NotReadyError, UsageError
from fedcli.observer import Observer
from fedcli.operations.carry import MAX_SMALL_BYTES, Carried
from fedcli.operations.sync import carry_all
from fedcli.operations.sync_walk import Scope
from fedcli.workspace.bundle_file import Bundle, BundleRecord, new_bundle, opened_bundle, seal_bundle
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.history import is_initialised, read_identity
from fedcli.workspace.layout import CONFIG_NAME, Workspace
from fedcli.workspace.parsing import sealed
from fedcli.workspace.records import Identity
from fedcli.workspace.sync_memory import SyncMemory

_ROUND_PARTS = frozenset(("rounds", "enrolment", "attempts", "repair"))
_UPDATE_PARTS = frozenset(("inbox", "clients"))


@dataclass(frozen=True)
class Bundled:
    """A bundle that was made."""

    path: str
    kind: Literal["round", "update"]
    round: int
    client: int | None
    num_files: int
    num_bytes: int
    has_update: bool = True
    """Whether an update bundle holds an update or an answer of the open round."""


@dataclass(frozen=True)
class Imported:
    """What came of a bundle."""

    kind: Literal["round", "update"]
    round: int
    client: int | None
    server: str | None
    """The fingerprint of the server that signed it; None of an update, or where signatures are off."""
    unenrolled: str | None
    """The fingerprint of a party that is not enrolled yet."""
    carried: Carried


def bundle_round(federation: FederationState, number: int, path: Path, *, observer: Observer) -> Bundled:
    """Write what a party needs to train in a round: fedcli.yaml, the enrolment, the rounds, old ones without weights.

    Raises NotReadyError where something of it is not whole here, WorkspaceError where the server's keys are not here.
    """
    scope = Scope(parts=_ROUND_PARTS, is_lean=True, last_round=number, is_bundled=True)
    return _write(federation, path, "round", number, scope, observer)


def bundle_update(
    federation: FederationState, client: int, path: Path, *, home: Path | None = None, observer: Observer
) -> Bundled:
    """Write what a party sends: its registration, its countersignatures, and its update of the open round.

    Raises NotReadyError where it has not joined.
    """
    federation.check_clients([client])
    number = federation.head.number
    scope = Scope(client, _UPDATE_PARTS, first_round=number, is_bundled=True)
    return _write(federation, path, "update", number, scope, observer, home=home)


def _write(
    federation: FederationState,
    path: Path,
    kind: Literal["round", "update"],
    number: int,
    scope: Scope,
    observer: Observer,
    *,
    home: Path | None = None,
) -> Bundled:
    source, identity = federation.workspace, federation.identity
    sign = _signer(federation, scope.client, home)
    with new_bundle(path) as bundle:
        place = Workspace(path, bundle, str(path.absolute()))
        result = carry_all(source, place, identity, _Everything(), scope, observer=observer)
        if result.arriving:
            name, reason = next(iter(result.arriving.items()))
            raise NotReadyError(
                f"{name} is not whole in {source.address}: {reason}",
                hint="Wait until it is; `fedcli verify` tells what is damaged.",
            )
        if scope.client is not None and not any(name.startswith(("clients/", "inbox/")) for name in bundle.places):
            hint = f"Run `fedcli client join --id {scope.client} --data SOURCE`."
            raise NotReadyError(f"client {scope.client} has nothing to send: it has not joined", hint=hint)
        entries = bundle.entries()
        changing = [name for name in entries if _may_change(name)]
        record = BundleRecord(
            kind=kind,
            workspace=identity.id,
            round=number,
            client=scope.client,
            files=dict(sorted(entries.items())),
            modified={name: source.store.modified(name) for name in sorted(changing)},
        )
        seal_bundle(bundle, record, sign(sealed(record)))
        return Bundled(
            str(bundle.path),
            kind,
            number,
            scope.client,
            len(entries),
            bundle.file.tell(),
            any(name.startswith("inbox/") for name in entries),
        )


def _may_change(name: str) -> bool:
    return name == CONFIG_NAME or (name.startswith("clients/") and name.endswith((".json", ".leave")))


def import_bundle(path: Path, target: Workspace, *, server: str | None = None, observer: Observer) -> Imported:
    """Take a bundle in: a round's makes or completes a workspace, an update's brings a party's part to the server.

    `server` is the fingerprint that the server must have; without it the one that this user's homes or the workspace
    know, or at first the one that it has. Raises IntegrityError for what is damaged, not signed, or another
    workspace's: then nothing is taken from it.
    """
    with opened_bundle(path) as bundle:
        record = bundle.record
        assert record is not None
        source = Workspace(path, bundle, str(path))
        if not is_initialised(source):
            raise _refused(path, "it does not say of which workspace it is")
        identity = read_identity(source)
        if identity.id != record.workspace:
            raise _refused(path, "workspace.json in it is another workspace's")
        _check_place(path, target, identity, record, bundle)
        told = unenrolled = are_others = None
        if identity.signatures is not None:
            from fedcli.operations.bundle_trust import are_other_keys, check_round_bundle, check_update_bundle

            if record.kind == "round":
                told = check_round_bundle(source, bundle, target, identity, server)
            else:
                unenrolled = check_update_bundle(bundle, target, identity)
                assert record.client is not None
                are_others = partial(are_other_keys, target, identity, record.client)
        else:
            from fedcli.operations.sync_trust import known_servers

            if server is not None or known_servers(identity.id):
                raise _refused(path, "nothing in it is signed, and this workspace's server signs")
        parts = _ROUND_PARTS if record.kind == "round" else _UPDATE_PARTS
        scope = Scope(record.client, parts, first_round=0, last_round=record.round)
        judge = _ByTime(SyncMemory(identity.id, "bundle", target.address), record.modified, are_others)
        carried = carry_all(source, target, identity, judge, scope, observer=observer)
        return Imported(record.kind, record.round, record.client, told, unenrolled, carried)


def _check_place(path: Path, target: Workspace, identity: Identity, record: BundleRecord, bundle: Bundle) -> None:
    """Raise UsageError or IntegrityError where a bundle does not belong to the place that it is to be taken into."""
    odd = sorted(name for name in bundle.places if not _belongs(name, record))
    if odd:
        raise _refused(path, f"{odd[0]} does not belong into a bundle of this kind")
    if not is_initialised(target):
        if record.kind == "update":
            raise UsageError(
                f"{target.address} is no workspace that an update could be taken into",
                hint="Name the server's workspace: -w DIR.",
            )
        return
    own = target.store.read(target.identity.name, MAX_SMALL_BYTES)
    if own != bundle.read(target.identity.name, MAX_SMALL_BYTES):
        same = read_identity(target).id == identity.id
        problem = "it has another workspace.json" if same else f"it is of workspace {identity.id}"
        raise _refused(path, f"{problem}, not that of {target.address}")


def _belongs(name: str, record: BundleRecord) -> bool:
    first, _, rest = name.partition("/")
    if name == "workspace.json":
        return True
    if record.kind == "round":
        return record.client is None and (name == CONFIG_NAME or first in _ROUND_PARTS)
    return first in _UPDATE_PARTS and rest.split("/")[0].partition(".")[0] == str(record.client)


def _signer(federation: FederationState, client: int | None, home: Path | None) -> Callable[[bytes], bytes]:
    if federation.identity.signatures is None:
        return lambda _: b""
    from fedcli.operations.bundle_trust import signer  # where nothing is signed nobody needs cryptography

    return signer(federation, client, home)


class _Everything:
    """Of a bundle that is written: nothing is in it before."""

    replaces = False

    def is_newer(self, name: str, ours: bytes, theirs: bytes | None) -> bool | None:
        return True

    def agreed(self, name: str, contents: bytes) -> None:
        return None


@dataclass(frozen=True)
class _ByTime:
    """Of a bundle that is taken in: what was written later than what the last one brought is newer.

    Nothing tells it of what stands and came by no bundle, nor of a registration with other keys.
    """

    memory: SyncMemory
    modified: dict[str, float]
    are_others: Callable[[bytes, bytes], bool] | None
    """Whether a registration has other keys than the one that stands; None where nothing is signed."""
    replaces = False

    def is_newer(self, name: str, ours: bytes, theirs: bytes | None) -> bool | None:
        last = self.memory.modified(name)
        if theirs is not None:
            is_registration = name.startswith("clients/") and name.endswith(".json")
            if is_registration and self.are_others is not None and self.are_others(ours, theirs):
                return None
            if last is None:
                return None
        return last is None or self.modified.get(name, 0.0) > last

    def agreed(self, name: str, contents: bytes) -> None:
        last = self.memory.modified(name)
        if last is None or self.modified.get(name, 0.0) > last:
            self.memory.keep(name, contents, self.modified.get(name, 0.0))


def _refused(path: Path, problem: str) -> IntegrityError:
    return IntegrityError(f"{path} is refused: {problem}", hint="Nothing was taken from it.")
