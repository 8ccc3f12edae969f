"""The server's part in a round of secure aggregation: who takes part, whose sum may be revealed, and the merge.

Each step is one file that the first to write it fixes; a call makes the next one that is due.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict

from fedcli.algos import Algorithm
from fedcli.config import algorithm_from
from fedcli.errors import IntegrityError, NotReadyError, UsageError
from fedcli.observer import Observer
from fedcli.quantities import describe_seconds, name_clients
from fedcli.secure_aggregation.terms import Terms
from fedcli.server.attempts import fewest_in, start_attempt
from fedcli.server.enrol import ServerTrust, hint_to_enrol
from fedcli.server.masked_sum import (
    Reading,
    check_agreement,
    check_algorithm,
    finish,
    read_all,
    reveal,
)
from fedcli.server.merge import unchanged_files
from fedcli.server.quorum import needed_answers, seconds_left
from fedcli.trust.attempts import check_server, is_signed_since, masked_check, terms_of
from fedcli.workspace.enrolment import Enrolment
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.history import Round
from fedcli.workspace.inbox import read_update_record
from fedcli.workspace.layout import ATTEMPT
from fedcli.workspace.merge_records import Aggregation
from fedcli.workspace.parsing import sealed, sha256
from fedcli.workspace.records import file_entry
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.registrations import foreign_clients
from fedcli.workspace.secure_files import (
    Stored,
    publish_signed,
    put_shares,
    read_answer,
    read_attempt,
    read_repair,
    traces,
)
from fedcli.workspace.secure_records import AnswerRecord, AttemptRecord, MaskedUpdate, RepairRecord, RepairShares

_ABANDON = "`fedcli server aggregate --abandon` ends the round without its updates"


def merge_masked(
    federation: FederationState,
    algorithm: Algorithm,
    trust: ServerTrust,
    *,
    partial: bool,
    dry_run: bool,
    observer: Observer,
) -> tuple[dict[str, bytes], Aggregation]:
    """Return the next round's files of the masked updates' sum, once it is known.

    Raises NotReadyError with what is waited for: enrolments, updates, or answers to the repair that this publishes.
    """
    base = federation.head
    check_algorithm(base, algorithm, algorithm_from(base.manifest.algorithm))
    wanted = federation.config.aggregation
    names: list[str] = [wanted.rule] if not wanted.as_rule().is_plain_mean else []
    names += [wanted.step_weighting] if wanted.step_weighting != "none" else []
    if names:
        told = " and ".join(names)
        observer.noted(f"aggregation: {told} holds from the next round on: the updates of this one are masked")
    left = seconds_left(federation)
    goes_on = partial or (left is not None and left <= 0)
    if (dry_run and read_attempt(base) is None) or not start_attempt(federation, trust, goes_on=goes_on):
        raise _waits_for_enrolment(federation, trust)
    attempt = read_attempt(base)
    assert attempt is not None
    check_server(base, trust.enrolment, "attempt", attempt)
    terms = terms_of(base, attempt, trust.enrolment)
    num_clients = federation.config.federation.clients - len(trust.enrolment.gone)
    if (repair := read_repair(base)) is not None:
        check_server(base, trust.enrolment, "repair", repair)
        return _merge_repaired(base, algorithm, trust, terms, attempt, repair, num_clients, observer)
    needed = max(terms.fewest, min(1 if goes_on else needed_answers(federation), len(terms.cohort)))
    reading = _read_updates(federation, trust, terms, attempt, needed, observer)
    dropped = [client for client in terms.cohort if client not in reading.records]
    check_agreement(reading)
    if terms.mode == "pairwise":
        if not dropped:
            return finish(reading, terms, algorithm, num_clients, attempt.sha256)
        _check_nothing_lies_there(base, reading, dropped)
    if not dry_run:
        _publish_repair(base, trust, terms, attempt, reading, dropped)
    raise NotReadyError(
        f"round {base.number} has {len(reading.records)} masked updates, and waits for their clients' answers to "
        f"{'a repair' if dry_run else base.workspace.repair_of(base.number)}: {_names(reading.clients)}",
        hint=f"Each runs `fedcli client train --id {reading.clients[0]}` (its own id) once more.",
    )


def abandon(federation: FederationState, algorithm: Algorithm) -> tuple[dict[str, bytes], Aggregation]:
    """Return the next round's files of a round that ends without its updates; raise UsageError for any other."""
    base = federation.head
    if base.manifest.secure_aggregation is None:
        raise UsageError(
            f"--abandon: round {base.number} has no secure aggregation",
            hint="Merge what is there with --partial, or set updates aside with `fedcli server discard`.",
        )
    return unchanged_files(base, algorithm), Aggregation(
        algorithm=asdict(algorithm), counted=[], refused=[], missing=base.manifest.cohort
    )


