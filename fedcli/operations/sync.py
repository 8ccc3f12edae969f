"""From one place to another: the protocol's files, each by the rule of its kind; files first, records last."""

import re
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from fedcli.errors import FedError, UsageError, WorkspaceError
from fedcli.observer import Observer
from fedcli.operations.carry import MAX_SMALL_BYTES, Carried, Carrier, Judge
from fedcli.workspace.enrolment import MAX_ENTRY_BYTES
from fedcli.workspace.history import (
    is_initialised,
    listed_rounds,
    read_identity,
    read_if_there,
    read_round,
)
from fedcli.workspace.layout import (
    CONFIG_NAME,
    MANIFEST,
    PRUNED,
    UPDATE_RECORD,
    Workspace,
    is_round_name,
    round_name,
    update_name,
)
from fedcli.workspace.parcels import (
    MAX_SIGNATURE_BYTES,
    Incomplete,
    Parcel,
    answer_parcel,
    baseline_parcel,
    read_manifest,
    round_parcel,
    update_parcel,
)
from fedcli.workspace.publish import DISCARDED_PREFIX
from fedcli.workspace.records import Identity, Manifest, sha256
from fedcli.workspace.secure_files import MAX_BYTES, MOST_SHARES_BYTES, read_repair
from fedcli.workspace.secure_records import ANSWER_RECORD
from fedcli.workspace.sync_memory import SyncMemory

CARRIED = ("rounds", "inbox", "clients", "enrolment", "attempts", "repair", "baselines")
KEPT = ("private", "data", "eval", "report", "slurm", "logs", "discarded", "server.lock", "README.md", "cron")
"""What stays where it is: secrets, rows, scores, and what one machine keeps for itself."""
_ROUND = r"(\d{5,19})"
_RECORD = re.compile(rf"round-{_ROUND}-0\.json")
_SHARES = re.compile(rf"round-{_ROUND}-0-shares-([0-9a-f]{{64}})\.json")
_ENTRY = re.compile(rf"{_ROUND}\.json")
_OF_CLIENT = re.compile(r"(0|[1-9]\d{0,18})\.(json|sig|leave|acks)")
_ACK = re.compile(rf"round-{_ROUND}\.sig")


def sync(
    source: Workspace,
    target: Workspace,
    *,
    client: int | None = None,
    replace: bool = False,
    observer: Observer,
) -> Carried:
    """Carry what the target lacks of a workspace; a target that is empty becomes a copy of it.

    With a `client` only what that party needs and sends. With `replace` what may change is the source's wherever the
    two differ. Raises WorkspaceError where the source is no workspace, or the target another one or something else.
    """
    if not is_initialised(source):
        raise WorkspaceError(
            f"{source.address} is no workspace: it holds no {source.identity.name}",
            hint="Name the place that has the workspace first, and then the one that lacks something.",
        )
    identity = read_identity(source)
    judge = _Memory(SyncMemory(identity.id, source.address, target.address), replace)
    return carry_all(source, target, identity, judge, client=client, observer=observer)


def carry_all(
    source: Workspace,
    target: Workspace,
    identity: Identity,
    judge: Judge,
    *,
    client: int | None = None,
    observer: Observer,
) -> Carried:
    """Carry what a target lacks of a workspace, as `judge` has it where something has changed."""
    if source.address == target.address:
        raise UsageError(f"{source.address} is both places", hint="Name two: where it comes from, and where it goes.")
    result = Carried(source.address, target.address, identity.id, is_first=_check_target(target, identity))
    carrier = Carrier(source.store, target.store, judge, result, observer)
    _Walk(source, target, identity, client, carrier, result).run()
    return result


@dataclass(frozen=True)
class _Memory:
    """Tells who has changed a file since both places had the same."""

    memory: SyncMemory
    replaces: bool

    def is_newer(self, name: str, ours: bytes, theirs: bytes | None) -> bool | None:
        known = self.memory.get(name)
        if self.replaces:
            return True
        if theirs is None:
            return known != sha256(ours)
        if known == sha256(theirs):
            return True
        return False if known == sha256(ours) else None

    def agreed(self, name: str, contents: bytes) -> None:
        self.memory.keep(name, contents)


