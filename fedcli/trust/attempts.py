"""Whether an attempt at secure aggregation, a repair and an answer to it are by who must have made them."""

from collections.abc import Collection
from typing import Any

from fedcli.errors import IntegrityError
from fedcli.secure_aggregation.terms import Terms
from fedcli.trust.chain import read_update_signature
from fedcli.trust.keys import Purpose, is_signed
from fedcli.workspace.enrolment import Enrolment
from fedcli.workspace.history import Round
from fedcli.workspace.inbox import Authenticate
from fedcli.workspace.layout import ATTEMPT, UPDATE_SIGNATURE
from fedcli.workspace.parsing import sha256
from fedcli.workspace.records import PublicKeys
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.secure_files import Stored
from fedcli.workspace.secure_records import AttemptRecord
from fedcli.workspace.store import Folder

_ASK = "Do not take part. Ask the server's operator by telephone; docs/OPERATIONS.md says more."


def check_server(base: Round, enrolment: Enrolment, purpose: Purpose, stored: Stored[Any]) -> None:
    """Raise IntegrityError where a record is not the server's, under its keys since the round was opened."""
    opened = base.manifest.enrolment
    keys = [
        entry.entry.keys
        for entry in enrolment.entries
        if entry.entry.action == "server" and entry.entry.keys is not None
    ]
    then = enrolment.up_to(opened)
    num_old = sum(entry.entry.action == "server" for entry in then.entries) - 1 if then is not None else 0
    if not any(
        is_signed(each, stored.signature, purpose, base.manifest.workspace, stored.sha256) for each in keys[num_old:]
    ):
        raise IntegrityError(f"{stored.path} is not signed by the server", hint=_ASK)


def terms_of(base: Round, attempt: Stored[AttemptRecord], enrolment: Enrolment) -> Terms:
    """Return what an attempt's parties agree on, under the keys that the enrolment gives them.

    Raises IntegrityError where nobody may take part in such an attempt.
    """
    record, manifest = attempt.record, base.manifest
    then, opened = enrolment.up_to(record.enrolment), manifest.enrolment
    problem = None
    if then is None or opened is None or record.enrolment.number < opened.number:
        problem = "names an enrolment that is not the workspace's"
    elif record.mode != manifest.secure_aggregation:
        problem = f"is of another kind than its round: {record.mode}"
    elif record.cohort != sorted({*record.cohort} & {*manifest.cohort}):
        problem = "has clients that are not of the round's cohort"
    elif strangers := [client for client in record.cohort if client not in then.members]:
        problem = f"has clients that are not enrolled: {strangers}"
    if problem is None and then is not None:
        terms = Terms(
            mode=record.mode,
            workspace=manifest.workspace,
            round=base.number,
            attempt=ATTEMPT,
            size=len(manifest.cohort),
            keys={client: bytes.fromhex(then.members[client].keys.seal) for client in record.cohort},
        )
        problem = terms.fault()
        if problem is None:
            return terms
    raise IntegrityError(f"{attempt.path}: {problem}", hint=_ASK)


def masked_check(attempt: Stored[AttemptRecord], enrolment: Enrolment, *, is_counted: bool = False) -> Authenticate:
    """Return what refuses masked updates that are not signed under the attempt's keys, or later ones of the client.

    Who has left or was revoked since counts no more, but where a repair `is_counted` on.
    """

    def check(client: int, record: bytes, folder: Folder) -> None:
        if not is_counted and (gone := enrolment.gone.get(client)) is not None:
            raise Refusal("unenrolled", f"client {client} {'has left' if gone == 'leave' else 'was revoked'}")
        signature = read_update_signature(folder)
        if not is_signed_since(enrolment, client, attempt, signature, "update", sha256(record)):
            raise Refusal("signature", f"{UPDATE_SIGNATURE} is not client {client}'s of this update.json")

    return check


def is_signed_since(
    enrolment: Enrolment,
    client: int,
    attempt: Stored[AttemptRecord],
    signature: bytes,
    purpose: Purpose,
    digest: str,
) -> bool:
    """Return whether a client signed, under the keys that it had when an attempt began, or later ones."""
    number = attempt.record.enrolment.number
    entries = [stored.entry for stored in enrolment.entries if stored.entry.client == client and stored.entry.keys]
    first = max((place for place, entry in enumerate(entries) if entry.number <= number), default=0)
    keys = [entry.keys for entry in entries[first:] if entry.keys is not None]
    return any(is_signed(each, signature, purpose, attempt.record.workspace, digest) for each in keys)


def unproven(enrolment: Enrolment, clients: Collection[int]) -> list[int]:
    """Return those of some clients that were enrolled under new keys which their old ones did not sign."""
    entries = [stored.entry for stored in enrolment.entries if stored.entry.keys is not None]
    known: dict[int, PublicKeys] = {}
    found = set()
    for entry in entries:
        if entry.client is not None and entry.keys is not None:
            if entry.proof is None and known.get(entry.client) not in (None, entry.keys):
                found.add(entry.client)
            known[entry.client] = entry.keys
    return sorted(found & {*clients})
