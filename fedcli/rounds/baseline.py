"""Baselines: what one client reaches on its own rows with the federation's step budget and schedule."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fedcli.algos import Arrays
from fedcli.config import Config
from fedcli.errors import NotReadyError
from fedcli.rounds.opening import ADAPTER_CONFIG_NAME, ADAPTER_NAME
from fedcli.rounds.runtime import Runtime
from fedcli.rounds.settings import check_client, read_running_config
from fedcli.training.reports import StepReport
from fedcli.workspace.baselines import (
    BaselineRecord,
    Progress,
    clear_progress,
    is_published,
    publish_baseline,
    read_progress,
    save_progress,
)
from fedcli.workspace.history import Round, read_round
from fedcli.workspace.layout import Workspace
from fedcli.workspace.locks import hold
from fedcli.workspace.tensors import decode, encode


@dataclass(frozen=True)
class BaselineResult:
    """A baseline's name under baselines/, and the mean loss of its last round (None where it stood already)."""

    name: str
    last_loss: float | None


def train_alone(
    workspace: Workspace,
    client: int,
    *,
    threads: int | None = None,
    on_step: Callable[[int, int, int, StepReport], None] = lambda round_number, rounds, steps, report: None,
) -> BaselineResult:
    """Train one client alone: rounds x steps optimiser steps from round 0's adapter, and publish the adapter.

    Each round is what the client would do in a federation of which it is the only member: the same learning-rate
    schedule and order of rows, AdamW's state fresh. An interrupted call goes on at the round that it was in.
    """
    config = read_running_config(workspace)
    check_client(client, config)
    name = f"alone-{client}"
    if is_published(workspace, name):
        return BaselineResult(name, None)
    start = read_round(workspace, 0)
    if start is None:
        raise NotReadyError(f"{workspace.root} has no round yet", hint="Run `fedcli server open`.")
    with hold(workspace.client_lock(client), f"client {client}"):
        runtime = Runtime(workspace, config, start, threads=threads)
        adapter, losses = _train_rounds(workspace, runtime, config, start, client, on_step)
        last_loss = math.fsum(losses) / len(losses) if losses else None
        record = BaselineRecord(
            name=name, start=start.sha256, rounds=config.federation.rounds, last_loss=last_loss, files={}
        )
        files = {ADAPTER_NAME: encode(adapter), ADAPTER_CONFIG_NAME: start.read(ADAPTER_CONFIG_NAME)}
        publish_baseline(workspace, record, files)
        clear_progress(workspace, client)
    return BaselineResult(name, last_loss)


def _train_rounds(
    workspace: Workspace,
    runtime: Runtime,
    config: Config,
    start: Round,
    client: int,
    on_step: Callable[[int, int, int, StepReport], None],
) -> tuple[Arrays, list[float]]:
    """Train round after round, saving after each; return the last adapter and the losses of the last round."""
    rounds = config.federation.rounds
    progress = read_progress(workspace, client, start.sha256)
    if progress is None:
        progress = Progress(0, decode(start.read(ADAPTER_NAME), start.manifest.tensors))
    adapter = progress.adapter
    losses: list[float] = []
    for number in range(progress.rounds_done, rounds):
        train = start.manifest.train.model_copy(update={"learning_rate": config.train.learning_rate_of(number, rounds)})
        adapter, losses = runtime.train(
            adapter,
            train,
            client=client,
            round_number=number,
            first_draw=number * train.steps * train.batch_size,
            on_step=partial(on_step, number, rounds, train.steps),
        )
        save_progress(workspace, client, start.sha256, Progress(number + 1, adapter))
    return adapter, losses
