"""What a party checks before it trains, and what it signs and keeps with its update; of a simulated client nothing."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Protocol

from fedcli.errors import ArrivingError, DeniedError, IntegrityError
from fedcli.observer import Observer
from fedcli.trust.history import note, read_history
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.history import Round
from fedcli.workspace.inbox import drop_update
from fedcli.workspace.layout import ADAPTER_CONFIG_NAME, UPDATE_RECORD, UPDATE_SIGNATURE, Home
from fedcli.workspace.parsing import sha256
from fedcli.workspace.registrations import read_party
from fedcli.workspace.window import counted_by_base, may_still_count, refused_by_base

_ASK = 'Do not train on it. Ask the server\'s operator by telephone; docs/OPERATIONS.md, "Incidents", says more.'


class Member(Protocol):
    """Who sends an update: a party, or a region; `num_rows` is None of a simulated client."""

    @property
    def client(self) -> int:
        """Its id."""

    @property
    def home(self) -> Home:
        """Its own folder."""

    @property
    def num_rows(self) -> int | None:
        """What it has registered."""


def check_past(federation: FederationState, party: Member, past: Sequence[Round], observer: Observer) -> None:
    """Raise IntegrityError where the workspace is not the one that a party has known, or the server did not sign it.

    Notes what came of the party's updates, and tells of those that were not counted.
    """
    if party.num_rows is None:
        return
    head, record = federation.head, read_party(party.home)
    rounds = [*past, head]
    for before, current in pairwise(rounds):
        if current.manifest.parent != before.sha256:
            raise IntegrityError(f"{current.folder} does not follow {before.folder}", hint=_ASK)
    known = _known(read_history(party.home.history))
    if (last := max(known, default=0)) > head.number:
        raise IntegrityError(
            f"{federation.workspace.rounds} ends with round {head.number}, and client {party.client} has seen round "
            f"{last}: the last rounds were taken back, or a fork is shown to you",
            hint=_ASK,
        )
    for current in rounds:
        if known.get(current.number) not in (None, current.sha256):
            raise IntegrityError(
                f"{current.folder} is not the round {current.number} that client {party.client} trained on: the past "
                "was rewritten, or a fork is shown to you",
                hint=_ASK,
            )
    pin = None if record is None else record.server
    if federation.identity.signatures is None:
        if pin is not None:
            raise IntegrityError(
                f"{federation.workspace.identity} no longer says that signatures are required, as when client "
                f"{party.client} joined",
                hint=_ASK,
            )
    else:
        from fedcli.trust.chain import read_chain, round_fault, steps_back  # without signatures no cryptography

        enrolment = read_chain(federation.workspace, federation.identity, [] if pin is None else [pin])
        named = head.manifest.enrolment
        if named is not None and named.number >= len(enrolment.entries):
            raise ArrivingError(
                f"{head.folder} was opened with entry {named.number} of the enrolment, which is not there",
                hint="Wait until it is copied. Where nothing copies it, ask the server's operator.",
            )
        if fault := round_fault(head, enrolment):
            raise IntegrityError(f"{head.folder} {fault}", hint=_ASK)
        for before, current in pairwise(rounds):
            if steps_back(current.manifest, before.manifest):
                raise IntegrityError(
                    f"{current.folder} names an earlier entry of the enrolment than the round before", hint=_ASK
                )
    _check_constant(federation, rounds)
    _note_outcomes(party, rounds, observer)


def _check_constant(federation: FederationState, rounds: Sequence[Round]) -> None:
    """Raise IntegrityError where a round is another task's, base's or adapter's than round 0, or than fedcli.yaml's."""
    fixed, start = federation.config.fixed(), rounds[0].manifest
    for current in rounds:
        manifest = current.manifest
        model = manifest.model
        odd = [name for name in ("task", "model", "tensors") if getattr(manifest, name) != getattr(start, name)]
        odd += [] if manifest.files.get(ADAPTER_CONFIG_NAME) == start.files.get(ADAPTER_CONFIG_NAME) else ["adapter"]
        odd += [] if manifest.task == fixed["task"] else ["task"]
        odd += [key for key in ("quantization", "revision") if getattr(model, key) != fixed["model"][key]]
        odd += [] if manifest.train.seed == fixed["federation.seed"] else ["train.seed"]
        odd += [] if manifest.train.date == start.train.date else ["train.date"]
        if odd:
            raise IntegrityError(
                f"{current.folder} changes what was fixed when round 0 was opened: {', '.join(dict.fromkeys(odd))}",
                hint=_ASK,
            )


def commit_update(
    federation: FederationState,
    party: Member,
    files: Sequence[tuple[str, bytes]],
    record: bytes,
    observer: Observer,
) -> bool:
    """Publish an update, with a party's signature where that is required; return False where another one stands.

    First the party keeps what it sends, then it countersigns the round, and the update's own rename is the commit.
    """
    head, signed = federation.head, [*files]
    if party.num_rows is not None:
        facts = {"rows": party.num_rows, "bytes": sum(len(contents) for _, contents in files) + len(record)}
        note(party.home.history, "sent", round=head.number, manifest=head.sha256, update=sha256(record), **facts)
    if party.num_rows is not None and federation.identity.signatures is not None:
        from fedcli.parties.membership import own_key
        from fedcli.trust.chain import acknowledgement, read_chain

        key = own_key(party.home, party.client, read_chain(federation.workspace, federation.identity))
        workspace, identity = federation.workspace, federation.identity.id
        signed.append((UPDATE_SIGNATURE, key.sign("update", identity, sha256(record))))
        seen = acknowledgement(key.sign("ack", identity, head.sha256), head.sha256)
        path = workspace.acknowledgement(party.client, head.number)
        try:
            workspace.store.put(workspace.name(path), seen)
        except DeniedError:  # another user of a shared folder took the name: it costs a witness, not the update
            observer.noted(f"{path.parent} is not client {party.client}'s own: the round is not countersigned")
    return drop_update(head, party.client, [*signed, (UPDATE_RECORD, record)])


def _known(lines: Iterable[dict[str, Any]]) -> dict[int, str]:
    """Return the hashes of the manifests that a party has seen, by round."""
    known: dict[int, str] = {}
    for line in lines:
        match line:
            case {"event": "sent", "round": int(number), "manifest": str(digest)}:
                known[number] = digest
            case {"event": "outcome", "round": int(number), "next": str(digest)}:
                known[number + 1] = digest
    return known


def _note_outcomes(party: Member, rounds: Sequence[Round], observer: Observer) -> None:
    """Note what came of updates that were sent, once: counted, refused with its code, surplus or missing."""
    home, client = party.home, party.client
    lines = list(read_history(home.history))
    told = {line.get("round") for line in lines if line.get("event") == "outcome"}
    sent = {line.get("round"): line.get("update") for line in lines if line.get("event") == "sent"}
    all_counted, all_refused = counted_by_base(rounds), refused_by_base(rounds)
    for current in rounds[1:]:
        number, merge = current.number - 1, current.manifest.aggregation
        if number in told or number not in sent or merge is None:
            continue
        counted, refused = all_counted.get(number, {}), all_refused.get(number, {})
        if client in counted:
            result = "counted" if counted[client] in _updates(lines, number) else "counted another update"
        elif client not in refused and may_still_count(rounds, number):
            continue
        else:
            result = refused.get(client) or ("surplus" if client in merge.surplus else "missing")
        note(home.history, "outcome", round=number, result=result, next=current.sha256)
        if result not in ("counted", "surplus"):
            observer.noted(f"client {client}: {current.folder} says of its update of round {number}: {result}")


def _updates(lines: Sequence[dict[str, object]], number: int) -> set[object]:
    return {line.get("update") for line in lines if line.get("event") == "sent" and line.get("round") == number}
