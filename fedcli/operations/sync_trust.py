"""What is carried of a signed workspace: what its server and its parties have signed, as far as this can be told."""

from contextlib import suppress

from fedcli.errors import FedError
from fedcli.trust.chain import MAX_SIGNATURE_BYTES, read_chain, round_fault
from fedcli.trust.keys import KeyPair, fingerprint, is_signed
from fedcli.workspace.enrolment import Enrolment
from fedcli.workspace.history import Round
from fedcli.workspace.layout import UPDATE_SIGNATURE, Workspace, server_home
from fedcli.workspace.parcels import Incomplete
from fedcli.workspace.records import Identity, Manifest, sha256
from fedcli.workspace.registrations import own_homes, read_party


def known_servers(workspace_id: str) -> list[str]:
    """Return the fingerprints of the server's keys that this user's homes know; none where it has none."""
    found = set()
    with suppress(FedError):
        for home in own_homes(workspace_id).values():
            record = read_party(home)
            found |= {record.server} if record is not None and record.server is not None else set()
        own = KeyPair.read(server_home(workspace_id).keys)
        found |= set() if own is None else {fingerprint(own.public)}
    return sorted(found)


def checked_chain(source: Workspace, identity: Identity) -> Enrolment:
    """Return the enrolment of a workspace, which the server that this user knows has signed; raise IntegrityError."""
    return read_chain(source, identity, known_servers(identity.id))


def check_round(source: Workspace, manifest: Manifest, record: bytes, enrolment: Enrolment) -> None:
    """Raise Incomplete for a round that the server has not signed."""
    if fault := round_fault(Round(source, manifest, sha256(record)), enrolment):
        raise Incomplete(f"it {fault}")


def check_update(source: Workspace, client: int, folder: str, record: bytes, enrolment: Enrolment) -> None:
    """Raise Incomplete for an update of an enrolled client that it has not signed: it would take its own's place."""
    entries = [stored.entry for stored in enrolment.entries if stored.entry.client == client]
    keys = [entry.keys for entry in entries if entry.keys is not None]
    if not keys:
        return
    try:
        with source.store.opened(folder) as found:
            signature = found.read(UPDATE_SIGNATURE, MAX_SIGNATURE_BYTES)
    except FileNotFoundError as error:
        raise Incomplete(f"{UPDATE_SIGNATURE} is missing") from error
    workspace, digest = enrolment.entries[0].entry.workspace, sha256(record)
    if not any(is_signed(each, signature, "update", workspace, digest) for each in keys):
        raise Incomplete(f"{UPDATE_SIGNATURE} is not client {client}'s of this update.json")