def _check_target(target: Workspace, identity: Identity) -> bool:
    """Return whether the target is empty or half of a first copy; raise WorkspaceError where it is something else."""
    if is_initialised(target):
        other = read_identity(target)
        if other.id != identity.id:
            raise WorkspaceError(
                f"{target.address} is another workspace: {other.id}, not {identity.id}",
                hint="Name the other copy of the same workspace, or an empty place.",
            )
        return False
    start = None
    with suppress(FedError):  # half of something else is told below
        start = read_round(target, 0)
    names = {name for name in target.store.names("") if not name.startswith(".")}
    is_copy = start is not None and start.manifest.workspace == identity.id
    odd = sorted(names - {*CARRIED, *((CONFIG_NAME,) if is_copy else ())})
    if odd or (start is not None and not is_copy):
        what = f"{odd[0]} lies there" if odd else "its round 0 is another workspace's"
        raise WorkspaceError(
            f"{target.address} is neither empty nor a copy of this workspace: {what}",
            hint="Name an empty place: it becomes a copy.",
        )
    return True


@dataclass
class _Walk:
    """Goes through a workspace once, in an order that lets nothing arrive before what it refers to."""

    source: Workspace
    target: Workspace
    identity: Identity
    client: int | None
    carrier: Carrier
    result: Carried
    _manifests: dict[int, Manifest | None] = field(default_factory=dict)

    def run(self) -> None:
        """Look at what refers to others first, and carry it last."""
        names = self.source.store.names
        self._look()
        inboxes = {each: self._names(f"inbox/{each}") for each in self._clients("inbox")}
        rounds = listed_rounds(self.source)
        self._latest = max(rounds, default=0)
        attempts, repairs = names("attempts"), names("repair")
        self._enrolment()
        if self.result.is_first:
            for folder in ("inbox", "clients"):
                self.target.store.share(folder, multi_user=False)
        for client in self._clients("clients"):
            self._client(client)
        self._rounds(rounds)
        self._signed("attempts", attempts)
        self._shares(repairs)
        self._signed("repair", repairs)
        for client, found in inboxes.items():
            self._inbox(client, found)
        if self.client is None:
            for name in names("baselines"):
                if not name.startswith("."):
                    folder = f"baselines/{name}"
                    self.carrier.publish("baselines", folder, partial(baseline_parcel, self.source, name))
        self._ignore("", [name for name in names("") if name not in (*CARRIED, *KEPT, CONFIG_NAME, "workspace.json")])
        if self.target.has_round(0):
            self.carrier.changing("fedcli.yaml", CONFIG_NAME)
            self.carrier.fixed("workspace.json", "workspace.json", MAX_SMALL_BYTES)

    def _names(self, folder: str) -> list[str]:
        store = self.source.store
        if store.is_hidden(folder):
            self.result.left[folder] = "this user may not look into it"
            return []
        return store.names(folder)

    def _clients(self, folder: str) -> list[int]:
        """Return the clients that something of lies in inbox/ or clients/, and note what is nobody's."""
        names = self._names(folder)
        known = {name for name in names if (_OF_CLIENT.fullmatch(name) if folder == "clients" else _is_id(name))}
        self._ignore(folder, [name for name in names if name not in known])
        found = sorted({int(name.partition(".")[0]) for name in known})
        return found if self.client is None else [client for client in found if client == self.client]

    def _ignore(self, folder: str, names: list[str]) -> None:
        self.result.ignored += [f"{folder}/{name}".lstrip("/") for name in names if not name.startswith(".")]

    def _enrolment(self) -> None:
        """Carry the chain, entry by entry, as far as it is the same one."""
        names = self.source.store.names("enrolment")
        entries = {int(match[1]) for name in names if (match := _ENTRY.fullmatch(name)) and is_round_name(match[1])}
        known = {f"{round_name(number)}.{kind}" for number in entries for kind in ("json", "sig")}
        self._ignore("enrolment", [name for name in names if name not in known and not name.endswith(".sig")])
        for number in range(max(entries, default=-1) + 1):
            name = f"enrolment/{round_name(number)}"
            if not self.carrier.fixed("enrolment", f"{name}.json", MAX_ENTRY_BYTES, signature=f"{name}.sig"):
                return

    def _client(self, client: int) -> None:
        """Carry what a party says of itself."""
        workspace, store = self.source, self.source.store
        name = workspace.name(workspace.registration(client))
        ours = self.carrier.read(store, name, MAX_SMALL_BYTES)
        if ours is not None:
            self._registration(client, name, ours)
        self.carrier.changing("leaving", workspace.name(workspace.leaving(client)))
        acks = f"clients/{client}.acks"
        known = {found for found in self._names(acks) if _ACK.fullmatch(found)}
        self._ignore(acks, [found for found in store.names(acks) if found not in known])
        for found in sorted(known):
            self._acknowledgement(f"{acks}/{found}")

    def _acknowledgement(self, name: str) -> None:
        """Carry a countersignature; one under another key, of the same manifest, is as good."""
        there = self.carrier.read(self.target.store, name, MAX_SIGNATURE_BYTES)
        ours = self.carrier.read(self.source.store, name, MAX_SIGNATURE_BYTES)
        if there is None or ours is None or there.split(b" ")[0] != ours.split(b" ")[0]:
            self.carrier.fixed("acknowledgements", name, MAX_SIGNATURE_BYTES)

    def _registration(self, client: int, name: str, ours: bytes) -> None:
        """Carry a registration; new keys that the old ones signed are newer, whatever else is known."""
        if self.identity.signatures is None:
            self.carrier.changing("registrations", name)
            return
        from fedcli.trust.registration import follows, own_fault  # where nothing is signed nobody needs cryptography

        signature = self.source.name(self.source.registration_signature(client))
        signed = self.carrier.read(self.source.store, signature, MAX_SIGNATURE_BYTES) or b""
        if fault := own_fault(self.identity.id, client, ours, signed):
            self.result.arriving[name] = fault
            return
        theirs = self.carrier.read(self.target.store, name, MAX_SMALL_BYTES)
        newer = None
        if theirs is not None and theirs != ours:
            before = self.carrier.read(self.target.store, signature, MAX_SIGNATURE_BYTES) or b""
            if not own_fault(self.identity.id, client, theirs, before):
                newer = follows(self.identity.id, theirs, ours, signed)
                newer = False if newer is None and follows(self.identity.id, ours, theirs, before) else newer
        self.carrier.changing("registrations", name, first=(signature, signed), newer=newer)

    def _look(self) -> None:
        """List what is asked of many rounds and updates once."""
        self._there = {*self.target.store.files("inbox")}
        self._pruned = [
            {int(name.split("/")[0]) for name in store.files("rounds") if re.fullmatch(rf"{_ROUND}/{PRUNED}", name)}
            for store in (self.source.store, self.target.store)
        ]

    def _rounds(self, rounds: list[int]) -> None:
        """Carry the rounds in their order, each only behind the one that it follows.

        Where the latest that both have is the same one, so are all before it, for each names the hash of its parent.
        """
        self._ignore("rounds", [name for name in self.source.store.names("rounds") if not is_round_name(name)])
        latest, there = max(rounds, default=0), {*listed_rounds(self.target)}
        common = max(there & {*rounds}, default=None)
        if common is not None and self._round(common, latest):
            todo = [number for number in range(latest + 1) if number > common or number not in there]
        else:
            todo = [*range(latest + 1)]
        for number in todo:
            if not self._round(number, latest):
                break
        for number in sorted(self._pruned[0] ^ self._pruned[1]) if self.client is None else ():
            if number in there:
                who = (self.source if number in self._pruned[0] else self.target).address
                self.result.left[self.source.name(self.source.round(number))] = (
                    f"`fedcli gc` has removed its weights in {who}; they are neither put back, nor removed elsewhere"
                )

    def _round(self, number: int, latest: int) -> bool:
        with_weights = self.client is None or number in (0, latest)

        def read() -> Parcel:
            parcel = round_parcel(self.source, number, self.identity, with_weights=with_weights)
            if not self.target.has_round(number):
                self._check_chain(number, parcel.record)
            return parcel

        return self.carrier.publish("rounds", self.source.name(self.source.round(number)), read)

    def _check_chain(self, number: int, contents: bytes) -> None:
        """Raise Incomplete where the target does not have what a round follows: the one before, and its enrolment."""
        manifest = read_manifest(self.source, number, contents, self.identity)
        before = read_if_there(self.target, self.target.round(number - 1) / MANIFEST, MAX_BYTES) if number else None
        if manifest.parent != (None if before is None else sha256(before)):
            raise Incomplete(f"it does not follow round {number - 1} of {self.target.address}")
        if (head := manifest.enrolment) is not None:
            path = self.target.enrolment / f"{round_name(head.number)}.json"
            entry = read_if_there(self.target, path, MAX_ENTRY_BYTES)
            if entry is None or sha256(entry) != head.sha256:
                raise Incomplete(f"entry {head.number} of the enrolment is not in {self.target.address}, or another")

    def _signed(self, folder: str, names: list[str]) -> None:
        """Carry the signed records of secure aggregation."""
        known = {name for name in names if _RECORD.fullmatch(name)}
        sides = {name.replace(".json", ".sig") for name in known} | {name for name in names if _SHARES.fullmatch(name)}
        self._ignore(folder, [name for name in names if name not in known | sides and not name.endswith(".sig")])
        for name in sorted(known):
            signature = f"{folder}/{name.removesuffix('.json')}.sig"
            self.carrier.fixed(folder, f"{folder}/{name}", MAX_BYTES, signature=signature)

    def _shares(self, names: list[str]) -> None:
        """Carry sealed shares, each of which has its hash in its name; not of a round whose weights are gone there."""
        for name in names:
            match = _SHARES.fullmatch(name)
            if match is None or int(match[1]) in self._pruned[1] or self.target.store.exists(f"repair/{name}"):
                continue
            contents = self.carrier.read(self.source.store, f"repair/{name}", MOST_SHARES_BYTES)
            if contents is None or sha256(contents) != match[2]:
                self.result.arriving[f"repair/{name}"] = "it is not whole"
            else:
                self.carrier.fixed("shares", f"repair/{name}", MOST_SHARES_BYTES)

    def _inbox(self, client: int, names: list[str]) -> None:
        """Carry a client's updates and answers; of rounds long closed one that stands there is not looked at again."""
        for name in names:
            update = re.fullmatch(rf"round-{_ROUND}", name)
            answer = re.fullmatch(rf"repair-{_ROUND}-0", name)
            match = update or answer
            if match is None or not is_round_name(match[1]):
                self._ignore(f"inbox/{client}", [name])
                continue
            number, folder = int(match[1]), f"inbox/{client}/{name}"
            record = f"{client}/{name}/{UPDATE_RECORD if update else ANSWER_RECORD}"
            is_old = number < self._latest - 1
            if (record in self._there and is_old) or (number in self._pruned[1] and number not in self._pruned[0]):
                continue
            if answer:
                self.carrier.publish("answers", folder, partial(answer_parcel, self.source, number, client))
            elif reason := self._reason_to_leave(number, client, folder):
                self.result.left[folder] = reason
            else:
                self.carrier.publish("updates", folder, partial(self._update, number, client))

    def _update(self, number: int, client: int) -> Parcel:
        base = self._manifest(number)
        if base is None:
            raise Incomplete(f"round {number} is in neither place")
        return update_parcel(self.source, base, client, is_pruned=number in self._pruned[0])

    def _manifest(self, number: int) -> Manifest | None:
        if number not in self._manifests:
            self._manifests[number] = None
            for place in (self.target, self.source):
                with suppress(FedError):
                    found = read_round(place, number)
                    if found is not None and found.manifest.workspace == self.identity.id:
                        self._manifests[number] = found.manifest
                        break
        return self._manifests[number]

    def _reason_to_leave(self, number: int, client: int, folder: str) -> str:
        """Return why an update is not to be carried, although it is not there; nothing where it is."""
        if self.target.store.names(folder):
            return ""
        ours = self.carrier.read(self.source.store, f"{folder}/{UPDATE_RECORD}", MAX_BYTES)
        aside = f"{DISCARDED_PREFIX}{update_name(number)}-"
        for name in self.target.store.names(f"inbox/{client}"):
            if name.startswith(aside) and ours is not None:
                theirs = self.carrier.read(self.target.store, f"inbox/{client}/{name}/{UPDATE_RECORD}", MAX_BYTES)
                if theirs == ours:
                    return (
                        f"it was set aside there; `fedcli server discard --id {client} -w {self.source.address}` lets "
                        "the client send another"
                    )
        base = self._manifest(number)
        if base is not None and base.secure_aggregation is not None and self._is_unmasked(number, client):
            return "a repair goes on without it, and would unmask it"
        return ""

    def _is_unmasked(self, number: int, client: int) -> bool:
        for place in (self.source, self.target):
            current = read_round(place, number)
            repair = None if current is None else read_repair(current)
            if repair is not None and client not in repair.record.clients:
                return True
        return False


def _is_id(name: str) -> bool:
    return re.fullmatch(r"0|[1-9]\d{0,18}", name) is not None