def _waits_for_enrolment(federation: FederationState, trust: ServerTrust) -> NotReadyError:
    base = federation.head
    members, gone = trust.enrolment.members, trust.enrolment.gone
    absent = [client for client in base.manifest.cohort if client not in members and client not in gone]
    enrolled = [client for client in base.manifest.cohort if client in members]
    applicants = trust.unenrolled(absent)
    hint = hint_to_enrol(applicants) if applicants else "The others join, and are enrolled"
    if len(enrolled) >= fewest_in(base):
        hint += ", or go on without them: `server aggregate --partial`"
    elif not absent:
        hint = f"Too few of the cohort are left: {_ABANDON}"
    return NotReadyError(
        f"round {base.number} cannot be masked yet: {len(enrolled)} of its {len(base.manifest.cohort)} clients are "
        f"enrolled, not {_names(absent) or 'those who left'}; at least {fewest_in(base)} must be",
        hint=f"{hint}.",
    )


def _names(clients: Sequence[int]) -> str:
    return ", ".join(map(str, clients))


def _read_updates(
    federation: FederationState,
    trust: ServerTrust,
    terms: Terms,
    attempt: Stored[AttemptRecord],
    needed: int,
    observer: Observer,
) -> Reading:
    """Read the updates of those who take part; raise NotReadyError where fewer than needed are valid."""
    base = federation.head
    present = [client for client in terms.cohort if base.has_update(client) and client not in trust.enrolment.gone]
    foreign = foreign_clients(base.workspace, present)
    present = [client for client in present if client not in foreign]
    if len(present) < needed:
        raise _waits_for_updates(federation, trust, terms, present, [], needed)
    reading = read_all(base, present, attempt.sha256, masked_check(attempt, trust.enrolment), observer)
    if len(reading.records) < needed:
        faults = [f"client {refused.client}: {refused.code}" for refused in reading.refused]
        raise _waits_for_updates(federation, trust, terms, reading.clients, faults, needed)
    return reading


def _waits_for_updates(
    federation: FederationState,
    trust: ServerTrust,
    terms: Terms,
    answered: Collection[int],
    faults: Sequence[str],
    needed: int,
) -> NotReadyError:
    base = federation.head
    absent = [client for client in terms.cohort if client not in answered and client not in trust.enrolment.gone]
    hint = f"Run `fedcli client train --id {absent[0]}`" if absent else f"Nobody is left to wait for: {_ABANDON}"
    if faults:
        hint = f"Set a refused update aside with `fedcli server discard --id {absent[0]}`; its client sends it again"
    if len(answered) >= terms.fewest:
        hint += ", or go on without them: `server aggregate --partial`"
    elif needed == terms.fewest and absent:
        hint += f". No fewer than {terms.fewest} are ever summed; {_ABANDON}"
    left = seconds_left(federation)
    if left is not None and left > 0:
        hint += f". The deadline is in {describe_seconds(left)}; then {terms.fewest} valid updates are enough"
    told = "".join(f"\n  {fault}" for fault in faults)
    return NotReadyError(
        f"round {base.number} waits for {needed - len(answered)} more of the {len(terms.cohort)} masked updates; "
        f"{f'missing: {_names(absent)}' if absent else 'nobody is left to send one'}{told}",
        hint=f"{hint}.",
    )


def _check_nothing_lies_there(base: Round, reading: Reading, dropped: Sequence[int]) -> None:
    """Raise NotReadyError where something of a missing client's update lies in the inbox: a repair would unmask it."""
    store, name = base.workspace.store, base.workspace.name
    for client in dropped:
        store.sweep(name(base.workspace.client_inbox(client)))
    held = {client: found for client in dropped if (found := traces(base, client))}
    if held:
        codes = {refused.client: refused.code for refused in reading.refused}
        told = "; ".join(f"inbox/{client}/{found[0]}" for client, found in held.items())
        first = min(held)
        raise NotReadyError(
            f"round {base.number} cannot go on without {name_clients(sorted(held))}: {told} lies there, and a repair "
            f"would tell the server what is in it{f' ({codes[first]})' if first in codes else ''}",
            hint=f"`fedcli server discard --id {first}` removes it; its client can then send it again. {_ABANDON}; "
            "privacy.secure_aggregation: double has no such case.",
        )


