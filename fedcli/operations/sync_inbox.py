"""Carrying what parties have dropped: updates, and answers to repairs."""

import re
from dataclasses import dataclass
from functools import partial

from fedcli.operations.carry import Carried, Carrier
from fedcli.operations.sync_pair import Pair
from fedcli.workspace.history import read_round
from fedcli.workspace.layout import UPDATE_RECORD, Workspace, is_round_name, update_name
from fedcli.workspace.parcels import Incomplete, Parcel, answer_parcel, update_parcel
from fedcli.workspace.publish import DISCARDED_PREFIX
from fedcli.workspace.secure_files import MAX_BYTES, read_repair

_UPDATE = re.compile(r"round-(\d{5,19})")
_ANSWER = re.compile(r"repair-(\d{5,19})-0")


@dataclass(frozen=True)
class SyncInbox:
    """Carries inboxes from the first round that is wanted on; `latest` is the source's latest round."""

    pair: Pair
    first_round: int
    latest: int
    carrier: Carrier
    result: Carried

    @property
    def source(self) -> Workspace:
        """Where it comes from."""
        return self.pair.source

    @property
    def target(self) -> Workspace:
        """Where it goes."""
        return self.pair.target

    def carry(self, client: int, names: list[str]) -> None:
        """Carry a client's updates and answers; of rounds long closed one that stands there is not looked at again."""
        own = f"inbox/{client}"
        there = set() if self.target.store.is_hidden(own) else {*self.target.store.names(own)}
        for name in names:
            update, answer = _UPDATE.fullmatch(name), _ANSWER.fullmatch(name)
            match = update or answer
            if match is None or not is_round_name(match[1]):
                if not name.startswith("."):
                    self.result.ignored.append(f"{own}/{name}")
                continue
            number, folder = int(match[1]), f"{own}/{name}"
            if number < self.first_round:
                continue
            if number < self.latest - 1 and (
                name in there
                or (self.pair.is_pruned(self.target, number) and not self.pair.is_pruned(self.source, number))
            ):
                continue
            if answer:
                self.carrier.publish("answers", folder, partial(self._answer, number, client))
            elif reason := self._reason_to_leave(number, client, folder):
                self.result.left[folder] = reason
            else:
                self.carrier.publish("updates", folder, partial(self._update, number, client))

    def _update(self, number: int, client: int) -> Parcel:
        base = self.pair.base(number)
        if base is None:
            raise Incomplete(f"round {number} is in neither place")
        parcel = update_parcel(self.source, base.manifest, client, is_pruned=self.pair.is_pruned(self.source, number))
        if self.pair.identity.signatures is not None:
            from fedcli.operations.sync_trust import check_update

            check_update(self.pair.places, base, client, parcel, self.pair.told_chain())
        return parcel

    def _answer(self, number: int, client: int) -> Parcel:
        base = self.pair.base(number)
        if base is None:
            raise Incomplete(f"round {number} is in neither place")
        parcel = answer_parcel(self.source, number, client)
        if self.pair.identity.signatures is not None:
            from fedcli.operations.sync_trust import check_answer

            check_answer(self.pair.places, base, client, parcel, self.pair.told_chain())
        return parcel

    def _reason_to_leave(self, number: int, client: int, folder: str) -> str:
        """Return why an update is not to be carried, although it is not there; nothing where it is."""
        if self.target.store.names(folder):
            return ""
        ours = self.carrier.read(self.source.store, f"{folder}/{UPDATE_RECORD}", MAX_BYTES)
        aside = f"{DISCARDED_PREFIX}{update_name(number)}-"
        hidden = self.target.store.is_hidden(f"inbox/{client}")
        for name in [] if hidden else self.target.store.names(f"inbox/{client}"):
            if name.startswith(aside) and ours is not None:
                theirs = self.carrier.read(self.target.store, f"inbox/{client}/{name}/{UPDATE_RECORD}", MAX_BYTES)
                if theirs == ours:
                    return (
                        f"it was set aside there; `fedcli server discard --id {client} -w {self.source.address}` lets "
                        "the client send another"
                    )
        base = self.pair.base(number)
        if base is not None and base.manifest.secure_aggregation is not None:
            return "a repair goes on without it, and would unmask it" if self._is_unmasked(number, client) else ""
        if base is not None and self.pair.chain is not None:
            from fedcli.operations.sync_trust import enrolment_then

            gone = enrolment_then(read_round(self.target, base.number + 1), self.pair.chain).gone.get(client)
            if gone is not None:
                return f"client {client} {'has left' if gone == 'leave' else 'was revoked'}: it counts no more"
        return ""

    def _is_unmasked(self, number: int, client: int) -> bool:
        for place in self.pair.places:
            current = read_round(place, number)
            repair = None if current is None else read_repair(current)
            if repair is not None and client not in repair.record.clients:
                return True
        return False
