"""The two places of a sync, and what is read of them once."""

from contextlib import suppress
from dataclasses import dataclass, field

from fedcli.errors import FedError
from fedcli.workspace.enrolment import Enrolment
from fedcli.workspace.history import Round, read_round
from fedcli.workspace.layout import PRUNED, Workspace
from fedcli.workspace.parcels import Incomplete
from fedcli.workspace.records import Identity

UNTOLD = "nothing tells whether the server has signed it, or let its party take part"


@dataclass
class Pair:
    """Two places of one workspace."""

    source: Workspace
    target: Workspace
    identity: Identity
    chain: Enrolment | None = None
    """What is signed by whom; None where nothing is, or nobody can tell."""
    _bases: dict[int, Round | None] = field(default_factory=dict)
    _pruned: dict[tuple[str, int], bool] = field(default_factory=dict)

    @property
    def places(self) -> tuple[Workspace, Workspace]:
        """The source and the target."""
        return self.source, self.target

    def told_chain(self) -> Enrolment:
        """Return what is signed by whom; raise Incomplete where nobody can tell."""
        if self.chain is None:
            raise Incomplete(UNTOLD)
        return self.chain

    def is_pruned(self, place: Workspace, number: int) -> bool:
        """Return whether `gc` has removed the weights of a round in one of them."""
        key = (place.address, number)
        if key not in self._pruned:
            self._pruned[key] = place.store.exists(place.name(place.round(number) / PRUNED))
        return self._pruned[key]

    def base(self, number: int) -> Round | None:
        """Return a round that either of them has, the target's first; None where neither has."""
        if number not in self._bases:
            self._bases[number] = None
            for place in (self.target, self.source):
                with suppress(FedError):
                    found = read_round(place, number)
                    if found is not None and found.manifest.workspace == self.identity.id:
                        self._bases[number] = found
                        break
        return self._bases[number]
