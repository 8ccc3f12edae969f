"""One client's work in the open round: train, and drop the update."""

import math
import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedcli.algos.lora import cut
from fedcli.client.answering import check_able
from fedcli.client.cluster import cluster_of
from fedcli.client.draws import first_draw
from fedcli.client.encoded_update import encode_adapter
from fedcli.client.own_factors import OwnFactors
from fedcli.client.personal import train_own
from fedcli.client.private_round import plan_private
from fedcli.client.runtimes import Runtimes
from fedcli.client.signing import check_past, commit_update
from fedcli.config import algorithm_from
from fedcli.data.row_report import RowReport
from fedcli.observer import Observer
from fedcli.parties.party import Party
from fedcli.tasks import TASKS
from fedcli.training.limits import TimeLimit
from fedcli.training.reports import StepReport
from fedcli.workspace.client_state import OPTIMIZER, read_states, remove_old_candidates, save_candidates
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.layout import ADAPTER_FILE
from fedcli.workspace.parsing import sealed, sha256
from fedcli.workspace.privacy_ledger import check_budget
from fedcli.workspace.privacy_records import PrivacyClaim
from fedcli.workspace.records import PROTOCOL, UpdateRecord, file_entry
from fedcli.workspace.step_ledger import charge
from fedcli.workspace.tensors import encode
from fedcli.workspace.train_records import TrainRecord

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fedcli.algos import Algorithm, Arrays
    from fedcli.client.private_round import PrivateSteps
    from fedcli.client.runtime import Runtime
    from fedcli.client.secure_round import SecureRound
    from fedcli.client.selection import Selection
    from fedcli.data.encoded import EncodedRows
    from fedcli.training.moments import Moments
    from fedcli.workspace.history import Round


@dataclass(frozen=True)
class Training:
    """What a client did in a round that it trained in."""

    num_samples: int
    num_truncated: int
    left_out: dict[str, int]
    """Rows that were not used, by reason."""
    losses: list[float]
    """Of the steps; of private ones those alone whose batch had rows."""
    seconds: float
    num_tokens: int
    notes: dict[str, int]
    """Rows of which not all is used, by what is not."""
    first_cases: dict[str, str]
    """The first row left out for each reason: where it is, and what was found."""
    unused: dict[str, int]
    """Rows that have a column, or a key inside one, which is not used; none where a split or joining has said so."""
    steps: int
    spent: PrivacyClaim | None = None
    """What all steps so far have spent, as the update claims it; None without privacy at the party."""
    withholds: bool = False
    """Whether figures of it are for its own party's eyes alone."""

    @property
    def num_unusable(self) -> int:
        """All rows that were not used."""
        return sum(self.left_out.values())

    @property
    def mean_loss(self) -> float | None:
        """The mean loss over the steps; None where no batch had rows."""
        return math.fsum(self.losses) / len(self.losses) if self.losses else None


@dataclass(frozen=True)
class _Work:
    """What a client begins its round with."""

    party: Party
    rounds: "Sequence[Round]"
    """All, the open one last."""
    head: "Round"
    """The open one, with the cluster whose adapter is trained."""
    runtime: "Runtime"
    algorithm: "Algorithm"
    state: "Arrays"
    """The server's, where clients read it."""
    kept: "Mapping[str, Arrays]"
    """What the client kept with its last counted update, by folder."""
    factors: OwnFactors
    adapter: "Arrays"
    """x: the round's adapter of the client's rank, with its own factors in it."""
    start: "Arrays"
    """What training starts from, and what scores of rows are those of."""
    rows: "EncodedRows"
    selection: "Selection | None"
    private: "PrivateSteps | None"

    @property
    def own(self) -> "Arrays":
        """What the client keeps for its algorithm."""
        return self.kept.get(self.algorithm.private_state, {})


@dataclass(frozen=True)
class _Trained:
    """What came of it."""

    training: Training
    files: "Mapping[str, Arrays]"
    """What is sent, before some of it is left out or encoded."""
    kept: "dict[str, Arrays]"
    """What is kept if the update counts, by folder."""


