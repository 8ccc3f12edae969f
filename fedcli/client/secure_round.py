"""A party's part in a round of secure aggregation: a masked update, and the answer to one repair."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedcli.algos import Algorithm, Arrays
from fedcli.client.signing import Member, check_past, commit_update
from fedcli.errors import ConfigError, IntegrityError
from fedcli.observer import Observer
from fedcli.parties.membership import own_key
from fedcli.secure_aggregation.fixed_point import LARGEST, OutOfRange, Ring, to_ring
from fedcli.secure_aggregation.party import (
    Revealed,
    Secrets,
    make_secrets,
    mask,
    reveal_seeds,
    reveal_shares,
    share,
    unlocking_keys,
)
from fedcli.secure_aggregation.terms import Terms
from fedcli.trust.attempts import check_server, terms_of, unproven
from fedcli.trust.chain import read_chain
from fedcli.trust.history import note, read_history
from fedcli.trust.keys import KeyPair
from fedcli.workspace.client_state import remove_old_candidates, save_candidates
from fedcli.workspace.enrolment import Enrolment
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.history import Round
from fedcli.workspace.layout import ADAPTER_FILE, ATTEMPT, MASKED_FILE, SHARES_FILE
from fedcli.workspace.parsing import sealed, sha256
from fedcli.workspace.privacy_records import PrivacyClaim
from fedcli.workspace.records import PROTOCOL, file_entry
from fedcli.workspace.registrations import read_party
from fedcli.workspace.secure_files import (
    Stored,
    drop_answer,
    read_attempt,
    read_repair,
    read_shares,
    remove_update,
)
from fedcli.workspace.secure_journal import (
    Journal,
    forget_rounds,
    read_journal,
    read_values,
    save_values,
    write_journal,
)
from fedcli.workspace.secure_records import (
    WEIGHT,
    AnswerRecord,
    AttemptRecord,
    MaskedUpdate,
    RepairRecord,
    SharesFile,
    masked_header,
    masked_schema,
    num_masked,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

BLOCK = 2**16
"""Numbers that are brought to the ring at once."""


@dataclass(frozen=True)
class SecureRound:
    """A round that a party takes part in: its attempt, checked, and the keys that the party has in it."""

    federation: FederationState
    party: Member
    base: Round
    enrolment: Enrolment
    attempt: Stored[AttemptRecord]
    terms: Terms
    key: KeyPair
    journal: Journal | None

    @property
    def sealing(self) -> "X25519PrivateKey":
        """The private key that masks are made of."""
        return self.key.sealing


def enter(federation: FederationState, party: Member, observer: Observer) -> SecureRound:
    """Check the open round's attempt, and that a party may take part in it as it stands.

    Raises IntegrityError where the server, or whoever can write for it, asks for what may not be; ConfigError where the
    party's keys are others.
    """
    base, client = federation.head, party.client
    check_past(federation, party, federation.past(), observer)
    attempt = read_attempt(base)
    assert attempt is not None
    record = read_party(party.home)
    pins = [] if record is None or record.server is None else [record.server]
    enrolment = read_chain(federation.workspace, federation.identity, pins)
    check_server(base, enrolment, "attempt", attempt)
    terms = terms_of(base, attempt, enrolment)
    for other in unproven(enrolment, terms.cohort):
        observer.noted(
            f"client {other} has new keys that its old ones did not sign: ask it by telephone whether they are its. "
            "A server that puts itself in a party's place is one less to hide among"
        )
    key = own_key(party.home, client, enrolment)
    _remove_late(federation.past(), client)
    journal = read_journal(party.home, base.number, base.manifest.workspace)
    if journal is None and _has_sent(party, base):
        raise IntegrityError(
            f"{party.home.masked(base.number)} is gone, and client {client} has sent an update of round {base.number}: "
            "other numbers under the same masks would tell the server both",
            hint="Restore it from a backup of this very round, or sit the round out.",
        )
    if journal is not None and journal.attempt != attempt.sha256:
        raise IntegrityError(
            f"{attempt.path} is not the attempt that client {client} has masked its update for: a round has one",
            hint="Ask the server's operator: two sums of one round tell what is in the one and not in the other.",
        )
    if bytes.fromhex(key.public.seal) != terms.keys.get(client) and journal is None:
        raise ConfigError(
            f"round {base.number} counts on other keys of client {client} than those in {party.home.folder}",
            hint="New keys that were enrolled since hold from the next round on; name the home that has the old ones "
            "with --home.",
        )
    return SecureRound(federation, party, base, enrolment, attempt, terms, key, journal)


def _has_sent(party: Member, base: Round) -> bool:
    """Return whether a party's history has an update of a round."""
    lines = read_history(party.home.history)
    return any(line.get("event") == "sent" and line.get("manifest") == base.sha256 for line in lines)


