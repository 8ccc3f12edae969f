"""What `fedcli verify` checks of signatures, of the parties' countersignatures, and of what this user knows itself."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from fedcli.errors import FedError, IntegrityError, UsageError
from fedcli.trust.history import read_history
from fedcli.workspace.enrolment import Enrolment, read_enrolment
from fedcli.workspace.history import Round
from fedcli.workspace.inbox import Authenticate, read_update_record
from fedcli.workspace.layout import MANIFEST_SIGNATURE, PRUNED, Home, Workspace, server_home
from fedcli.workspace.records import Identity, PublicKeys
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.registrations import own_homes, read_party
from fedcli.workspace.window import base_of

Report = Callable[[Path, str], None]


@dataclass
class Pins:
    """Keys that somebody vouches for, as `fedcli keys show --json` prints them."""

    workspace: str
    server: PublicKeys
    clients: dict[int, PublicKeys] = field(default_factory=dict)


def read_pins(path: Path) -> Pins:
    """Read pinned keys; raise UsageError where the file holds none."""
    try:
        document = json.loads(path.read_bytes())
        clients = {int(client): _keys(entry) for client, entry in document.get("clients", {}).items()}
        return Pins(str(document["workspace"]), _keys(document["server"]), clients)
    except OSError as error:
        raise UsageError(
            f"--trust {path}: {error.strerror}", hint="Name a file that `fedcli keys show --json` made."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"--trust {path} holds no keys", hint="Make it with `fedcli keys show --json > trust.json`."
        ) from error


def _keys(document: Mapping[str, str]) -> PublicKeys:
    return PublicKeys(sign=document["sign"], seal=document["seal"])


def check_of_merge(current: Round, base: Round) -> Authenticate | None:
    """Return what looked at the signatures of the updates of `base` that a round was merged of; None: nothing did."""
    if current.manifest.enrolment is None:
        return None
    from fedcli.trust.chain import update_check

    return update_check(base, _enrolment_of(current))


def gone_clients(current: Round) -> set[int]:
    """Return the clients that had left or were revoked when a round was made; raise IntegrityError for damage."""
    return set() if current.manifest.enrolment is None else {*_enrolment_of(current).gone}


def enrolled_clients(current: Round) -> set[int]:
    """Return the clients that were enrolled when a round was made; raise IntegrityError for damage."""
    return set() if current.manifest.enrolment is None else {*_enrolment_of(current).members}


def _enrolment_of(current: Round) -> Enrolment:
    return read_enrolment(current.workspace).up_to(current.manifest.enrolment) or Enrolment()


def check_signatures(
    workspace: Workspace, identity: Identity, rounds: Sequence[Round], pins: Pins | None, report: Report, remark: Report
) -> int:
    """Check who signed what in these rounds, all that there are; return how many signatures are right.

    `remark` hears of what is no violation.
    """
    homes = own_homes(identity.id)
    for client, home in homes.items():
        _check_party_history(home, client, rounds, report)
    if identity.signatures is None:
        if pins is not None or any(current.manifest.enrolment or current.has(MANIFEST_SIGNATURE) for current in rounds):
            report(workspace.identity, "does not say that signatures are required, and they were, or are to be checked")
        return 0
    from fedcli.trust.chain import read_chain
    from fedcli.trust.keys import KeyPair, fingerprint

    own = server_home(identity.id)
    records = [record for home in homes.values() if (record := read_party(home)) is not None]
    trusted = {record.server for record in records if record.server is not None}
    try:
        own_keys = KeyPair.read(own.keys)
    except FedError as error:
        report(own.keys, error.message)
        own_keys = None
    trusted |= set() if own_keys is None else {fingerprint(own_keys.public)}
    if pins is not None:
        if pins.workspace != identity.id:
            report(workspace.identity, f"is workspace {identity.id}, and the pinned keys are of {pins.workspace}")
        trusted.add(fingerprint(pins.server))
    try:
        enrolment = read_chain(workspace, identity, sorted(trusted))
    except IntegrityError as error:
        report(workspace.enrolment, error.message)
        return 0
    _check_server_history(own, rounds, enrolment, report)
    for client, keys in ({} if pins is None else pins.clients).items():
        _check_pin(client, keys, enrolment, report)
    return (
        len(enrolment.entries)
        + _check_rounds(rounds, enrolment, report)
        + _check_pruned(rounds, enrolment, report)
        + _check_acknowledgements(workspace, rounds, enrolment, report, remark)
    )


def _check_rounds(rounds: Sequence[Round], enrolment: Enrolment, report: Report) -> int:
    """Every manifest.json is signed by the server of its time, and the enrolment only grows."""
    from fedcli.trust.chain import round_fault

    num_right, last = 0, 0
    for current in rounds:
        if fault := round_fault(current, enrolment):
            report(current.folder, fault)
        else:
            num_right += 1
        head = current.manifest.enrolment
        if head is not None and head.number < last:
            report(current.folder, "names an earlier entry of the enrolment than the round before")
        last = last if head is None else head.number
        if head is not None:
            then = enrolment.up_to(head) or Enrolment()
            gone = sorted(client for client in current.manifest.cohort if client in then.gone)
            if gone:
                report(current.folder, f"draws clients that had left or were revoked: {gone}")
    return num_right


def _check_pruned(rounds: Sequence[Round], enrolment: Enrolment, report: Report) -> int:
    """Where `gc` has been, update.sig of what was counted is the client's; elsewhere the merge is done again."""
    from fedcli.trust.chain import update_check

    num_right, known = 0, {each.number: each for each in rounds}
    for before, current in pairwise(rounds):
        merge, head = current.manifest.aggregation, current.manifest.enrolment
        if merge is None or head is None:
            continue
        check = update_check(before, enrolment.up_to(head) or Enrolment())
        if before.manifest.secure_aggregation is not None and merge.counted:
            try:
                check = _masked_check(before, enrolment)
            except IntegrityError as error:
                report(before.workspace.attempt(before.number), error.message)
                continue
        for entry in merge.counted:
            if entry.base is not None:
                if entry.base not in known:
                    continue
                before = known[entry.base]
                check = update_check(before, enrolment.up_to(head) or Enrolment())
            workspace, path = current.workspace, current.workspace.update(before.number, entry.client)
            try:
                with workspace.store.opened(workspace.name(path)) as folder:
                    check(entry.client, read_update_record(before, entry.client), folder)
                num_right += 1
            except Refusal as refusal:
                if before.has(PRUNED):
                    report(path, f"was counted, and is not valid any more: {refusal.code}: {refusal.reason}")
            except (OSError, FedError):  # hidden or gone: what counts updates again tells it
                continue
    return num_right