def train_and_drop(
    federation: FederationState,
    party: Party,
    runtimes: Runtimes,
    observer: Observer,
    masked: "SecureRound | None" = None,
) -> tuple[Training, bool]:
    """Train a client on the open round and drop its update; return what it did, and whether its update was the first.

    Whoever calls this holds the client's lock. In a `masked` round, which was checked already, nothing is sent in the
    clear.
    """
    head, past = federation.head, federation.past()
    if masked is None:
        check_past(federation, party, past, observer)
    party.check_floors(head.manifest)
    if head.manifest.privacy is not None:
        check_budget([*past, head], [party.client])
    work = _begin(federation, party, past, runtimes, observer)
    found = _train(work, observer)
    if masked is None:
        return found.training, _drop(federation, work, found, observer)
    from fedcli.client.secure_round import mask_and_drop

    training = found.training
    dropped = mask_and_drop(
        masked,
        work.algorithm,
        work.adapter,
        found.files,
        found.kept,
        training.num_samples,
        observer,
        training.spent,
    )
    return training, dropped


def _begin(
    federation: FederationState, party: Party, past: "Sequence[Round]", runtimes: Runtimes, observer: Observer
) -> _Work:
    """Read what a round needs, choose adapter and rows, and note what private steps cost before they are made."""
    client, head = party.client, federation.head
    manifest, adapter = head.manifest, head.adapter()
    if (rank := manifest.rank_of(client)) is not None:
        adapter = cut(adapter, rank)
    algorithm = algorithm_from(manifest.algorithm)
    state = head.state(algorithm) if algorithm.clients_read_state else {}
    kept = read_states(party.home, [*past, head], client)
    privacy = manifest.privacy if manifest.privacy is not None and manifest.privacy.is_at_party else None
    check_able(federation, party, manifest.train)
    runtime = runtimes.load(party, observer)
    rows = runtime.rows(party, manifest.train, group_by=None if privacy is None else privacy.group_by)
    private = None if privacy is None else plan_private(party, head, past, rows)
    head.check_unchanged()
    if manifest.clusters is not None:
        head = head.of_cluster(cluster_of(head, party, runtime, federation.config.federation.clients, observer))
        adapter = head.adapter()
    factors = OwnFactors(manifest, algorithm)
    adapter = factors.put_in(adapter, kept)
    start = algorithm.start(adapter, kept.get(algorithm.private_state, {}))
    selection = runtime.select(party, manifest.train, start, head.beside())
    if selection is not None:
        party.check_selected(manifest, selection.num_own)
    if private is not None:
        from fedcli.training.dp_sgd import check_task

        check_task(TASKS[manifest.task])
        charge(party.home, private.record)
    return _Work(
        party=party,
        rounds=[*past, head],
        head=head,
        runtime=runtime,
        algorithm=algorithm,
        state=state,
        kept=kept,
        factors=factors,
        adapter=adapter,
        start=start,
        rows=rows,
        selection=selection,
        private=private,
    )