def _publish_repair(
    base: Round,
    trust: ServerTrust,
    terms: Terms,
    attempt: Stored[AttemptRecord],
    reading: Reading,
    dropped: Sequence[int],
) -> None:
    """Publish whose sum is wanted; with `double` the shares that the counted clients sealed for each other."""
    shares = None
    if terms.mode == "double":
        names = ("self", *map(str, dropped))
        holders = {*map(str, reading.clients)}
        sealed_parts = {
            str(client): {
                name: {to: part for to, part in parts.items() if to in holders}
                for name, parts in found.items()
                if name in names
            }
            for client, found in sorted(reading.shares.items())
        }
        contents = sealed(RepairShares.model_validate({"sealed": sealed_parts}))
        put_shares(base, contents)
        shares = file_entry(contents)
    record = RepairRecord(
        workspace=base.manifest.workspace,
        round=base.number,
        attempt=ATTEMPT,
        base=base.sha256,
        started=attempt.sha256,
        counted={str(entry.client): entry.update for entry in reading.counted},
        dropped=[*dropped],
        shares=shares,
    )
    contents = sealed(record)
    publish_signed(base, base.workspace.repair_of(base.number), contents, trust.sign("repair", contents))


def read_answers(
    base: Round,
    attempt: Stored[AttemptRecord],
    repair: Stored[RepairRecord],
    enrolment: Enrolment,
    clients: Sequence[int],
) -> tuple[dict[int, AnswerRecord], dict[int, str], dict[int, str]]:
    """Return the valid answers to a repair, their hashes, and what is wrong with others, by client."""
    answers, hashes, faults = {}, {}, {}
    for client in clients:
        try:
            found = read_answer(base, client, repair.sha256)
            if found is None:
                continue
            record, contents, signature = found
            digest = sha256(contents)
            if not is_signed_since(enrolment, client, attempt, signature, "answer", digest):
                raise Refusal("signature", "answer.sig is not the client's of this answer.json")
            answers[client], hashes[client] = record, digest
        except Refusal as refusal:
            faults[client] = f"{refusal.code}: {refusal.reason}"
    return answers, hashes, faults


def commitments_of(base: Round, repair: RepairRecord) -> dict[int, dict[str, str]]:
    """Return what the counted clients committed themselves to; raise IntegrityError where an update is another now."""
    found = {}
    for client in repair.clients:
        path = base.workspace.update(base.number, client)
        try:
            contents = read_update_record(base, client)
        except (FileNotFoundError, Refusal) as error:
            raise _changed(path, str(error)) from error
        if sha256(contents) != repair.counted[str(client)]:
            raise _changed(path, "its hash differs")
        found[client] = MaskedUpdate.model_validate_json(contents).commitments
    return found


def _changed(path: object, problem: str) -> IntegrityError:
    return IntegrityError(
        f"{path} is not the update that the repair counts: {problem}",
        hint=f"Its client puts it back with `fedcli client train`, once it is gone; or {_ABANDON}.",
    )


def _merge_repaired(
    base: Round,
    algorithm: Algorithm,
    trust: ServerTrust,
    terms: Terms,
    attempt: Stored[AttemptRecord],
    repair: Stored[RepairRecord],
    num_clients: int,
    observer: Observer,
) -> tuple[dict[str, bytes], Aggregation]:
    clients = repair.record.clients
    answers, hashes, faults = read_answers(base, attempt, repair, trust.enrolment, clients)
    needed = terms.fewest if terms.mode == "double" else len(clients)
    silent = [client for client in clients if client not in answers]
    told = "".join(f"\n  client {client}: {fault}" for client, fault in faults.items())
    if len(answers) >= needed:
        revelation = reveal(terms, repair.record, commitments_of(base, repair.record), answers)
        if not revelation.lacking:
            reading = read_all(
                base, clients, attempt.sha256, masked_check(attempt, trust.enrolment, is_counted=True), observer
            )
            found = {str(entry.client): entry.update for entry in reading.counted}
            for client in clients:
                if found.get(str(client)) != repair.record.counted[str(client)]:
                    raise _changed(base.workspace.update(base.number, client), "it was, when it was checked")
            return finish(reading, terms, algorithm, num_clients, attempt.sha256, repair, revelation, hashes)
        told += f"\n  the answers so far do not give the masks of {name_clients(revelation.lacking)}"
    if not silent:
        raise IntegrityError(
            f"round {base.number}'s sum cannot be had: all have answered{told}",
            hint=f"Ask who is named. {_ABANDON}.",
        )
    raise NotReadyError(
        f"round {base.number} waits for {max(1, needed - len(answers))} more answers to its repair, of: "
        f"{_names(silent)}{told}",
        hint=f"Each runs `fedcli client train --id {silent[0]}` (its own id) once more; without them {_ABANDON}.",
    )
