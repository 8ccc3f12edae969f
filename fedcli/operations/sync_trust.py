"""What is carried of a signed workspace: what its server and its parties have signed, as far as this can be told."""

from collections.abc import Callable
from contextlib import suppress

from fedcli.errors import FedError, WorkspaceError
from fedcli.operations.carry import MAX_SMALL_BYTES, Carrier
from fedcli.trust.attempts import check_server, is_signed_since, masked_check
from fedcli.trust.chain import (
    read_chain,
    read_update_signature,
    round_fault,
    steps_back,
    update_check,
)
from fedcli.trust.keys import KeyPair, fingerprint, is_signed
from fedcli.trust.registration import follows, keys_of, own_fault
from fedcli.workspace.enrolment import Enrolment
from fedcli.workspace.history import Round, read_if_there, read_round
from fedcli.workspace.inbox import MAX_SIGNATURE_BYTES, Authenticate
from fedcli.workspace.layout import UPDATE_SIGNATURE, Workspace, server_home
from fedcli.workspace.parcels import Incomplete, Parcel
from fedcli.workspace.parsing import sha256
from fedcli.workspace.records import Identity, Manifest
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.registrations import MAX_REGISTRATION_BYTES, own_homes, read_party
from fedcli.workspace.secure_files import RecordT, Stored, parse_answer, parse_signed, read_attempt, read_repair
from fedcli.workspace.secure_records import ANSWER_RECORD, ANSWER_SIGNATURE, AttemptRecord, RepairRecord
from fedcli.workspace.store import Folder


def known_servers(workspace_id: str) -> list[str]:
    """Return the fingerprints of the server's keys that this user's homes know; none where it has none.

    Raises ConfigError where one of the homes is damaged: what it knows is not left out.
    """
    found, server = set[str](), None
    for home in own_homes(workspace_id).values():
        record = read_party(home)
        found |= {record.server} if record is not None and record.server is not None else set()
    with suppress(WorkspaceError):  # a user without a home directory has no keys
        server = server_home(workspace_id)
    own = None if server is None else KeyPair.read(server.keys)
    found |= set() if own is None else {fingerprint(own.public)}
    return sorted(found)


def checked_chain(source: Workspace, identity: Identity) -> Enrolment:
    """Return the enrolment of a workspace, which the server that this user knows has signed; raise IntegrityError."""
    return read_chain(source, identity, known_servers(identity.id))


def carry_registration(
    carrier: Carrier, source: Workspace, target: Workspace, workspace_id: str, client: int, ours: bytes
) -> None:
    """Carry a signed registration; new keys that the old ones signed are newer, whatever else is known."""
    name = source.name(source.registration(client))
    signature = source.name(source.registration_signature(client))
    signed = carrier.read(source.store, signature, MAX_SIGNATURE_BYTES) or b""
    if fault := own_fault(workspace_id, client, ours, signed):
        carrier.result.arriving[name] = fault
        return
    theirs = carrier.read(target.store, name, MAX_SMALL_BYTES)
    newer = None
    if theirs is not None and theirs != ours:
        before = carrier.read(target.store, signature, MAX_SIGNATURE_BYTES) or b""
        if not own_fault(workspace_id, client, theirs, before):
            newer = follows(workspace_id, theirs, ours, signed)
            newer = False if newer is None and follows(workspace_id, ours, theirs, before) else newer
    carrier.changing("registrations", name, first=(signature, signed), newer=newer)


def check_round(
    source: Workspace, manifest: Manifest, record: bytes, enrolment: Enrolment, before: Manifest | None
) -> None:
    """Raise Incomplete for a round that the server has not signed, or by an older enrolment than the one before."""
    if before is not None and steps_back(manifest, before):
        raise Incomplete("it names an earlier entry of the enrolment than the round before")
    if fault := round_fault(Round(source, manifest, sha256(record)), enrolment):
        raise Incomplete(f"it {fault}")


