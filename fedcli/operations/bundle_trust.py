"""Who has signed a bundle: keys come from the enrolment, and never from the bundle alone."""

from collections.abc import Callable
from pathlib import Path

from fedcli.errors import IntegrityError
from fedcli.operations.sync_trust import known_servers
from fedcli.parties.membership import own_key
from fedcli.parties.party import find_home
from fedcli.server.enrol import open_trust
from fedcli.trust.chain import read_chain
from fedcli.trust.keys import KeyPair, fingerprint, is_signed, parse_fingerprint
from fedcli.trust.registration import keys_of, own_fault
from fedcli.workspace.bundle_file import Bundle
from fedcli.workspace.enrolment import Enrolment
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.history import is_initialised
from fedcli.workspace.inbox import MAX_SIGNATURE_BYTES
from fedcli.workspace.layout import Workspace
from fedcli.workspace.parsing import sha256
from fedcli.workspace.records import EnrolmentHead, Identity, PublicKeys
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.registrations import MAX_REGISTRATION_BYTES

_ALL = EnrolmentHead(number=0, sha256="0" * 64)
"""Before any client was enrolled."""


def signer(federation: FederationState, client: int | None, home: Path | None) -> Callable[[bytes], bytes]:
    """Return what signs bundle.json: the server's key, or a client's.

    Raises WorkspaceError or ConfigError where these are not here.
    """
    identity = federation.identity
    key: KeyPair
    if client is None:
        trust = open_trust(federation.workspace, identity)
        assert trust is not None
        key = trust.key
    else:
        enrolment = read_chain(federation.workspace, identity, known_servers(identity.id))
        key = own_key(find_home(federation, client, home), client, enrolment)
    return lambda record: key.sign("bundle", identity.id, sha256(record))


def check_round_bundle(
    source: Workspace, bundle: Bundle, target: Workspace, identity: Identity, server: str | None
) -> str:
    """Return the fingerprint of the server that signed a round's bundle.

    Raises IntegrityError where that is another one than `server`, this user's homes or the target know, or nobody.
    """
    pins = known_servers(identity.id) if server is None else [parse_fingerprint(server)]
    chain = read_chain(source, identity, pins)
    if is_initialised(target):
        known = read_chain(target, identity, pins)
        for ours, theirs in zip(chain.entries, known.entries, strict=False):
            if ours.sha256 != theirs.sha256:
                raise _refused(bundle, f"entry {ours.entry.number} of its enrolment is not that of {target.address}")
        chain = max(chain, known, key=lambda each: len(each.entries))  # a key that was rotated out signs no more
    assert chain.server is not None
    if not is_signed(chain.server, bundle.signature, "bundle", identity.id, sha256(bundle.record_bytes)):
        raise _refused(bundle, "it is not signed by the server")
    return fingerprint(chain.server)


def check_update_bundle(bundle: Bundle, target: Workspace, identity: Identity) -> str | None:
    """Raise IntegrityError where a client has not signed its bundle.

    Returns the fingerprint of the keys that it asks to be enrolled under, None where it is enrolled under them.
    """
    assert bundle.record is not None
    assert bundle.record.client is not None
    client, chain = bundle.record.client, read_chain(target, identity)
    registered = f"clients/{client}.json"
    try:
        contents = bundle.read(registered, MAX_REGISTRATION_BYTES)
        signature = bundle.read(f"clients/{client}.sig", MAX_SIGNATURE_BYTES)
    except (FileNotFoundError, Refusal):
        contents = signature = b""
    asked = keys_of(contents) if contents else None
    if contents and (fault := own_fault(identity.id, client, contents, signature)):
        raise _refused(bundle, f"{registered} in it: {fault}")
    if (gone := chain.gone.get(client)) is not None and (asked is None or asked in _had(chain, client)):
        raise _refused(
            bundle,
            f"client {client} {'has left' if gone == 'leave' else 'was revoked'}",
            "It may join again with new keys.",
        )
    member = chain.members.get(client)
    keys = chain.keys_since(client, _ALL) if member is not None else [asked] if asked is not None else []
    digest = sha256(bundle.record_bytes)
    if not any(is_signed(each, bundle.signature, "bundle", identity.id, digest) for each in keys):
        raise _refused(
            bundle,
            f"it is not signed by client {client}"
            + ("" if member is None else f", who is enrolled under {fingerprint(member.keys)}"),
            f"Where the party has lost its keys, `fedcli server revoke --id {client}` lets it join with new ones.",
        )
    return None if asked is None or (member is not None and member.keys == asked) else fingerprint(asked)


def are_other_keys(target: Workspace, identity: Identity, client: int, ours: bytes, theirs: bytes) -> bool:
    """Return whether a registration has other keys than the one that stands, which may be somebody's who waits.

    Keys of a client that is gone wait for nothing. Raises IntegrityError where the enrolment is not the server's.
    """
    chain, standing = read_chain(target, identity), keys_of(theirs)
    is_over = client in chain.gone and standing in _had(chain, client)
    return standing != keys_of(ours) and not is_over


def _had(chain: Enrolment, client: int) -> list[PublicKeys | None]:
    return [stored.entry.keys for stored in chain.entries if stored.entry.client == client and stored.entry.keys]


def _refused(bundle: Bundle, problem: str, hint: str = "Nothing was taken from it.") -> IntegrityError:
    return IntegrityError(f"{bundle.path} is refused: {problem}", hint=hint)
