"""Whose keys there are: the server's and the parties', with the fingerprints that are compared by telephone."""

from dataclasses import dataclass, field

from fedcli.errors import FedError, UsageError
from fedcli.parties.membership import has_left
from fedcli.parties.party import joined_as
from fedcli.trust.chain import read_chain
from fedcli.trust.keys import KeyPair, fingerprint
from fedcli.workspace.enrolment import read_enrolment
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.layout import server_home
from fedcli.workspace.records import PublicKeys
from fedcli.workspace.registrations import joined_clients, own_homes, read_registration


@dataclass(frozen=True)
class KeyOwner:
    """The public keys of the server or a party, and how they stand: current, enrolled, joined, leave or revoke."""

    sign: str
    seal: str
    fingerprint: str
    state: str
    is_own: bool
    """Whether the private keys are here."""


@dataclass(frozen=True)
class KeyRing:
    """All keys of a workspace; as JSON it is what `fedcli verify --trust` takes."""

    workspace: str
    server: KeyOwner
    clients: dict[int, KeyOwner] = field(default_factory=dict)
    following: dict[int, str] = field(default_factory=dict)
    """The fingerprints of new keys that parties have registered, and that are not enrolled."""


def read_keys(federation: FederationState) -> KeyRing:
    """Return the keys of a workspace, its enrolment checked; raise UsageError where signatures are off."""
    if federation.identity.signatures is None:
        raise UsageError(
            f"signatures are off in {federation.workspace.address}: there are no keys",
            hint="`federation.signatures` is fixed by `fedcli init`: required where parties join.",
        )
    identity = federation.identity
    pins = {record.server for record in joined_as(federation).values() if record is not None and record.server}
    enrolment = read_chain(federation.workspace, identity, sorted(pins))
    assert enrolment.server is not None
    files = [server_home(identity.id).keys]
    files += [path for home in own_homes(identity.id).values() for path in (home.keys, home.next_keys)]
    own = {pair.public for pair in map(KeyPair.read, files) if pair is not None}

    def owner(keys: PublicKeys, state: str) -> KeyOwner:
        return KeyOwner(keys.sign, keys.seal, fingerprint(keys), state, keys in own)

    clients = {client: owner(member.keys, "enrolled") for client, member in enrolment.members.items()}
    last = {s.entry.client: s.entry.keys for s in enrolment.entries if s.entry.client is not None and s.entry.keys}
    for client, action in enrolment.gone.items():
        if (keys := last.get(client)) is not None:
            clients[client] = owner(keys, action)
    following = {}
    for client in joined_clients(federation.workspace, federation.config.federation.clients):
        try:
            registration = read_registration(federation.workspace, client)
        except FedError:  # a stranger's file: who enrols the client is told
            continue
        if registration is None or registration.keys is None:
            continue
        if client not in clients:
            clients[client] = owner(registration.keys, "joined")
        elif fingerprint(registration.keys) != clients[client].fingerprint:
            following[client] = fingerprint(registration.keys)
    return KeyRing(identity.id, owner(enrolment.server, "current"), dict(sorted(clients.items())), following)


def leaving(federation: FederationState) -> list[int]:
    """Return the enrolled clients that have signed that they leave: the server takes them out when it next merges."""
    enrolment = read_enrolment(federation.workspace)
    names = {name.removesuffix(".leave") for name in federation.workspace.store.names("clients") if ".leave" in name}
    said = [client for client in sorted(enrolment.members) if str(client) in names]
    return [client for client in said if has_left(federation, client, enrolment)]