def record_fault(base: Round, folder: str, contents: bytes, signature: bytes, enrolment: Enrolment) -> str:
    """Return what is wrong with an attempt or a repair of a round; nothing where the server signed it."""
    try:
        if folder == "attempts":
            path = base.workspace.attempt(base.number)
            check_server(base, enrolment, "attempt", parse_signed(base, AttemptRecord, path, contents, signature))
        else:
            path = base.workspace.repair_of(base.number)
            check_server(base, enrolment, "repair", parse_signed(base, RepairRecord, path, contents, signature))
    except FedError as error:
        return error.message
    return ""


def enrolment_then(following: Round | None, enrolment: Enrolment) -> Enrolment:
    """Return the enrolment by which a round's updates count: that of the round that follows, or all of it before."""
    return enrolment if following is None else enrolment.up_to(following.manifest.enrolment) or enrolment


def check_update(
    places: tuple[Workspace, Workspace], base: Round, client: int, parcel: Parcel, enrolment: Enrolment
) -> None:
    """Raise Incomplete for an update that its client has not signed under keys that count: it takes another's place.

    Of a client that is not enrolled yet they are those that it has registered in the target.
    """
    source, target = places
    then = enrolment_then(read_round(target, base.number + 1), enrolment)
    if base.manifest.secure_aggregation is not None:
        is_counted = _found(places, base, read_repair) is not None
        check = masked_check(_attempt(places, base), then, is_counted=is_counted)
    elif client in then.members or client in then.gone:
        check = update_check(base, then)
    else:
        registered = read_if_there(target, target.registration(client), MAX_REGISTRATION_BYTES)
        check = _registered_check(registered, base.manifest.workspace)
    try:
        with source.store.opened(parcel.folder) as found:
            check(client, parcel.record, found)
    except (FileNotFoundError, Refusal) as error:
        raise Incomplete(error.reason if isinstance(error, Refusal) else f"{UPDATE_SIGNATURE} is missing") from error


def check_answer(
    places: tuple[Workspace, Workspace], base: Round, client: int, parcel: Parcel, enrolment: Enrolment
) -> None:
    """Raise Incomplete for an answer to another repair than the round's, or that its client has not signed."""
    attempt, repair = _attempt(places, base), _found(places, base, read_repair)
    if repair is None:
        raise Incomplete(f"round {base.number} has no repair")
    try:
        parse_answer(base, client, repair.sha256, parcel.record)
        with places[0].store.opened(parcel.folder) as found:
            signature = found.read(ANSWER_SIGNATURE, MAX_SIGNATURE_BYTES)
    except (FileNotFoundError, Refusal) as error:
        raise Incomplete(error.reason if isinstance(error, Refusal) else f"{ANSWER_SIGNATURE} is missing") from error
    if not is_signed_since(enrolment, client, attempt, signature, "answer", sha256(parcel.record)):
        raise Incomplete(f"{ANSWER_SIGNATURE} is not client {client}'s of this {ANSWER_RECORD}")


def _attempt(places: tuple[Workspace, Workspace], base: Round) -> Stored[AttemptRecord]:
    attempt = _found(places, base, read_attempt)
    if attempt is None:
        raise Incomplete(f"nothing says who takes part in round {base.number}")
    return attempt


def _found(
    places: tuple[Workspace, Workspace], base: Round, read: Callable[[Round], Stored[RecordT] | None]
) -> Stored[RecordT] | None:
    """Return a record of a round, from the target where that has it."""
    for place in reversed(places):
        with suppress(FedError):
            found = read(Round(place, base.manifest, base.sha256))
            if found is not None:
                return found
    return None


def _registered_check(registration: bytes | None, workspace_id: str) -> Authenticate:
    """Return what refuses an update that is not signed by the keys of a registration."""
    keys = None if registration is None else keys_of(registration)

    def check(client: int, record: bytes, folder: Folder) -> None:
        signature = read_update_signature(folder)
        if keys is None or not is_signed(keys, signature, "update", workspace_id, sha256(record)):
            raise Refusal(
                "signature", f"client {client} is not enrolled, nor is {UPDATE_SIGNATURE} by its registration"
            )

    return check
