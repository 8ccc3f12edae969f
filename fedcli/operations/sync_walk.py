"""Going through a workspace once, in an order that lets nothing arrive before what it refers to."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

from fedcli.errors import FedError, IntegrityError
from fedcli.operations.carry import MAX_SMALL_BYTES, Carried, Carrier
from fedcli.operations.sync_inbox import SyncInbox
from fedcli.operations.sync_pair import UNTOLD, Pair
from fedcli.stores.objects import UnlistableError
from fedcli.workspace.enrolment import MAX_ENTRY_BYTES
from fedcli.workspace.history import Round, listed_rounds, read_if_there, read_round
from fedcli.workspace.inbox import MAX_SIGNATURE_BYTES
from fedcli.workspace.layout import (
    CONFIG_NAME,
    PRUNED,
    Workspace,
    is_round_name,
    round_name,
)
from fedcli.workspace.parcels import (
    Incomplete,
    Parcel,
    baseline_parcel,
    read_manifest,
    round_parcel,
)
from fedcli.workspace.parsing import sha256
from fedcli.workspace.registrations import is_own, mark_as_copy, mark_as_own
from fedcli.workspace.secure_files import MAX_BYTES, MOST_SHARES_BYTES

CARRIED = ("rounds", "inbox", "clients", "enrolment", "attempts", "repair", "baselines")
KEPT = ("private", "data", "eval", "report", "slurm", "logs", "discarded", "server.lock", "README.md", "cron")
"""What stays where it is: secrets, rows, scores, and what one machine keeps for itself."""
_ROUND = r"(\d{5,19})"
_RECORD = re.compile(rf"round-{_ROUND}-0\.json")
_SHARES = re.compile(rf"round-{_ROUND}-0-shares-([0-9a-f]{{64}})\.json")
_ENTRY = re.compile(rf"{_ROUND}\.json")
_OF_CLIENT = re.compile(r"(0|[1-9]\d{0,18})\.(json|sig|leave|acks)")
_ACK = re.compile(rf"round-{_ROUND}\.sig")


@dataclass(frozen=True)
class Scope:
    """What of a workspace is carried: all of it, or what a party needs and sends, or a part of that."""

    client: int | None = None
    parts: frozenset[str] = frozenset(CARRIED)
    is_lean: bool = False
    """Whether the rounds between the first and the latest leave their weights behind, as `gc` would."""
    first_round: int = 0
    """Of updates and answers."""
    is_bundled: bool = False
    """Whether it goes into a file, of which nobody is the owner."""
    last_round: int | None = None

    @classmethod
    def of_party(cls, client: int | None) -> "Scope":
        """Return what `sync` carries; with a client of that party alone."""
        return cls() if client is None else cls(client, frozenset(CARRIED) - {"baselines"}, is_lean=True)


@dataclass
class Walk:
    """Goes through a workspace once, in an order that lets nothing arrive before what it refers to."""

    pair: Pair
    scope: Scope
    carrier: Carrier
    result: Carried

    def __post_init__(self) -> None:
        self.source, self.target = self.pair.places

    @cached_property
    def _is_own(self) -> bool:
        """Whether this user made what is copied."""
        return is_own(self.source)

    def run(self) -> None:
        """Look at what refers to others first, and carry it last."""
        names, parts = self.source.store.names, self.scope.parts
        inboxes = {each: self._names(f"inbox/{each}") for each in self._clients("inbox")}
        last = self.scope.last_round
        rounds = [each for each in listed_rounds(self.source) if last is None or each <= last]
        inbox = SyncInbox(self.pair, self.scope.first_round, max(rounds, default=0), self.carrier, self.result)
        attempts, repairs = ([*names(folder)] if folder in parts else [] for folder in ("attempts", "repair"))
        if "enrolment" in parts:
            self._enrolment()
        else:
            self._read_chain(self.target if self.target.store.names("enrolment") else self.source)
        if self.result.is_first:
            for folder in ("inbox", "clients"):
                self.target.store.share(folder, multi_user=False)
        for client in self._clients("clients"):
            with self._told_of(f"clients/{client}"):
                self._client(client)
        if "rounds" in parts:
            self._rounds(rounds)
        self._signed("attempts", attempts)
        self._shares(repairs)
        self._signed("repair", repairs)
        for client, found in inboxes.items():
            with self._told_of(f"inbox/{client}"):
                inbox.carry(client, found)
        if "baselines" in parts and not (self.source.store.is_remote or self.target.store.is_remote):
            for name in names("baselines"):
                if not name.startswith("."):
                    folder = f"baselines/{name}"
                    self.carrier.publish("baselines", folder, partial(baseline_parcel, self.source, name))
        self._ignore("", [name for name in names("") if name not in (*CARRIED, *KEPT, CONFIG_NAME, "workspace.json")])
        if "rounds" in parts and self.target.has_round(0):
            self._config()
        if "rounds" not in parts or self.target.has_round(0):
            self.carrier.fixed("workspace.json", "workspace.json", MAX_SMALL_BYTES)

    def _config(self) -> None:
        """Carry fedcli.yaml; what a workspace's own user has there, nobody else changes."""
        if self.result.is_first and not self.scope.is_bundled:
            if self._is_own:
                mark_as_own(self.target, self.pair.identity.id)
            else:
                mark_as_copy(self.target)
        if self._is_own or self.result.is_first or self.carrier.judge.replaces or not is_own(self.target):
            self.carrier.changing("fedcli.yaml", CONFIG_NAME)
            return
        ours, theirs = (self.carrier.read(place.store, CONFIG_NAME, MAX_SMALL_BYTES) for place in self.pair.places)
        if ours != theirs:
            self.result.changed[CONFIG_NAME] = "there it is this user's own, and here another's: --replace takes it"

    def _names(self, folder: str) -> list[str]:
        store = self.source.store
        if store.is_hidden(folder):
            self.result.left[folder] = "this user may not look into it"
            return []
        with self._told_of(folder):
            return store.names(folder)
        return []

    @contextmanager
    def _told_of(self, folder: str) -> Iterator[None]:
        """Leave what is still to do of a folder where one cannot be listed."""
        try:
            yield
        except UnlistableError as error:
            self.result.left[folder] = error.message

    def _clients(self, folder: str) -> list[int]:
        """Return the clients that something of lies in inbox/ or clients/, and note what is nobody's."""
        names = self._names(folder) if folder in self.scope.parts else []
        known = {name for name in names if (_OF_CLIENT.fullmatch(name) if folder == "clients" else _is_id(name))}
        self._ignore(folder, [name for name in names if name not in known])
        found = sorted({int(name.partition(".")[0]) for name in known})
        return found if self.scope.client is None else [client for client in found if client == self.scope.client]

    def _ignore(self, folder: str, names: list[str]) -> None:
        self.result.ignored += [f"{folder}/{name}".lstrip("/") for name in names if not name.startswith(".")]

    def _enrolment(self) -> None:
        """Carry the chain, entry by entry, as far as it is the same one; nothing of one that is not the server's."""
        if not self._read_chain(self.source):
            return
        names = self.source.store.names("enrolment")
        entries = {int(match[1]) for name in names if (match := _ENTRY.fullmatch(name)) and is_round_name(match[1])}
        known = {f"{round_name(number)}.{kind}" for number in entries for kind in ("json", "sig")}
        self._ignore("enrolment", [name for name in names if name not in known and not name.endswith(".sig")])
        for number in range(max(entries, default=-1) + 1):
            name = f"enrolment/{round_name(number)}"
            if not self.carrier.fixed("enrolment", f"{name}.json", MAX_ENTRY_BYTES, signature=f"{name}.sig"):
                self.pair.chain = None
                return
        if self.target.store.exists(f"enrolment/{round_name(max(entries, default=-1) + 1)}.json"):
            self._read_chain(self.target)  # it begins with what was carried, and knows more

    def _read_chain(self, place: Workspace) -> bool:
        """Read what is signed by whom; return False where the server has not signed all of it."""
        if self.pair.identity.signatures is not None:
            from fedcli.operations.sync_trust import checked_chain  # where nothing is signed nobody needs cryptography

            try:
                self.pair.chain = checked_chain(place, self.pair.identity)
            except IntegrityError as error:
                self.pair.chain, self.result.arriving["enrolment"] = None, error.message
                return False
        return True

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
        if self.pair.identity.signatures is None:
            self.carrier.changing("registrations", name)
            return
        from fedcli.operations.sync_trust import carry_registration  # where nothing is signed nobody needs cryptography

        carry_registration(self.carrier, *self.pair.places, self.pair.identity.id, client, ours)

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
        if not self.scope.is_lean:
            self._note_pruned(there & {*rounds})

    def _note_pruned(self, rounds: set[int]) -> None:
        """Tell where one place has pruned a round and the other has not: weights go neither way."""
        names = {self.source.name(self.source.round(number) / PRUNED): number for number in rounds}
        here, there = (place.store.existing([*names]) for place in self.pair.places)
        for name in sorted(here ^ there):
            who = (self.source if name in here else self.target).address
            self.result.left[name.rpartition("/")[0]] = (
                f"its weights are not in {who} (`fedcli gc` removed them, or a bundle left them out); they are neither "
                "put back, nor removed elsewhere"
            )

    def _round(self, number: int, latest: int) -> bool:
        with_weights = not self.scope.is_lean or number in (0, latest)

        def read() -> Parcel:
            parcel = round_parcel(self.source, number, self.pair.identity, with_weights=with_weights)
            if not self.target.has_round(number):
                self._check_chain(number, parcel.record)
            return parcel

        return self.carrier.publish("rounds", self.source.name(self.source.round(number)), read)

    def _check_chain(self, number: int, contents: bytes) -> None:
        """Raise Incomplete where the target does not have what a round follows: the one before, and its enrolment."""
        manifest = read_manifest(self.source, number, contents, self.pair.identity)
        try:
            before = read_round(self.target, number - 1) if number else None
        except FedError as error:
            raise Incomplete(error.message) from error
        if self.pair.identity.signatures is not None:
            from fedcli.operations.sync_trust import check_round

            past = None if before is None else before.manifest
            check_round(self.source, manifest, contents, self.pair.told_chain(), past)
        if manifest.parent != (None if before is None else before.sha256):
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
            fault = None if self.pair.identity.signatures is None else partial(self._record_fault, folder, name)
            self.carrier.fixed(folder, f"{folder}/{name}", MAX_BYTES, signature=signature, fault=fault)

    def _record_fault(self, folder: str, name: str, contents: bytes, signature: bytes) -> str:
        """Return what is wrong with an attempt or a repair that is not there yet."""
        from fedcli.operations.sync_trust import record_fault

        match = _RECORD.fullmatch(name)
        assert match is not None
        base = self.pair.base(int(match[1]))
        if base is None:
            return f"round {int(match[1])} is in neither place"
        if self.pair.chain is None:
            return UNTOLD
        return record_fault(
            Round(self.source, base.manifest, base.sha256), folder, contents, signature, self.pair.chain
        )

    def _shares(self, names: list[str]) -> None:
        """Carry sealed shares, each of which has its hash in its name; not of a round whose weights are gone there."""
        for name in names:
            match = _SHARES.fullmatch(name)
            if (
                match is None
                or self.pair.is_pruned(self.target, int(match[1]))
                or self.target.store.exists(f"repair/{name}")
            ):
                continue
            contents = self.carrier.read(self.source.store, f"repair/{name}", MOST_SHARES_BYTES)
            if contents is None or sha256(contents) != match[2]:
                self.result.arriving[f"repair/{name}"] = "it is not whole"
            else:
                self.carrier.fixed("shares", f"repair/{name}", MOST_SHARES_BYTES)


def _is_id(name: str) -> bool:
    return re.fullmatch(r"0|[1-9]\d{0,18}", name) is not None
