"""One client's part in the open round: train, and drop the update."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fedcli.algos import Algorithm, Array, Arrays, ClientRule
from fedcli.algos.arrays import difference, to_float32
from fedcli.algos.scaffold import control_delta
from fedcli.config import algorithm_from
from fedcli.errors import BusyError
from fedcli.rounds.parties import Party, find_party
from fedcli.rounds.runtime import Runtime
from fedcli.rounds.settings import POLL_SECONDS, check_client, read_running_config
from fedcli.training.reports import StepReport
from fedcli.workspace.controls import read_control, remove_old_candidates, save_candidate
from fedcli.workspace.history import Round, is_submitted, read_head, read_rounds
from fedcli.workspace.inbox import drop_update
from fedcli.workspace.layout import ADAPTER_FILE, CONTROL_DELTA_FILE, UPDATE_RECORD, Workspace
from fedcli.workspace.locks import hold
from fedcli.workspace.publish import remove_temporaries
from fedcli.workspace.records import PROTOCOL, UpdateRecord, file_entry, sha256
from fedcli.workspace.tensors import encode

ClientStatus = Literal["not_selected", "already_submitted", "submitted", "finished", "due"]


@dataclass(frozen=True)
class Training:
    """What a client did in a round that it trained in."""

    num_samples: int
    num_truncated: int
    left_out: dict[str, int]
    """Rows that were not used, by reason."""
    losses: list[float]
    seconds: float
    num_tokens: int

    @property
    def num_unusable(self) -> int:
        """All rows that were not used."""
        return sum(self.left_out.values())

    @property
    def mean_loss(self) -> float:
        """The mean loss over the steps."""
        return math.fsum(self.losses) / len(self.losses)


@dataclass(frozen=True)
class ClientResult:
    """How a client stands in a round; `training` is there where this call trained."""

    status: ClientStatus
    client: int
    round: int
    training: Training | None = None


def client_status(workspace: Workspace, client: int, head: Round | None = None) -> ClientResult:
    """Return how a client stands in the open round; raise UsageError for an id that no client has."""
    config = read_running_config(workspace)
    check_client(client, config)
    head = head or read_head(workspace)
    status: ClientStatus = "due"
    if head.manifest.state == "finished":
        status = "finished"
    elif client not in head.manifest.cohort:
        status = "not_selected"
    elif is_submitted(workspace, head.number, client):
        status = "already_submitted"
    return ClientResult(status, client, head.number)


def train_client(
    workspace: Workspace,
    client: int,
    *,
    home: Path | None = None,
    wait: float = 0.0,
    load_runtime: Callable[[Round, Party], Runtime],
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> ClientResult:
    """Do what is due for a client: train on the open round's adapter and drop the update.

    Nothing is due where the client is not in the cohort, has sent its update, or the federation has finished; then the
    call looks again for `wait` seconds. `load_runtime` is called only when there is work; `home` is a joined party's,
    where it is not the default. Raises BusyError while another process trains this client.
    """
    deadline = time.monotonic() + wait
    while True:
        result = client_status(workspace, client)
        if result.status == "due":
            party = find_party(workspace, read_running_config(workspace), client, home)
            try:
                with hold(party.home.lock, f"client {client}"):
                    remove_temporaries(workspace.client_inbox(client))
                    return _train_due(workspace, party, load_runtime, on_step)
            except BusyError:
                if time.monotonic() + POLL_SECONDS > deadline:
                    raise
        elif result.status == "finished" or time.monotonic() + POLL_SECONDS > deadline:
            return result
        time.sleep(POLL_SECONDS)


def _train_due(
    workspace: Workspace,
    party: Party,
    load_runtime: Callable[[Round, Party], Runtime],
    on_step: Callable[[StepReport], None],
) -> ClientResult:
    """Train and drop, under the client's lock."""
    client = party.client
    head = read_head(workspace)
    result = client_status(workspace, client, head)
    if result.status != "due":  # another process did it while this one came to the lock
        return result
    manifest = head.manifest
    adapter = head.adapter()
    past = read_rounds(workspace, before=head.number)
    first_draw = sum(
        earlier.manifest.train.steps * earlier.manifest.train.batch_size
        for earlier in past
        if client in earlier.manifest.cohort
    )
    rule = _Rule.read(party, [*past, head], adapter)
    runtime = load_runtime(head, party)
    rows = runtime.rows(party, manifest.train)
    started = time.monotonic()
    num_tokens = 0

    def count(report: StepReport) -> None:
        nonlocal num_tokens
        num_tokens += report.num_tokens
        on_step(report)

    values, losses = runtime.train(
        adapter,
        manifest.train,
        party=party,
        round_number=head.number,
        first_draw=first_draw,
        rule=rule.client_rule,
        on_step=count,
    )
    training = Training(
        num_samples=len(rows.examples),
        num_truncated=rows.num_truncated,
        left_out=dict(rows.left_out),
        losses=losses,
        seconds=time.monotonic() - started,
        num_tokens=num_tokens,
    )
    files = {ADAPTER_FILE: encode(values)}
    candidate: dict[str, Array] = {}
    if rule.algorithm.uses_control:
        delta, candidate = rule.next_control(adapter, values, len(losses), manifest.train.learning_rate)
        files[CONTROL_DELTA_FILE] = encode(delta)
    record = _update_record(head, client, files, training).to_bytes()
    if candidate:
        remove_old_candidates(party.home, client, [*past, head])
        save_candidate(party.home, head.number, sha256(record), candidate)
    dropped = drop_update(workspace, head.number, client, [*files.items(), (UPDATE_RECORD, record)])
    return ClientResult("submitted" if dropped else "already_submitted", client, head.number, training)


@dataclass(frozen=True)
class _Rule:
    """The open round's algorithm as one client applies it, with SCAFFOLD's c and the client's own c_k."""

    algorithm: Algorithm
    client_rule: ClientRule | None
    control: Arrays
    own: Arrays

    @classmethod
    def read(cls, party: Party, rounds: list[Round], adapter: Arrays) -> "_Rule":
        """Read what the last of `rounds` asks of a client."""
        head = rounds[-1]
        algorithm = algorithm_from(head.manifest.algorithm)
        if not algorithm.uses_control:
            return cls(algorithm, algorithm.client_rule(adapter, {}), {}, {})
        zeros = {name: np.zeros_like(array) for name, array in adapter.items()}
        control = head.state(algorithm) or zeros
        own = read_control(party.home, rounds, algorithm, party.client) or zeros
        correction = to_float32(difference(control, own))
        return cls(algorithm, algorithm.client_rule(adapter, correction), control, own)

    def next_control(
        self, adapter: Arrays, trained: Arrays, steps: int, learning_rate: float
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return c_k+ - c_k, which goes to the server, and c_k+, which stays here."""
        delta = control_delta(adapter, trained, self.control, steps=steps, learning_rate=learning_rate)
        return delta, {name: self.own[name] + change for name, change in delta.items()}


def _update_record(head: Round, client: int, files: dict[str, bytes], training: Training) -> UpdateRecord:
    """Return what a client says of its update."""
    return UpdateRecord(
        protocol=PROTOCOL,
        workspace=head.manifest.workspace,
        round=head.number,
        base=head.sha256,
        client=client,
        num_samples=training.num_samples,
        steps=len(training.losses),
        train_loss=training.mean_loss,
        files={name: file_entry(contents) for name, contents in files.items()},
    )
