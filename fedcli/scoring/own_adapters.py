"""What a client trained for itself, as a model: own factors, Ditto's adapter, FedDPA's beside the global one."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from fedcli.algos import Array, Arrays
from fedcli.algos.lora import is_first_factor, joined
from fedcli.errors import NotReadyError, UsageError
from fedcli.parties.party import find_own
from fedcli.workspace.client_state import GLOBAL, PERSONAL, own_factors, read_state, read_states
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.history import Round, read_round
from fedcli.workspace.inbox import Update
from fedcli.workspace.layout import ADAPTER_FILE
from fedcli.workspace.parsing import sha256
from fedcli.workspace.records import Manifest
from fedcli.workspace.tensors import encode

OWN_PARTS = "own factors"
"""What clients train for themselves where a round has no global adapter: a part of it is each client's own."""


@dataclass(frozen=True)
class OwnAdapter:
    """A client's own model: W x + s (weight B A + the products beside) x."""

    client: int
    round: int
    """Whose global adapter, or factor, is in it: the latest."""
    kind: str
    """own factors, ditto or feddpa."""
    arrays: Arrays
    beside: Mapping[str, Arrays] = field(default_factory=dict)
    weight: float = 1.0

    @property
    def digest(self) -> str:
        """What tells it from others: the hash of its numbers."""
        parts = [encode(self.arrays), *(encode(self.beside[name]) for name in sorted(self.beside))]
        return sha256(b"".join([*parts, f"{self.weight}".encode()]))

    def joined(self) -> "dict[str, Array]":
        """Return it as one adapter: A's rows below one another, B's columns side by side, of the rank of both.

        The scale s stays: alpha grows as the rank does.
        """
        found = {name: np.asarray(array) for name, array in self.arrays.items()}
        if self.beside:
            found |= {
                name: (self.weight * array).astype(np.float32)
                for name, array in found.items()
                if not is_first_factor(name)
            }
        for other in self.beside.values():
            found = joined(other, found)
        return found


def _kind_of(manifest: Manifest) -> str | None:
    """Return what clients of a round train for themselves; None where they do not."""
    if manifest.train.personal is not None:
        return manifest.train.personal.name
    return OWN_PARTS if manifest.own_tensors else None


def own_kind(head: Round) -> str | None:
    """Return what clients have for themselves as it stands with a round; None where they have nothing."""
    return _kind_of(_terms(head))


def _terms(head: Round) -> Manifest:
    """Return the manifest that says what clients keep: a round's own, or that of the round before it.

    What was merged from parts of adapters is a part itself, whatever the next round asks for.
    """
    if _kind_of(head.manifest) is None and (before := head.previous()) is not None and before.manifest.own_tensors:
        return before.manifest
    return head.manifest


def own_adapter(federation: FederationState, client: int) -> OwnAdapter:
    """Return a client's own model as it stands with the latest round.

    Raises UsageError where its home is not here, NotReadyError where none of its updates has counted, IntegrityError
    where what it keeps is gone.
    """
    head = federation.head
    terms = _terms(head)
    kind = _kind_of(terms)
    assert kind is not None
    found = find_own(federation, client)
    if found is None:
        raise UsageError(
            f"client {client}'s own adapter ({kind}) never leaves its home, and that is not here",
            hint="Its party runs this on its own machine. Where its home is another than the usual folder, the "
            "environment variable FEDCLI_HOME names it.",
        )
    rounds, parts = [*federation.past(), head], own_factors(terms)
    if parts is None:
        own = read_states(found[0], rounds, client).get(PERSONAL, {})
    else:
        own = read_state(found[0], rounds, parts, client)
    if not own:
        raise NotReadyError(
            f"client {client} has no adapter of its own ({kind}) yet: no update of it has counted since that began",
            hint=f"Let it train: `fedcli client train --id {client}`; then `fedcli server aggregate`.",
        )
    beside = head.beside()
    if kind == "ditto":
        return OwnAdapter(client, head.number, kind, own, beside)
    if kind == OWN_PARTS:
        return OwnAdapter(client, head.number, kind, {**head.adapter(), **own}, beside)
    return OwnAdapter(client, head.number, kind, own, {GLOBAL: head.adapter()} | beside, own_weight(federation))


def own_weight(federation: FederationState) -> float:
    """Return what the product of a client's own adapter is multiplied by."""
    personal = federation.head.manifest.train.personal
    return 1.0 if personal is None or personal.weight is None else personal.weight


def own_clients(federation: FederationState) -> list[int]:
    """Return the clients whose own adapters are on this machine: those that it has homes of, and that have trained."""
    found = []
    for client in range(federation.config.federation.clients):
        with suppress(UsageError, NotReadyError):
            own_adapter(federation, client)
            found.append(client)
    if not found:
        raise NotReadyError(
            "no client has an adapter of its own on this machine",
            hint="Each party scores its own with --client N; in a simulation let clients train first.",
        )
    return found


def whole_update(base: Round, update: Update) -> "Arrays | None":
    """Return an update's whole adapter: what aggregation.share freezes is the round's.

    None where a client keeps a part to itself.
    """
    frozen = base.manifest.unshared_tensors - base.manifest.own_tensors
    if {*base.manifest.sent_tensors, *frozen} != {*base.manifest.tensors}:
        return None
    if not frozen and update.record.encoding is None:
        return base.with_delta(update.files[ADAPTER_FILE])
    start = base.of_cluster(update.record.cluster or 0).adapter()
    return base.with_delta({**start, **update.values(start)})


def check_has_global(found: Round) -> None:
    """Raise UsageError for a round whose adapter is none: with aggregation.share: [A] each client has its own B."""
    before = read_round(found.workspace, found.number - 1) if found.number else None
    if before is not None and before.manifest.own_tensors:
        key = "aggregation.share: [A]" if before.manifest.share == "A" else "aggregation.private"
        raise UsageError(
            f"round {found.number} has no global adapter: with {key} its updates carry a part of it, and each client "
            "keeps the other to itself",
            hint="Name a client, whose own part is joined to the round's: --client N.",
        )
