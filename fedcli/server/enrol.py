"""The server's side of trust: its keys, who is enrolled, left or was revoked, and what it signs."""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from fedcli.errors import IntegrityError, NotReadyError, UsageError, WorkspaceError
from fedcli.quantities import plural
from fedcli.trust.chain import read_chain, read_small, update_check
from fedcli.trust.history import note, read_history
from fedcli.trust.keys import (
    KeyPair,
    Purpose,
    digest_of,
    fingerprint,
    is_signed,
    keys_named,
    latest_keys,
    parse_fingerprint,
)
from fedcli.workspace.enrolment import Action, Enrolment, EnrolmentEntry, entry_bytes, read_enrolment, write_entry
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.history import Round, read_if_there
from fedcli.workspace.inbox import MAX_SIGNATURE_BYTES, Authenticate
from fedcli.workspace.layout import Home, Workspace, server_home
from fedcli.workspace.locks import hold
from fedcli.workspace.parsing import sha256
from fedcli.workspace.records import Identity, PublicKeys
from fedcli.workspace.registrations import MAX_REGISTRATION_BYTES, make_home, read_registration


@dataclass(frozen=True)
class ServerTrust:
    """The server's keys, and the enrolment as it stands, every entry of it checked."""

    workspace: Workspace
    identity: Identity
    home: Home
    key: KeyPair
    enrolment: Enrolment

    def check_updates(self, base: Round) -> Authenticate:
        """Return what refuses a round's updates that nobody of the enrolment signed."""
        return update_check(base, self.enrolment)

    def sign_round(self, record: bytes) -> bytes:
        """Return manifest.sig of a manifest.json."""
        return self.key.sign("round", self.identity.id, sha256(record))

    def sign(self, purpose: Purpose, record: bytes) -> bytes:
        """Return the signature of a record's bytes."""
        return self.key.sign(purpose, self.identity.id, sha256(record))

    def note_round(self, current: Round) -> None:
        """Keep which round this server published, and of which updates."""
        merge = current.manifest.aggregation
        counted = {str(entry.client): entry.update for entry in merge.counted} if merge else {}
        refused = {str(entry.client): entry.code for entry in merge.refused} if merge else {}
        facts = {"counted": counted, "refused": refused}
        note(self.home.history, "published", round=current.number, manifest=current.sha256, **facts)

    def append(
        self,
        action: Action,
        client: int | None = None,
        *,
        keys: PublicKeys | None = None,
        proof: str | None = None,
        also: KeyPair | None = None,
    ) -> "ServerTrust":
        """Append an entry to the enrolment; `also` is who signs beside the server. Returns what then stands."""
        head = self.enrolment.head
        entry = EnrolmentEntry(
            workspace=self.identity.id,
            number=len(self.enrolment.entries),
            parent=None if head is None else head.sha256,
            action=action,
            client=client,
            keys=keys,
            proof=proof,
            time=max(0.0, time.time()),
        )
        contents = entry_bytes(entry)
        signers = [self.key, *([] if also is None else [also])]
        signature = b"".join(key.sign("enrolment", self.identity.id, sha256(contents)) for key in signers)
        write_entry(self.workspace, entry, contents, signature)
        note(self.home.history, "enrolment", number=entry.number, sha256=sha256(contents), action=action, client=client)
        return replace(self, enrolment=read_enrolment(self.workspace))

    def unenrolled(self, clients: list[int]) -> dict[int, str]:
        """Return those of some clients who have joined and are not enrolled, with their fingerprints."""
        found = {}
        for client in clients:
            if client not in self.enrolment.members and client not in self.enrolment.gone:
                registration = None
                with suppress(IntegrityError):  # anybody can put garbage there: what it sends is refused
                    registration = read_registration(self.workspace, client)
                if registration is not None and registration.keys is not None:
                    found[client] = fingerprint(registration.keys)
        return found


def found_trust(workspace: Workspace, identity: Identity) -> ServerTrust | None:
    """Make the server's keys, and the enrolment's first entry, which names them; what is there already stays.

    Returns None where signatures are off.
    """
    if identity.signatures is None:
        return None
    home = server_home(identity.id)
    if workspace.store.names("enrolment") and read_enrolment(workspace).entries:
        return open_trust(workspace, identity)
    if home.folder.resolve().is_relative_to(workspace.root.resolve()):
        raise UsageError(
            f"{home.folder} lies in the workspace, where everybody could see the server's keys",
            hint="Name another folder with $FEDCLI_SERVER_HOME.",
        )
    make_home(home)
    key = latest_keys(home)
    return ServerTrust(workspace, identity, home, key, Enrolment()).append("server", keys=key.public)


def open_trust(workspace: Workspace, identity: Identity) -> ServerTrust | None:
    """Read the server's keys and check the whole enrolment; None where signatures are off.

    Raises WorkspaceError where the keys are not here, IntegrityError where the enrolment is not what this server made
    it.
    """
    if identity.signatures is None:
        return None
    home = server_home(identity.id)
    enrolment = read_chain(workspace, identity)
    assert enrolment.server is not None
    key = keys_named(home, enrolment.server)
    if key is None:
        raise WorkspaceError(
            f"the keys of this workspace's server, {fingerprint(enrolment.server)}, are not in {home.folder}",
            hint="Run this as the server's user on its machine, or name their folder with $FEDCLI_SERVER_HOME; "
            "docs/OPERATIONS.md says what to do where they are lost.",
        )
    for line in read_history(home.history):
        if line.get("event") == "enrolment":
            number = line.get("number", 0)
            if len(enrolment.entries) <= number or enrolment.entries[number].sha256 != line.get("sha256"):
                raise IntegrityError(
                    f"{workspace.enrolment} lacks entry {number} of this server: {line.get('action')} of client "
                    f"{line.get('client')}",
                    hint="Restore enrolment/ from a backup: somebody has cut it, or it is another's.",
                )
    return ServerTrust(workspace, identity, home, key, enrolment)