def _train(work: _Work, observer: Observer) -> _Trained:
    """Train the shared adapter, then the client's own where it has one."""
    party, head, runtime, algorithm, factors = work.party, work.head, work.runtime, work.algorithm, work.factors
    manifest, started, num_tokens = head.manifest, time.monotonic(), 0

    def count(report: StepReport) -> None:
        nonlocal num_tokens
        num_tokens += report.num_tokens
        told = replace(report, loss=None) if manifest.withholds else report  # it may go into a log
        observer.step_done(party.client, told)

    least = _least_steps(party, manifest.train)
    num_rows = len(work.rows) if work.selection is None else len(work.selection.places)
    train = manifest.train.for_rows(num_rows, least=least)
    moments = _moments(work.kept) if manifest.train.keep_optimizer else None
    limit = None if train.minutes is None else TimeLimit(train.minutes * 60, least)
    first = first_draw(work.rounds, party.client)
    values, losses = runtime.train(
        work.start,
        train,
        party=party,
        round_number=head.number,
        first_draw=first,
        rule=factors.rule(algorithm.client_rule(work.adapter, work.state, work.own), work.adapter),
        on_step=count,
        private=work.private,
        beside=head.beside(),
        limit=limit,
        moments=moments,
        selection=work.selection,
    )
    steps = train.steps if limit is None else len(losses)
    own_adapter = train_own(
        runtime,
        party,
        head,
        work.adapter,
        work.kept,
        steps=steps,
        first_draw=first,
        selection=work.selection,
        on_step=count,
    )
    training = _training(work, losses, steps, num_tokens, time.monotonic() - started)
    sent, own_after = algorithm.client_step(
        work.adapter, values, work.state, work.own, steps=steps, learning_rate=manifest.train.learning_rate
    )
    kept: dict[str, Arrays] = {**work.kept}
    if moments is not None:
        kept[OPTIMIZER] = moments.arrays
    if algorithm.private_state:
        kept[algorithm.private_state] = factors.without_unsent(own_after, work.own)
    return _Trained(training, {ADAPTER_FILE: values, **sent}, {**kept, **factors.kept(values), **own_adapter})


def _training(work: _Work, losses: list[float], steps: int, num_tokens: int, seconds: float) -> Training:
    """Return the account of a training."""
    rows, selection, private = work.rows, work.selection, work.private
    report = RowReport()
    for each in (rows, *(() if selection is None else (selection.report,))):
        report.include(each)
    return Training(
        num_samples=rows.num_own if selection is None else selection.num_own,
        num_truncated=rows.num_truncated,
        losses=losses,
        seconds=seconds,
        num_tokens=num_tokens,
        steps=steps,
        spent=None if private is None else private.claim,
        withholds=work.head.manifest.withholds,
        **report.counts() | ({} if work.party.is_handwritten else {"unused": {}}),
    )


def _drop(federation: FederationState, work: _Work, found: _Trained, observer: Observer) -> bool:
    """Keep what the client keeps, and publish its update; return False where another one stands."""
    party, head, training, kept = work.party, work.head, found.training, found.kept
    manifest, client, is_private = head.manifest, party.client, work.private is not None
    files = {
        name: encode({tensor: arrays[tensor] for tensor in manifest.sent_tensors})
        for name, arrays in found.files.items()
    }
    if manifest.encoding is not None:
        files[ADAPTER_FILE], residual = encode_adapter(head, work.rounds, client, found.files[ADAPTER_FILE], kept)
        kept = {**kept, **residual}
    tells_scores = party.shares_scores and not manifest.withholds
    update = UpdateRecord(
        protocol=PROTOCOL,
        workspace=manifest.workspace,
        round=head.number,
        base=head.sha256,
        client=client,
        num_samples=1 if is_private else training.num_samples,  # all weigh alike, and nobody tells how many rows
        steps=training.steps,
        train_loss=None if is_private else training.mean_loss,
        files={name: file_entry(contents) for name, contents in files.items()},
        encoding=None if manifest.encoding is None else manifest.encoding.name,
        privacy=training.spent,
        cluster=None if manifest.clusters is None else head.cluster,
        salt=os.urandom(32).hex() if manifest.withholds else None,
        base_delta=manifest.base_delta,
        row_scores=work.selection.table if work.selection is not None and tells_scores else None,
    )
    record = sealed(update)
    remove_old_candidates(party.home, client, work.rounds)
    save_candidates(party.home, head.number, sha256(record), kept)
    return commit_update(federation, party, [*files.items()], record, observer)


def _least_steps(party: Party, train: TrainRecord) -> int:
    """Return the steps that meet a party's floors, where a round leaves to it how many it makes."""
    if party.num_rows is None:
        return 1
    return max(1, party.floors.steps, math.ceil(min(party.floors.rows, party.num_rows) / train.batch_size))


def _moments(kept: "Mapping[str, Arrays]") -> "Moments":
    """Return AdamW's moments as a client kept them, none before its first counted round."""
    from fedcli.training.moments import Moments

    return Moments({**kept.get(OPTIMIZER, {})})
