"""Hierarchy: a federation as a client of another, whose parties merge first, and only their sum travels."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedcli.client.due import client_status, take_part_masked
from fedcli.client.signing import check_past, commit_update
from fedcli.observer import Observer
from fedcli.operations.relay_checks import (
    Summed,
    check_began_there,
    check_not_taken_back,
    check_own_round,
    check_pair,
    sum_up,
)
from fedcli.parties.party import find_home
from fedcli.parties.region import JoinedRegion, Region, join_region, registered_rows
from fedcli.server.region import cycle_of
from fedcli.server.relay_round import begin_round
from fedcli.trust.history import read_history
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.inbox import clear_discarded
from fedcli.workspace.layout import ADAPTER_FILE, ADAPTER_NAME, Home
from fedcli.workspace.locks import hold
from fedcli.workspace.parsing import sealed
from fedcli.workspace.records import PROTOCOL, UpdateRecord, file_entry
from fedcli.workspace.registrations import read_party, read_registration
from fedcli.workspace.relay_records import RelayedRound

if TYPE_CHECKING:
    from fedcli.client.local_round import Training
    from fedcli.client.secure_round import SecureRound

RelayStatus = Literal[
    "opened",
    "sent",
    "ended",
    "answered",
    "waits_for_parties",
    "waits_for_parent",
    "not_selected",
    "nothing_counted",
    "gone",
    "finished",
]
_TO_DO = ("opened", "sent", "ended", "answered")


@dataclass(frozen=True)
class _Step:
    """What is due, or what is waited for."""

    status: RelayStatus
    summed: Summed | None = None
    """Of what is to be sent."""


@dataclass(frozen=True)
class RelayResult:
    """What a call did, or what it waits for; the rounds are the latest of the parent and of the region."""

    status: RelayStatus
    client: int
    parent_round: int
    region_round: int
    summed: Summed | None = None
    """Of what was sent."""
    joined: JoinedRegion | None = None
    """Where this call joined the parent, or registered other rows."""
    remarks: tuple[str, ...] = ()

    @property
    def has_worked(self) -> bool:
        """Whether this call opened a round, sent an update or answered."""
        return self.status in _TO_DO


def relay(
    parent: FederationState,
    child: FederationState,
    client: int,
    *,
    home: Path | None = None,
    server: str | None = None,
    observer: Observer,
) -> RelayResult:
    """Do what is due for a region as a client of its parent, once, and return what that was.

    The first call joins. Each opens the region's next round from the parent's latest, or sends the adapter that the
    region has merged; where neither is due it says what is waited for. Killed at any instant, the next call goes on.
    `server` is the fingerprint that the parent's server must have. Raises UsageError, ConfigError or IntegrityError
    where the two do not fit, BusyError while another process does this.
    """
    while True:
        parent.refresh()
        child.refresh()
        remarks = check_pair(parent, child)
        found = find_home(parent, client, home)
        step = _next_step(parent, child, client, found)
        joined = None
        if step.status == "sent" or not _has_joined(parent, child, client, found):
            counted = 0 if step.summed is None else step.summed.num_samples
            num_rows = max(registered_rows(child), counted)  # a party may have registered fewer since
            joined = join_region(parent, client, child, num_rows=num_rows, home=home, server=server)
        done = step
        if step.status in _TO_DO:
            with hold(found.lock, f"client {client}"):
                if parent.refresh() | child.refresh() or _next_step(parent, child, client, found) != step:
                    continue
                done = _do(parent, child, _region(parent, client, found), step, observer)
                child.refresh()
        return RelayResult(
            done.status, client, parent.head.number, child.head.number, done.summed, joined, tuple(remarks)
        )


def _has_joined(parent: FederationState, child: FederationState, client: int, home: Home) -> bool:
    """Return whether the region stands in the parent's registry, and its home knows it as this one."""
    record, region = read_party(home), child.identity.id
    is_known = record is not None and record.region is not None and record.region.workspace == region
    return is_known and read_registration(parent.workspace, client) is not None


def _region(parent: FederationState, client: int, home: Home) -> Region:
    record, registration = read_party(home), read_registration(parent.workspace, client)
    told = None if registration is None else registration.data.num_rows
    kept = None if record is None else record.num_rows
    return Region(client, home, kept or told or 0)


