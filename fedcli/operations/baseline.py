"""Baselines: what one client alone, or all rows pooled, reach with the federation's step budget and schedule."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedcli.algos.lora import cut, padded
from fedcli.client.runtimes import Runtimes
from fedcli.errors import ConfigError, UsageError
from fedcli.observer import Observer
from fedcli.parties.party import Party, find_party
from fedcli.workspace.baselines import (
    BaselineRecord,
    Progress,
    baseline_name,
    clear_progress,
    publish_baseline,
    read_baseline_record,
    read_progress,
    save_progress,
)
from fedcli.workspace.federation_state import FederationState, train_record
from fedcli.workspace.layout import ADAPTER_CONFIG_NAME, ADAPTER_NAME, Home
from fedcli.workspace.locks import hold
from fedcli.workspace.tensors import encode

if TYPE_CHECKING:
    from fedcli.client.runtime import Runtime


@dataclass(frozen=True)
class BaselineResult:
    """A baseline's name under baselines/, whether this call trained it, and the mean loss of its last round."""

    status: Literal["trained", "exists"]
    name: str
    last_loss: float


def train_baseline(
    federation: FederationState,
    client: int | None,
    *,
    home: Path | None = None,
    runtimes: Runtimes,
    observer: Observer,
) -> BaselineResult:
    """Train one client alone, or for None on all clients' rows together (a simulation's only), and publish the adapter.

    `runtimes` are models that may be loaded already.

    It makes rounds x steps optimiser steps from round 0's adapter. Each round is what the only member of a federation
    would do in it, plainly, with fedcli.yaml as it is now: the same learning-rate schedule and order of rows, AdamW's
    state fresh. An interrupted call goes on at the round that it was in; a baseline of other settings is set aside and
    trained anew.
    """
    workspace, config = federation.workspace, federation.config
    if client is not None:
        federation.check_clients([client])
    elif joined := federation.joined():
        raise UsageError(
            f"all rows are not at hand: clients {', '.join(map(str, joined))} have joined and keep theirs",
            hint="Only a simulation can pool its rows; `fedcli train-alone --id N` trains a party alone.",
        )
    numbers = range(config.federation.clients) if client is None else [client]
    parties = [find_party(federation, number, home) for number in numbers]
    party = None if client is None else parties[0]
    _check_privacy(federation, party, observer)
    own = workspace.pooled_home if party is None else party.home
    start = federation.start
    train = train_record(config, 0, config.federation.rounds)
    if party is not None:
        party.check_floors(start.manifest, train, "alone")
    plan = BaselineRecord(name=baseline_name(client), start=start.sha256, train=train, last_loss=0.0, files={})
    with hold(own.baseline_lock, f"the baseline {plan.name}"):
        standing = read_baseline_record(workspace, plan.name)
        if standing is not None:
            if (standing.start, standing.train) == (plan.start, plan.train):
                clear_progress(own)  # what a call left that was killed at its end
                return BaselineResult("exists", plan.name, standing.last_loss)
            workspace.store.set_aside(f"baselines/{plan.name}")
        runtime = runtimes.load(party, observer)
        progress = _train_rounds(federation, own, runtime, party, plan, observer)
        files = {ADAPTER_NAME: encode(progress.adapter), ADAPTER_CONFIG_NAME: start.read(ADAPTER_CONFIG_NAME)}
        publish_baseline(workspace, plan.model_copy(update={"last_loss": progress.last_loss}), files)
        clear_progress(own)
    return BaselineResult("trained", plan.name, progress.last_loss)


def _check_privacy(federation: FederationState, party: Party | None, observer: Observer) -> None:
    """Raise ConfigError where a party would publish an adapter of its rows that no noise hides; say so of simulated."""
    if federation.config.privacy.is_off and federation.head.manifest.privacy is None:
        return
    if party is not None and party.num_rows is not None:
        raise ConfigError(
            f"client {party.client} does not train alone: its adapter would be published in baselines/ without noise, "
            "and the federation asks for privacy",
            hint="Compare with others' rows, in a workspace of your own.",
        )
    observer.noted("a baseline is trained without privacy: whoever reads it may learn of the rows that it was made of")


def _train_rounds(
    federation: FederationState,
    home: Home,
    runtime: "Runtime",
    party: Party | None,
    plan: BaselineRecord,
    observer: Observer,
) -> Progress:
    """Train round after round, saving after each; return where the last one left off."""
    config = federation.config
    rounds = config.federation.rounds
    rank = None if party is None else federation.start.manifest.rank_of(party.client)
    progress = read_progress(home, plan) or Progress(0, federation.start.adapter(), 0.0)
    for number in range(progress.rounds_done, rounds):
        asked = train_record(config, number, rounds)
        began = progress.adapter if rank is None else cut(progress.adapter, rank)
        selection = runtime.select(party, asked, began)
        train = asked.for_rows(len(runtime.rows(party, asked)) if selection is None else len(selection.places))
        observer.baseline_round(number, rounds, train.steps)
        adapter, losses = runtime.train(
            began,
            train,
            party=party,
            round_number=number,
            first_draw=number * train.num_drawn,
            rule=None,
            on_step=partial(observer.step_done, None if party is None else party.client),
            selection=selection,
        )
        if rank is not None:
            adapter = padded(adapter, progress.adapter)
        progress = Progress(number + 1, adapter, math.fsum(losses) / len(losses))
        save_progress(home, plan, progress)
    return progress
