"""A party's side of trust: its keys, its signed registration, leaving, and new keys."""

from collections.abc import Collection
from pathlib import Path

from fedcli.errors import ConfigError, DeniedError, NotReadyError, UsageError
from fedcli.parties.party import find_home
from fedcli.trust.chain import read_chain, read_small
from fedcli.trust.history import note
from fedcli.trust.keys import (
    KeyPair,
    digest_of,
    fingerprint,
    is_signed,
    keys_named,
    latest_keys,
    parse_fingerprint,
)
from fedcli.workspace.enrolment import Enrolment, Member
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.layout import Home
from fedcli.workspace.locks import hold
from fedcli.workspace.parsing import sha256
from fedcli.workspace.records import PublicKeys
from fedcli.workspace.registrations import Registration, read_party, read_registration, register


def pin_server(federation: FederationState, given: str | None, before: str | None) -> str:
    """Return the fingerprint that the server must have for a party: the given one, the one before, or its present one.

    Raises IntegrityError where the workspace is another server's, or nobody signed it.
    """
    pin = before if given is None else parse_fingerprint(given)
    enrolment = read_chain(federation.workspace, federation.identity, [] if pin is None else [pin])
    assert enrolment.server is not None
    return pin or fingerprint(enrolment.server)


def register_signed(federation: FederationState, home: Home, registration: Registration) -> PublicKeys:
    """Write a registration with the party's latest keys, signed by them; of new keys the old one signs the hash.

    Whoever calls this holds the client's lock.
    """
    key, workspace_id = latest_keys(home), federation.identity.id
    keys = key.public
    signed = registration.model_copy(update={"keys": keys})
    signature = key.sign("client", workspace_id, sha256(signed.to_bytes()))
    old = KeyPair.read(home.keys)
    if old is not None and old.public != keys:
        signature += old.sign("keys", workspace_id, digest_of(keys))
    register(federation.workspace, signed, signature)
    return keys


def own_key(home: Home, client: int, enrolment: Enrolment) -> KeyPair:
    """Return the keys that a party signs with: those that it is enrolled under, else its latest.

    Raises ConfigError where it is enrolled under keys that are not here.
    """
    member = enrolment.members.get(client)
    key = latest_keys(home) if member is None else keys_named(home, member.keys)
    if key is None:
        assert member is not None
        raise ConfigError(
            f"client {client} is enrolled under the keys {fingerprint(member.keys)}, which are not in {home.folder}",
            hint="Name the home that has them with --home; or join again, and let the server's operator enrol the new "
            "keys.",
        )
    return key


def has_left(federation: FederationState, client: int, enrolment: Enrolment) -> bool:
    """Return whether a client is out, or has signed that it leaves."""
    if client in enrolment.gone:
        return True
    member = enrolment.members.get(client)
    return member is not None and _wants_to_leave(federation, client, member)


def _wants_to_leave(federation: FederationState, client: int, member: Member) -> bool:
    word = read_small(federation.workspace, federation.workspace.leaving(client))
    return word is not None and is_signed(member.keys, word, "leave", federation.identity.id, member.entry)


def leave(federation: FederationState, client: int, home: Path | None = None) -> bool:
    """Sign that a party leaves; the server takes it out when it next merges. Returns False where it is out already.

    Raises NotReadyError where it is not enrolled, UsageError where signatures are off or it has not joined from here.
    """
    found, enrolment = _own(federation, client, home)
    if has_left(federation, client, enrolment):
        return False
    member = enrolment.members.get(client)
    if member is None:
        raise NotReadyError(
            f"client {client} is not enrolled, and so has nothing to leave",
            hint=f"The server's operator can remove clients/{client}.json.",
        )
    with hold(found.lock, f"client {client}"):
        word = own_key(found, client, enrolment).sign("leave", federation.identity.id, member.entry)
        note(found.history, "left", workspace=federation.identity.id)
        workspace = federation.workspace
        try:
            workspace.store.put(workspace.name(workspace.leaving(client)), word)
        except DeniedError as error:  # another user of a shared folder took the name
            error.hint = f"Stop training, and ask the server's operator for `fedcli server revoke --id {client}`."
            raise
    return True


def rotate(federation: FederationState, client: int, home: Path | None = None) -> str:
    """Make new keys for a party, and register them, signed by the old ones; return their fingerprint.

    It goes on signing with the old ones until the server has enrolled the new ones.
    """
    found, enrolment = _own(federation, client, home)
    registration = read_registration(federation.workspace, client)
    if registration is None:
        hint = f"Run `fedcli client join --id {client} --data SOURCE`."
        raise NotReadyError(f"client {client} is not registered", hint=hint)
    with hold(found.lock, f"client {client}"):
        if (member := enrolment.members.get(client)) is not None:
            keys_named(found, member.keys)  # new keys that are enrolled are new no more
        if KeyPair.read(found.next_keys) is None:
            KeyPair.make().write(found.next_keys)
        return fingerprint(register_signed(federation, found, registration))


def _own(federation: FederationState, client: int, home: Path | None) -> tuple[Home, Enrolment]:
    federation.check_clients([client])
    found = find_home(federation, client, home)
    record = read_party(found)
    if record is None or (record.workspace, record.client) != (federation.identity.id, client):
        raise UsageError(
            f"client {client} has not joined from {found.folder}",
            hint="Run this as the user who joined, or name the home: --home DIR.",
        )
    pins: Collection[str] = [] if record.server is None else [record.server]
    if federation.identity.signatures is None:
        raise UsageError(
            f"signatures are off in {federation.workspace.address}: there are no keys, and nobody is enrolled",
            hint="Stop training to leave; the server's operator goes on without you by quorum, deadline or --partial.",
        )
    return found, read_chain(federation.workspace, federation.identity, pins)