def _next_step(parent: FederationState, child: FederationState, client: int, home: Home) -> _Step:
    """Return what is due for a region."""
    own, above = child.head.manifest, parent.head.manifest
    check_not_taken_back(parent, child.head)
    standing = client_status(parent, client).status
    if standing == "gone":
        return _Step("gone")
    if own.relay is None:
        return _Step("waits_for_parties") if own.state == "open" else _step_of_finished(parent, child, standing, home)
    if own.state == "finished":
        return _Step("finished")
    if own.relay.parent is None or own.relay.parent.round < parent.head.number:
        if standing == "finished":
            return _Step("ended")
        if standing in ("due", "waiting"):
            return _Step("opened")
        return _Step("waits_for_parent" if above.waits_for_parent or standing != "not_selected" else "not_selected")
    if own.relay.left > 0:
        return _Step("waits_for_parties")
    return _step_of_sum(standing, lambda: sum_up(cycle_of(child.past(), child.head), child.head))


def _step_of_sum(standing: str, sum_of_rounds: Callable[[], Summed]) -> _Step:
    """Return what is due for a region that has merged what goes up; only where that is due past rounds are read."""
    if standing == "due":
        summed = sum_of_rounds()
        return _Step("sent", summed) if summed.num_samples else _Step("nothing_counted")
    return _Step("answered" if standing == "repair_due" else "waits_for_parent")


def _step_of_finished(parent: FederationState, child: FederationState, standing: str, home: Home) -> _Step:
    """Return what is due for a federation that is no region: the whole of it is one round of the parent."""
    start, head = child.start.manifest.files[ADAPTER_NAME], parent.head.manifest.files[ADAPTER_NAME]
    if start != head and any(line.get("event") == "sent" for line in read_history(home.history)):
        return _Step("finished")
    if standing == "not_selected":
        return _Step("waits_for_parent" if parent.head.manifest.waits_for_parent else "not_selected")
    check_began_there(parent, child.start)
    if standing == "finished":
        return _Step("finished")
    return _step_of_sum(standing, lambda: sum_up(child.past(), child.head))


def _do(parent: FederationState, child: FederationState, region: Region, step: _Step, observer: Observer) -> _Step:
    """Do what is due; whoever calls this holds the lock of the region's home."""
    check_own_round(child)
    if step.status in ("opened", "ended"):
        check_past(parent, region, parent.past(), observer)
        is_first = begin_round(child, parent.head, region.client, known=child.head.sha256)
        return step if is_first else _Step("waits_for_parties")
    if parent.head.manifest.secure_aggregation is not None:
        return _send_masked(parent, child, region, step, observer)
    check_past(parent, region, parent.past(), observer)
    workspace = parent.workspace
    workspace.store.sweep(workspace.name(workspace.client_inbox(region.client)))
    clear_discarded(parent.head, region.client)
    assert step.summed is not None
    contents = child.head.read(ADAPTER_NAME)
    update = UpdateRecord(
        protocol=PROTOCOL,
        workspace=parent.identity.id,
        round=parent.head.number,
        base=parent.head.sha256,
        client=region.client,
        num_samples=step.summed.num_samples,
        steps=step.summed.steps,
        train_loss=step.summed.train_loss,
        files={ADAPTER_FILE: file_entry(contents)},
        salt=os.urandom(32).hex() if parent.head.manifest.withholds else None,
        relay=RelayedRound(workspace=child.identity.id, round=child.head.number, sha256=child.head.sha256),
    )
    is_first = commit_update(parent, region, [(ADAPTER_FILE, contents)], sealed(update), observer)
    return step if is_first else _Step("waits_for_parent")


def _send_masked(
    parent: FederationState, child: FederationState, region: Region, step: _Step, observer: Observer
) -> _Step:
    """Do what is due in a parent's round of secure aggregation: mask the sum and drop it, or answer a repair."""

    def work(entered: "SecureRound") -> "tuple[Training | None, bool]":
        from fedcli.client.secure_round import mask_and_drop
        from fedcli.config import algorithm_from

        assert step.summed is not None
        algorithm = algorithm_from(parent.head.manifest.algorithm)
        values, rows = {ADAPTER_FILE: child.head.adapter()}, step.summed.num_samples
        return None, mask_and_drop(entered, algorithm, parent.head.adapter(), values, {}, rows, observer)

    standing = client_status(parent, region.client).status
    result = take_part_masked(parent, region, standing, work, observer)
    return step if result.status in ("submitted", "answered") else _Step("waits_for_parent")
