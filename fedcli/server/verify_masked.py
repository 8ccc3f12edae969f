"""The sum of masked updates, computed again by `fedcli verify` from them and from what their clients revealed."""

from collections.abc import Mapping
from pathlib import Path

from fedcli.config import algorithm_from
from fedcli.errors import FedError, IntegrityError
from fedcli.observer import Observer
from fedcli.secure_aggregation.terms import Terms
from fedcli.server.masked_sum import check_agreement, finish, read_all, reveal
from fedcli.server.secure_round import commitments_of, read_answers
from fedcli.server.updates_again import ANOTHER, check_record, gone_updates, is_reduced, no_longer_valid
from fedcli.server.verification import Verification
from fedcli.server.verify_signatures import gone_clients
from fedcli.trust.attempts import check_server, masked_check, terms_of
from fedcli.workspace.enrolment import Enrolment, read_enrolment
from fedcli.workspace.history import Round, is_hidden
from fedcli.workspace.layout import PRUNED
from fedcli.workspace.merge_records import Aggregation
from fedcli.workspace.secure_files import Stored, read_attempt, read_repair
from fedcli.workspace.secure_records import AttemptRecord, RepairRecord


def recompute_masked(
    current: Round, aggregation: Aggregation, base: Round, num_clients: int, result: Verification
) -> Mapping[str, bytes] | None:
    """Return the files that the sum of a round's masked updates gives; None where it cannot be had, or that is told."""
    entries = {entry.client: entry for entry in aggregation.counted}
    hidden = [client for client in entries if is_hidden(current.workspace, client)]
    pruned = base.has(PRUNED) and is_reduced(base)
    result.num_hidden += len(hidden)
    try:
        enrolment = read_enrolment(current.workspace)
        then = enrolment.up_to(current.manifest.enrolment) or Enrolment()
        attempt, terms, repair = _started(base, aggregation, then)
        _check_sum(terms, aggregation, repair)
        seen = [client for client in sorted(entries) if client not in hidden]
        if pruned:
            result.num_pruned += not hidden
            for client in seen:
                check_record(base, entries[client], result, is_pruned=True)
            return None
        gone = gone_updates(base, seen)
        for client in gone:
            check_record(base, entries[client], result)
        whole = [client for client in seen if client not in gone]
        authenticate = masked_check(attempt, then, is_counted=True)
        reading = read_all(base, whole, attempt.sha256, authenticate, Observer())
        result.num_updates += len(reading.counted)
        lost = [(refused.client, no_longer_valid(refused)) for refused in reading.refused]
        lost += [(entry.client, ANOTHER) for entry in reading.counted if entry.update != entries[entry.client].update]
        for client, problem in lost:
            result.report(base.workspace.update(base.number, client), problem)
        if lost or hidden or gone:
            return None
        check_agreement(reading)
        algorithm = algorithm_from(aggregation.algorithm)
        revelation, answers = None, None
        if repair is not None:
            revealed, answers, _ = read_answers(base, attempt, repair, then, repair.record.clients)
            assert aggregation.secure is not None
            recorded = {int(client): digest for client, digest in aggregation.secure.answers.items()}
            for client in [client for client in recorded if answers.get(client) != recorded[client]]:
                result.remark(base.workspace.answer(base.number, client), "is not the answer that was used, or is gone")
                return None
            revealed = {client: answer for client, answer in revealed.items() if client in recorded}
            answers = recorded
            revelation = reveal(terms, repair.record, commitments_of(base, repair.record), revealed)
            if revelation.lacking:
                result.report(current.folder, f"does not have the answers for the masks of {revelation.lacking}")
                return None
        num_left = num_clients - len(gone_clients(current))
        files, again = finish(
            reading, terms, algorithm, num_left, attempt.sha256, repair, revelation, answers, is_again=True
        )
    except FedError as error:
        if isinstance(error.__cause__, OSError):
            raise
        result.report(current.folder, f"cannot be computed again: {error}")
        return None
    if (again.counted, again.secure) != (aggregation.counted, aggregation.secure):
        result.report(current.folder, "records other updates, sizes or weights than those summed")
    return files


def _started(
    base: Round, aggregation: Aggregation, enrolment: Enrolment
) -> tuple[Stored[AttemptRecord], Terms, Stored[RepairRecord] | None]:
    """Return the attempt and the repair that a round names; raise IntegrityError where others, or none, stand there."""
    named, attempt, repair = aggregation.secure, read_attempt(base), read_repair(base)
    hint = "Restore attempts/ and repair/ from a backup."
    if named is None or attempt is None or named.attempt != attempt.sha256:
        path: Path = base.workspace.attempt(base.number)
        raise IntegrityError(f"{path} is not the attempt that the round was summed in", hint=hint)
    if named.repair != (None if repair is None else repair.sha256):
        path = base.workspace.repair_of(base.number)
        raise IntegrityError(f"{path} is not the repair that the round was summed by", hint=hint)
    check_server(base, enrolment, "attempt", attempt)
    if repair is not None:
        check_server(base, enrolment, "repair", repair)
    return attempt, terms_of(base, attempt, enrolment), repair


def _check_sum(terms: Terms, aggregation: Aggregation, repair: Stored[RepairRecord] | None) -> None:
    """Raise IntegrityError where another sum was published than the one that the clients were asked for."""
    counted = {str(entry.client): entry.update for entry in aggregation.counted}
    dropped = [client for client in terms.cohort if str(client) not in counted]
    problem = terms.fault_of_sum([*map(int, counted)], dropped)
    if repair is not None and (repair.record.counted, repair.record.dropped) != (counted, dropped):
        problem = "its repair names other updates"
    elif repair is None and (dropped or terms.mode == "double"):
        problem = "nobody was asked for what is left of masks"
    if problem is not None:
        raise IntegrityError(f"the sum is none that may be: {problem}", hint="Ask the server's operator.")