def _masked_check(before: Round, enrolment: Enrolment) -> Authenticate:
    """Return what looks at the signatures of masked updates; what is wrong with the attempt is told elsewhere."""
    from fedcli.trust.attempts import masked_check
    from fedcli.workspace.secure_files import read_attempt

    attempt = read_attempt(before)
    if attempt is None:
        raise IntegrityError(f"{before.workspace.attempt(before.number)} is missing", hint="Restore it from a backup.")
    return masked_check(attempt, enrolment, is_counted=True)


def _check_acknowledgements(
    workspace: Workspace, rounds: Sequence[Round], enrolment: Enrolment, report: Report, remark: Report
) -> int:
    """Who countersigned a round has seen this very one."""
    from fedcli.trust.chain import parse_acknowledgement, read_small
    from fedcli.trust.keys import is_signed

    keys: dict[int, list[PublicKeys]] = {}
    for stored in enrolment.entries:
        if stored.entry.client is not None and stored.entry.keys is not None:
            keys.setdefault(stored.entry.client, []).append(stored.entry.keys)
    num_right = 0
    for current in rounds:
        for client in current.manifest.cohort:
            path = workspace.acknowledgement(client, current.number)
            contents = read_small(workspace, path)
            if contents is None or client not in keys:
                continue
            digest, signature = parse_acknowledgement(contents)
            if not any(is_signed(each, signature, "ack", current.manifest.workspace, digest) for each in keys[client]):
                remark(path, f"is not client {client}'s signature: whoever may write there put it, and it says nothing")
            elif digest != current.sha256:
                report(
                    path,
                    f"client {client} countersigned another round {current.number}, {digest[:12]}, than the one that "
                    f"stands, {current.sha256[:12]}: a fork was shown to it, or the past was rewritten",
                )
            else:
                num_right += 1
    return num_right


def _check_pin(client: int, pinned: PublicKeys, enrolment: Enrolment, report: Report) -> None:
    """A pinned key was enrolled, and whatever keys came after it were signed by the ones before."""
    entries = [stored for stored in enrolment.entries if stored.entry.client == client and stored.entry.keys]
    places = [place for place, stored in enumerate(entries) if stored.entry.keys == pinned]
    if not places:
        where = entries[-1].path if entries else Path(f"client {client}")
        report(where, f"client {client} is not enrolled under its pinned keys")
        return
    for before, stored in zip(entries[places[-1] :], entries[places[-1] + 1 :], strict=False):
        if stored.entry.proof is None and stored.entry.keys != before.entry.keys:
            report(stored.path, f"client {client} has new keys, which its pinned ones did not sign")


def _check_server_history(home: Home, rounds: Sequence[Round], enrolment: Enrolment, report: Report) -> None:
    """What this server published and enrolled is what stands."""
    lines = [*read_history(home.history)]
    published = {line.get("round"): line.get("manifest") for line in lines if line.get("event") == "published"}
    _compare(published, rounds, "is not the round that this server published", report)
    for line in lines:
        number = line.get("number")
        if line.get("event") == "enrolment" and isinstance(number, int):
            stands = enrolment.entries[number].sha256 if number < len(enrolment.entries) else None
            if stands != line.get("sha256"):
                report(
                    home.history, f"this server made another entry {number} of the enrolment than the one that stands"
                )


def _check_party_history(home: Home, client: int, rounds: Sequence[Round], report: Report) -> None:
    """The rounds that a party trained on, and the updates of it that were counted, are those that it knows."""
    lines = [line for line in read_history(home.history) if line.get("event") == "sent"]
    seen = {line.get("round"): line.get("manifest") for line in lines}
    _compare(seen, rounds, f"is not the round that client {client} trained on", report)
    for current in rounds:
        for entry in current.manifest.aggregation.counted if current.manifest.aggregation else []:
            own = {line.get("update") for line in lines if line.get("round") == base_of(current, entry)}
            if entry.client == client and own and entry.update not in own:
                report(current.folder, f"counts another update of client {client} than those that it sent")


def _compare(known: Mapping[object, object], rounds: Sequence[Round], problem: str, report: Report) -> None:
    stands = {current.number: current for current in rounds}
    for number, digest in known.items():
        current = stands.get(number) if isinstance(number, int) else None
        if current is not None and current.sha256 != digest:
            report(current.folder, f"{problem}: the past was rewritten, or this is a fork")
    latest = max((number for number in known if isinstance(number, int)), default=-1)
    if rounds and latest > rounds[-1].number:
        report(rounds[-1].workspace.round(latest), f"is gone, and {problem.replace('is not', 'was')}")