def current_trust(federation: FederationState) -> ServerTrust | None:
    """Return `open_trust` without those who have said that they leave; whoever calls holds the server's lock."""
    trust = open_trust(federation.workspace, federation.identity)
    if trust is None:
        return None
    for client, member in sorted(trust.enrolment.members.items()):
        word = read_small(trust.workspace, trust.workspace.leaving(client))
        if word is not None and is_signed(member.keys, word, "leave", trust.identity.id, member.entry):
            trust = trust.append("leave", client)
    return trust


def _required(trust: ServerTrust | None, federation: FederationState) -> ServerTrust:
    if trust is None:
        raise UsageError(
            f"signatures are off in {federation.workspace.address}: nobody is enrolled or revoked there",
            hint="`federation.signatures` is fixed by `fedcli init`: required where parties join.",
        )
    return trust


def read_applicant(federation: FederationState, client: int) -> tuple[PublicKeys, str, int | None]:
    """Return the keys that a joined party asks to be enrolled under, the old key's signature of them or "", its rows.

    Raises NotReadyError where it has not joined, IntegrityError where it has not signed its registration.
    """
    federation.check_clients([client])
    workspace = federation.workspace
    again = f"Let the party run `fedcli client join --id {client} --data SOURCE` again."
    registration = read_registration(workspace, client)
    contents = read_if_there(workspace, workspace.registration(client), MAX_REGISTRATION_BYTES)
    if registration is None or contents is None:
        hint = f"The party joins with `fedcli client join --id {client} --data SOURCE`."
        raise NotReadyError(f"client {client} has not joined", hint=hint)
    if registration.keys is None:
        raise NotReadyError(f"client {client} joined without keys, as with an earlier version", hint=again)
    lines = (read_if_there(workspace, workspace.registration_signature(client), MAX_SIGNATURE_BYTES) or b"").split()
    if not lines or not is_signed(registration.keys, lines[0], "client", federation.identity.id, sha256(contents)):
        raise IntegrityError(f"{workspace.registration(client)} is not signed by the keys that it names", hint=again)
    proof = lines[1].decode("ascii", "replace") if len(lines) > 1 else ""
    return registration.keys, proof, registration.data.num_rows


def enrol(federation: FederationState, client: int, given: str | None = None) -> tuple[str, bool]:
    """Enrol a joined party under the keys of its registration, whose fingerprint is `given`; or new keys of a party.

    New keys that the old key signed need no fingerprint. Returns the fingerprint, and whether an entry was made. Raises
    UsageError where a fingerprint is needed, IntegrityError where it is another.
    """
    with hold(federation.workspace.server_lock, "the server's work"):
        federation.refresh()
        trust = _required(current_trust(federation), federation)
        keys, proof, num_rows = read_applicant(federation, client)
        told, member = fingerprint(keys), trust.enrolment.members.get(client)
        if given is not None and parse_fingerprint(given) != told:
            raise IntegrityError(
                f"client {client}'s fingerprint is {told}, not {parse_fingerprint(given)}",
                hint="Ask the party what `fedcli keys show` prints there: somebody may have joined in its place.",
            )
        if member is not None and member.keys == keys:
            return told, False
        is_proven = member is not None and is_signed(
            member.keys, proof.encode(), "keys", federation.identity.id, digest_of(keys)
        )
        if given is None and not is_proven:
            rows = "does not tell how many rows it has" if num_rows is None else f"registers {plural(num_rows, 'row')}"
            raise UsageError(
                f"client {client} {rows}; its keys have the fingerprint {told}",
                hint="Compare it with the party by telephone, then run "
                f"`fedcli server enrol --id {client} --fingerprint {told}`.",
            )
        trust = trust.append("enrol", client, keys=keys, proof=proof if is_proven else None)
        if federation.head.manifest.secure_aggregation is not None:
            from fedcli.server.attempts import start_attempt

            start_attempt(federation, trust)
        return told, True


def revoke(federation: FederationState, client: int) -> bool:
    """Take a client out: it is drawn no more, not waited for, and its updates are refused. False where it is out."""
    federation.check_clients([client])
    with hold(federation.workspace.server_lock, "the server's work"):
        federation.refresh()
        trust = _required(current_trust(federation), federation)
        if trust.enrolment.gone.get(client) == "revoke":
            return False
        trust.append("revoke", client)
        return True


def rotate(federation: FederationState) -> str:
    """Give the server new keys, which the old and the new key sign; return their fingerprint."""
    with hold(federation.workspace.server_lock, "the server's work"):
        federation.refresh()
        trust = _required(current_trust(federation), federation)
        following = KeyPair.read(trust.home.next_keys)
        if following is None:
            following = KeyPair.make()
            following.write(trust.home.next_keys)
        trust.append("server", keys=following.public, also=following)
        assert keys_named(trust.home, following.public)
        return fingerprint(following.public)


def hint_to_enrol(unenrolled: Mapping[int, str]) -> str:
    """Return the one command that enrols the first of some clients."""
    client, told = min(unenrolled.items())
    return (
        f"Compare client {client}'s fingerprint with it by telephone, then run "
        f"`fedcli server enrol --id {client} --fingerprint {told}`"
    )
