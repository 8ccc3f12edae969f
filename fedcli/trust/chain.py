"""Whether the enrolment's chain, a round and an update were signed by who must have."""

from collections.abc import Collection
from pathlib import Path

from fedcli.errors import ArrivingError, IntegrityError
from fedcli.trust.keys import digest_of, fingerprint, is_signed
from fedcli.workspace.enrolment import Enrolment, StoredEntry, read_enrolment
from fedcli.workspace.history import Round, read_if_there
from fedcli.workspace.inbox import MAX_SIGNATURE_BYTES, SIGNATURE_BYTES, Authenticate
from fedcli.workspace.layout import MANIFEST_SIGNATURE, UPDATE_SIGNATURE, Workspace
from fedcli.workspace.parsing import sha256
from fedcli.workspace.records import Identity, Manifest, PublicKeys
from fedcli.workspace.refusal import Arriving, Refusal
from fedcli.workspace.store import Folder

_WAIT = "Wait until it is copied. Where nothing copies it, ask the server's operator."
_ASK = "Ask the server's operator by telephone for the server's fingerprint; docs/OPERATIONS.md says more."


def read_chain(workspace: Workspace, identity: Identity, pins: Collection[str] = ()) -> Enrolment:
    """Read the enrolment and check every signature in it; `pins` are fingerprints that the server must have had.

    Raises IntegrityError with the first entry that is not the server's, or where the server is another.
    """
    try:
        return _checked(workspace, identity, pins)
    except IntegrityError:
        workspace.store.forget()  # a copy on this machine, that may have been made before the place was mended
        raise


def _checked(workspace: Workspace, identity: Identity, pins: Collection[str]) -> Enrolment:
    enrolment = read_enrolment(workspace, anew=True)
    if not enrolment.entries:
        raise IntegrityError(f"{workspace.enrolment} is empty: nothing says who the server is", hint=_ASK)
    server: PublicKeys | None = None
    known: dict[int, PublicKeys] = {}
    for stored in enrolment.entries:
        if problem := _fault(stored, identity.id, server, known):
            if len(stored.signature) < SIGNATURE_BYTES:
                name = stored.path.with_suffix(".sig").name
                raise ArrivingError(f"{stored.path}: {problem}: {name} is missing, or cut short", hint=_WAIT)
            raise IntegrityError(f"{stored.path}: {problem}", hint=_ASK)
        entry = stored.entry
        if entry.action == "server":
            server = entry.keys
        elif entry.client is not None and entry.keys is not None:
            known[entry.client] = entry.keys
    had = {fingerprint(stored.entry.keys) for stored in enrolment.entries if _is_servers(stored) and stored.entry.keys}
    for pin in pins:
        if pin not in had:
            assert server is not None
            raise IntegrityError(
                f"{workspace.address} is signed by another server than yours: {fingerprint(server)}, not {pin}",
                hint=_ASK,
            )
    return enrolment


def _is_servers(stored: StoredEntry) -> bool:
    return stored.entry.action == "server"


def _fault(stored: StoredEntry, workspace: str, server: PublicKeys | None, known: dict[int, PublicKeys]) -> str:
    """Return what is wrong with an entry that follows these; nothing where it is right."""
    entry = stored.entry
    if entry.workspace != workspace:
        return "belongs to another workspace"
    if (entry.action in ("server", "enrol")) != (entry.keys is not None) or _is_servers(stored) != (
        entry.client is None
    ):
        return f"says {entry.action} without what belongs to it, or with more"
    if server is None and not _is_servers(stored):
        return "comes before the server's keys"
    signers = [keys for keys in (server, entry.keys if _is_servers(stored) else None) if keys is not None]
    lines = stored.signature.split(b"\n")[:-1]
    if len(lines) != len(signers) or not all(
        is_signed(keys, line, "enrolment", workspace, stored.sha256) for keys, line in zip(signers, lines, strict=True)
    ):
        return "is not signed by the server"
    if entry.proof is not None and entry.client is not None and entry.keys is not None:
        old = known.get(entry.client)
        if old is None or not is_signed(old, entry.proof.encode(), "keys", workspace, digest_of(entry.keys)):
            return f"gives client {entry.client} new keys, and the old one did not sign them"
    return ""


def round_fault(current: Round, enrolment: Enrolment) -> str:
    """Return what is wrong with a round's signature; nothing where the server signed it."""
    manifest = current.manifest
    then = None if manifest.enrolment is None else enrolment.up_to(manifest.enrolment)
    if then is None or then.server is None:
        return "names an enrolment that is not the workspace's"
    path = current.folder / MANIFEST_SIGNATURE
    signature = read_if_there(current.workspace, path, MAX_SIGNATURE_BYTES)
    if not signature:
        return f"has no {MANIFEST_SIGNATURE}: the server did not sign it"
    if not is_signed(then.server, signature, "round", manifest.workspace, current.sha256):
        return f"has a {MANIFEST_SIGNATURE} that is not the server's, or of another manifest.json"
    return ""


def steps_back(current: Manifest, before: Manifest) -> bool:
    """Return whether a round names an earlier entry of the enrolment than the one before, as under rotated-out keys."""
    named, known = current.enrolment, before.enrolment
    return known is not None and (named is None or named.number < known.number)


def update_check(base: Round, enrolment: Enrolment) -> Authenticate:
    """Return what refuses the updates of a round that nobody of the enrolment signed: unenrolled, unsigned, signature.

    Who went on to new keys since the round was opened may have signed with either.
    """
    workspace, opened = base.manifest.workspace, base.manifest.enrolment

    def check(client: int, record: bytes, folder: Folder) -> None:
        if (gone := enrolment.gone.get(client)) is not None:
            raise Refusal("unenrolled", f"client {client} {'has left' if gone == 'leave' else 'was revoked'}")
        if client not in enrolment.members:
            raise Refusal("unenrolled", f"client {client} is not enrolled")
        signature = read_update_signature(folder)
        digest = sha256(record)
        if not any(
            is_signed(keys, signature, "update", workspace, digest) for keys in enrolment.keys_since(client, opened)
        ):
            raise Refusal("signature", f"{UPDATE_SIGNATURE} is not client {client}'s of this update.json")

    return check


def read_update_signature(folder: Folder) -> bytes:
    """Return update.sig; raise Arriving where it is not there yet, or cut short."""
    try:
        signature = folder.read(UPDATE_SIGNATURE, MAX_SIGNATURE_BYTES)
    except FileNotFoundError:
        signature = b""
    if len(signature) < SIGNATURE_BYTES:
        raise Arriving("unsigned", f"{UPDATE_SIGNATURE} is missing")
    return signature


def acknowledgement(key_signature: bytes, digest: str) -> bytes:
    """Return a countersignature as it is stored: the manifest's hash, and the signature."""
    return digest.encode() + b" " + key_signature


def parse_acknowledgement(contents: bytes) -> tuple[str, bytes]:
    """Return the hash that a countersignature names, and the signature."""
    digest, _, signature = contents.decode("ascii", "replace").partition(" ")
    return digest, signature.encode()


def read_small(workspace: Workspace, path: Path) -> bytes | None:
    """Return a signature that anybody may have put there; None where there is none, or something else."""
    try:
        return workspace.store.read(workspace.name(path), MAX_SIGNATURE_BYTES)
    except (FileNotFoundError, Refusal):
        return None