def _remove_late(past: Sequence[Round], client: int) -> None:
    """Remove updates of past rounds whose masks others have revealed, as a kill between sending and looking leaves."""
    for base in past:
        if base.manifest.secure_aggregation == "pairwise" and base.has_update(client):
            repair = read_repair(base)
            if repair is not None and client in repair.record.dropped:
                remove_update(base, client)


def mask_and_drop(
    round_: SecureRound,
    algorithm: Algorithm,
    adapter: Arrays,
    files: Mapping[str, Arrays],
    kept: Mapping[str, Arrays],
    num_samples: int,
    observer: Observer,
    claim: PrivacyClaim | None = None,
) -> bool:
    """Mask what a client trained, and drop it; return False where an update stood there already.

    `files` are by name what the client would send in the clear: its adapter's values, and what the algorithm adds;
    `kept` is by folder what it keeps for the next round.
    """
    party, base = round_.party, round_.base
    numbers = _to_ring(base, algorithm, adapter, files, num_samples, party.client)
    values = save_values(party.home, base.number, numbers)
    secrets = make_secrets(round_.terms, round_.sealing, party.client)
    shares, unlock = None, {}
    if round_.terms.mode == "double":
        unlock = unlocking_keys(round_.terms, round_.sealing, party.client)
        packets = share(round_.terms, round_.sealing, party.client, secrets)
        hexed = {name: {str(to): part.hex() for to, part in parts.items()} for name, parts in packets.items()}
        shares = SharesFile(sealed=hexed).to_bytes()
    mask(numbers, party.client, secrets)
    contents = {MASKED_FILE: b"".join([masked_header(base.manifest), numbers.view(np.uint8).data])}
    contents |= {} if shares is None else {SHARES_FILE: shares}
    update = MaskedUpdate(
        protocol=PROTOCOL,
        workspace=base.manifest.workspace,
        round=base.number,
        base=base.sha256,
        client=party.client,
        attempt=ATTEMPT,
        started=round_.attempt.sha256,
        commitments=secrets.commitments(),
        files={name: file_entry(data) for name, data in contents.items()},
        privacy=claim,
    )
    record = sealed(update)
    remove_old_candidates(party.home, party.client, [*round_.federation.past(), base])
    save_candidates(party.home, base.number, sha256(record), kept)
    journal = Journal(
        workspace=base.manifest.workspace,
        round=base.number,
        attempt=round_.attempt.sha256,
        values=values,
        update=record.decode(),
        shares=None if shares is None else shares.decode(),
        seeds={str(other): seed.hex() for other, seed in secrets.seeds.items()},
        own=None if secrets.own is None else secrets.own.hex(),
        unlock={str(sender): key.hex() for sender, key in unlock.items()},
    )
    write_journal(party.home, journal)
    return _drop(round_, contents, record, observer)


def drop_again(round_: SecureRound, observer: Observer) -> bool:
    """Drop once more what a party has masked in this round, the same bytes; return False where it stands there."""
    journal, base = round_.journal, round_.base
    assert journal is not None
    numbers = read_values(round_.party.home, journal)
    mask(numbers, round_.party.client, _secrets(journal))
    contents = {MASKED_FILE: b"".join([masked_header(base.manifest), numbers.view(np.uint8).data])}
    if journal.shares is not None:
        contents[SHARES_FILE] = journal.shares.encode()
    return _drop(round_, contents, journal.update.encode(), observer)


def _drop(round_: SecureRound, contents: Mapping[str, bytes], record: bytes, observer: Observer) -> bool:
    """Publish an update; what a repair names as missing is taken back."""
    party, base = round_.party, round_.base
    if withdraw(round_, observer):  # others reveal its masks: it is not sent at all
        return False
    is_first = commit_update(round_.federation, party, [*contents.items()], record, observer)
    if withdraw(round_, observer):
        return False
    forget_rounds(party.home, base.number)
    return is_first


def withdraw(round_: SecureRound, observer: Observer) -> bool:
    """Take an update back that came too late: a repair names it as missing, and the others reveal its masks."""
    party, base = round_.party, round_.base
    repair = read_repair(base)
    if repair is None or party.client not in repair.record.dropped:
        return False
    if not base.has_update(party.client):
        return True
    remove_update(base, party.client)
    observer.noted(
        f"client {party.client}: {repair.path} says that its update is missing, and so the others reveal its masks: it "
        "was taken back. If it had been sent long before, the server does not keep to the protocol"
    )
    note(party.home.history, "withdrawn", round=base.number)
    return True


