"""What an audit looks at: base, the client's own update, the aggregate, the client alone; and what each guarantees."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fedcli.algos import Arrays
from fedcli.errors import NotReadyError
from fedcli.privacy.audit_statistics import group_guarantee
from fedcli.workspace.baselines import baseline_name, read_baseline, read_baseline_record
from fedcli.workspace.canaries import Planted
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.history import Round, read_round
from fedcli.workspace.inbox import read_update, submitted_rounds
from fedcli.workspace.layout import ADAPTER_FILE
from fedcli.workspace.merge_records import CountedUpdate
from fedcli.workspace.parsing import sha256
from fedcli.workspace.privacy_ledger import Spending, read_ledger
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.window import base_of

BASE, OWN, AGGREGATE, ALONE = "base", "own", "aggregate", "alone"
SEEN_BY = {
    BASE: "nobody: it knows no row",
    OWN: "the server",
    AGGREGATE: "everybody",
    ALONE: "everybody, if it is handed on",
}
"""Who sees each model."""


@dataclass(frozen=True)
class Promise:
    """The upper bound that the ledger gives: (epsilon, delta) of one unit, for whoever sees the model."""

    unit: str
    epsilon: float
    delta: float

    def of_rows(self, count: int) -> tuple[float, float]:
        """Return what it says of so many rows of a client, which are there or not.

        Rows are as many units; the copies of a canary are one group. Of a client that has other rows, the one is gone
        and another come: two units.
        """
        units = {"row": count, "group": 1, "client": 2}[self.unit]
        return group_guarantee(self.epsilon, self.delta, units)


@dataclass(frozen=True)
class AuditedModel:
    """A model to look at."""

    name: str
    what: str
    arrays: Arrays
    promise: Promise | None = None


def find_models(
    federation: FederationState, client: int, planted: Planted, number: int | None
) -> tuple[list[AuditedModel], dict[str, str]]:
    """Return the models that a client's audit looks at, and why others are left out; `number` is the aggregate's round.

    For None these are the client's last update and the latest round. Raises NotReadyError where no model has been
    trained with the canaries yet, or where the round is not there yet.
    """
    latest = federation.head if number is None else federation.round(number)
    start = federation.start
    found = [AuditedModel(BASE, "round 0's start", start.adapter())]
    left_out: dict[str, str] = {}
    for name, made in (
        (OWN, _own(federation, client, planted, number)),
        (AGGREGATE, _aggregate(federation, client, planted, latest)),
        (ALONE, _alone(federation, client, planted)),
    ):
        if isinstance(made, AuditedModel):
            found.append(made)
        else:
            left_out[name] = made
    if len(found) == 1:
        told = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise NotReadyError(
            f"no model knows client {client}'s canaries yet: they are trained from round {planted.first_round} on "
            f"({told})",
            hint=f"Train a round first: `fedcli client train --id {client}`, or `fedcli run --rounds 1`.",
        )
    return found, left_out


def _own(federation: FederationState, client: int, planted: Planted, number: int | None) -> AuditedModel | str:
    workspace = federation.workspace
    for answered in submitted_rounds(workspace, client):
        if number is not None and answered >= number:
            continue
        if answered < planted.first_round:
            break
        base = read_round(workspace, answered)
        if base is None:
            continue
        privacy = base.manifest.privacy
        if privacy is not None and privacy.secure_aggregation is not None:
            return f"the update of round {answered} is masked: the server sees sums alone, and no copy is kept here"
        try:
            update = read_update(base, client)
        except Refusal as refusal:
            return f"the update of round {answered} cannot be read: {refusal.reason}"
        if update is None or ADAPTER_FILE not in update.files:
            continue
        claim = update.record.privacy
        promise = None if claim is None else Promise(claim.unit, claim.epsilon, claim.delta)
        adapter = base.adapter()
        arrays = base.with_delta({**adapter, **update.values(adapter)})  # what is not sent is frozen, or its own
        return AuditedModel(OWN, f"client {client}'s update of round {answered}", arrays, promise)
    return "no update was sent since they were planted" + ("" if number is None else f", before round {number}")


def _aggregate(federation: FederationState, client: int, planted: Planted, found: Round) -> AuditedModel | str:
    counted = [pair for pair in _counted(federation, client, found.number) if pair[0].number >= planted.first_round]
    if not counted:
        return f"round {found.number} holds no update of client {client} that was trained with them"
    promise = promised(federation, client, found.number)
    return AuditedModel(AGGREGATE, f"round {found.number}", found.whole_adapter(), promise)


def _alone(federation: FederationState, client: int, planted: Planted) -> AuditedModel | str:
    name = baseline_name(client)
    record = read_baseline_record(federation.workspace, name)
    if record is None:
        return f"there is no baseline {name} (`fedcli train-alone --id {client}`)"
    if sha256(record.to_bytes()) == planted.baseline:
        return f"the baseline {name} was trained before they were planted"
    arrays = read_baseline(federation.workspace, name, federation.start.manifest.tensors)
    assert arrays is not None  # its record is there
    return AuditedModel(ALONE, f"baseline {name}", arrays)


def promised(federation: FederationState, client: int, number: int) -> Promise | None:
    """Return what the ledger guarantees a client to all who see the rounds up to `number`; None where it has a gap."""
    counted = [*_counted(federation, client, number)]
    records = [opened.manifest.privacy for opened, _ in counted]
    if all(record is not None and record.is_at_server for record in records):
        spending = read_ledger(_rounds(federation, number)).get(client, Spending())
        delta = next((record.delta for record in records if record is not None and record.delta is not None), None)
        epsilon = math.inf if delta is None else spending.epsilon(delta)
        return None if delta is None or math.isinf(epsilon) else Promise("client", epsilon, delta)
    if not all(record is not None and record.is_at_party for record in records):
        return None
    claim = counted[-1][1].privacy
    return None if claim is None else Promise(claim.unit, claim.epsilon, claim.delta)


def _rounds(federation: FederationState, number: int) -> list[Round]:
    return [*federation.past(), federation.head][: number + 1]


def _counted(federation: FederationState, client: int, number: int) -> Iterator[tuple[Round, CountedUpdate]]:
    """Yield the rounds in which an update of a client counted for round `number`, each with what is kept of it."""
    rounds = _rounds(federation, number)
    for closing in rounds:
        if (merge := closing.manifest.aggregation) is not None:
            for entry in merge.counted:
                if entry.client == client:
                    yield rounds[base_of(closing, entry)], entry