def _secrets(journal: Journal) -> Secrets:
    seeds = {int(other): bytes.fromhex(seed) for other, seed in journal.seeds.items()}
    return Secrets(seeds, None if journal.own is None else bytes.fromhex(journal.own))


def _to_ring(
    base: Round, algorithm: Algorithm, adapter: Arrays, files: Mapping[str, Arrays], num_samples: int, client: int
) -> Ring:
    """Return an update's numbers in fixed point: weighted differences, what else is sent, and the weight."""
    weight = base.weight(algorithm, num_samples)
    numbers = np.empty(num_masked(base.manifest), np.uint64)
    begin = 0
    try:
        for key in masked_schema(base.manifest):
            file, _, name = key.partition("/")
            if key == WEIGHT:
                numbers[begin : begin + 1] = to_ring(np.array([weight]))
                begin += 1
                continue
            values = np.asarray(files[file][name]).reshape(-1)
            origin = adapter[name].reshape(-1) if file == ADAPTER_FILE else None
            for start in range(0, values.size, BLOCK):
                block = values[start : start + BLOCK].astype(np.float64)
                if origin is not None:
                    block -= origin[start : start + BLOCK]
                numbers[begin : begin + block.size] = to_ring(block, weight if origin is not None else 1.0)
                begin += block.size
    except OutOfRange as error:
        raise ConfigError(
            f"client {client}'s update does not fit into secure aggregation: weighted by {weight:g}, {error}",
            hint=f"A weight, and each change times its weight, is {LARGEST:,.0f} at most: lower train.learning_rate, "
            "or join with fewer rows.",
        ) from error
    return numbers


def answer_repair(round_: SecureRound) -> bool:
    """Answer the repair of the open round, once it is sure that nothing but one sum follows; return False where it was.

    What is answered is written down before. Raises IntegrityError where the repair asks for what it may not.
    """
    party, base, journal = round_.party, round_.base, round_.journal
    repair = read_repair(base)
    assert repair is not None
    _check_repair(round_, repair)
    assert journal is not None
    revealed = _reveal(round_, repair.record, journal)
    answer = AnswerRecord(
        workspace=base.manifest.workspace,
        round=base.number,
        attempt=ATTEMPT,
        client=party.client,
        repair=repair.sha256,
        seeds={str(other): seed.hex() for other, seed in revealed.seeds.items()},
        shares={
            str(sender): {name: part.hex() for name, part in parts.items()} for sender, parts in revealed.shares.items()
        },
    )
    contents = sealed(answer)
    if journal.answered is None:
        write_journal(party.home, journal.model_copy(update={"answered": repair.sha256}))
        note(party.home.history, "answered", round=base.number, repair=repair.sha256, counted=repair.record.clients)
    signature = round_.key.sign("answer", base.manifest.workspace, sha256(contents))
    return drop_answer(base, party.client, contents, signature)


def _check_repair(round_: SecureRound, repair: Stored[RepairRecord]) -> None:
    """Raise IntegrityError where a repair is not the server's, or asks for more than one sum of enough updates."""
    record, client, journal = repair.record, round_.party.client, round_.journal
    check_server(round_.base, round_.enrolment, "repair", repair)
    problem = round_.terms.fault_of_sum(record.clients, record.dropped)
    if problem is None and record.started != round_.attempt.sha256:
        problem = "it is of another attempt"
    if problem is None and client not in record.clients:
        problem = f"it does not count client {client}"
    if problem is None and (journal is None or record.counted[str(client)] != sha256(journal.update.encode())):
        problem = f"it counts another update of client {client} than the one that it sent"
    if problem is None and round_.terms.mode == "pairwise" and not record.dropped:
        problem = "nobody is missing, and so nothing has to be revealed"
    if problem is None and journal is not None and journal.answered not in (None, repair.sha256):
        problem = f"client {client} has answered another repair of this round: {journal.answered}"
    if problem is not None:
        raise IntegrityError(
            f"{repair.path} asks for what client {client} does not reveal: {problem}",
            hint="Nothing was revealed. Ask the server's operator by telephone; docs/OPERATIONS.md says more.",
        )


def _reveal(round_: SecureRound, repair: RepairRecord, journal: Journal) -> Revealed:
    secrets = _secrets(journal)
    if round_.terms.mode == "pairwise":
        return reveal_seeds(secrets, repair.dropped)
    given = read_shares(round_.base, repair).sealed
    own = str(round_.party.client)
    unlock = {int(sender): bytes.fromhex(key) for sender, key in journal.unlock.items()}
    packets = {
        sender: {name: bytes.fromhex(parts.get(own, "")) for name, parts in given.get(str(sender), {}).items()}
        for sender in repair.clients
    }
    return reveal_shares(unlock, repair.dropped, packets)
