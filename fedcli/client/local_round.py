"""One client's work in the open round: train, and drop the update."""

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedcli.client.runtimes import Runtimes
from fedcli.client.signing import check_past, commit_update
from fedcli.config import algorithm_from
from fedcli.observer import Observer
from fedcli.parties.party import Party
from fedcli.training.reports import StepReport
from fedcli.workspace.client_state import read_state, remove_old_candidates, save_candidate
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.layout import ADAPTER_FILE
from fedcli.workspace.records import PROTOCOL, UpdateRecord, file_entry, sealed, sha256
from fedcli.workspace.tensors import encode

if TYPE_CHECKING:
    from fedcli.client.secure_round import SecureRound


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
    notes: dict[str, int]
    """Rows of which not all is used, by what is not."""
    first_cases: dict[str, str]
    """The first row left out for each reason: where it is, and what was found."""
    unused: dict[str, int]
    """Rows that have a column, or a key inside one, which is not used; none where a split or joining has said so."""

    @property
    def num_unusable(self) -> int:
        """All rows that were not used."""
        return sum(self.left_out.values())

    @property
    def mean_loss(self) -> float:
        """The mean loss over the steps."""
        return math.fsum(self.losses) / len(self.losses)


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
    client, head = party.client, federation.head
    manifest, past = head.manifest, federation.past()
    if masked is None:
        check_past(federation, party, past, observer)
    party.check_floors(manifest)
    adapter = head.adapter()
    first_draw = sum(
        earlier.manifest.train.steps * earlier.manifest.train.batch_size
        for earlier in past
        if client in earlier.manifest.cohort
    )
    algorithm = algorithm_from(manifest.algorithm)
    state = head.state(algorithm) if algorithm.clients_read_state else {}
    own = read_state(party.home, [*past, head], algorithm, client)
    runtime = runtimes.load(party, observer)
    rows = runtime.rows(party, manifest.train)
    head.check_unchanged()
    started = time.monotonic()
    num_tokens = 0

    def count(report: StepReport) -> None:
        nonlocal num_tokens
        num_tokens += report.num_tokens
        observer.step_done(client, report)

    values, losses = runtime.train(
        algorithm.start(adapter, own),
        manifest.train,
        party=party,
        round_number=head.number,
        first_draw=first_draw,
        rule=algorithm.client_rule(adapter, state, own),
        on_step=count,
    )
    training = Training(
        num_samples=len(rows),
        num_truncated=rows.num_truncated,
        losses=losses,
        seconds=time.monotonic() - started,
        num_tokens=num_tokens,
        **rows.counts() | ({} if party.is_handwritten else {"unused": {}}),
    )
    sent, kept = algorithm.client_step(
        adapter, values, state, own, steps=len(losses), learning_rate=manifest.train.learning_rate
    )
    if masked is not None:
        from fedcli.client.secure_round import mask_and_drop

        trained = {ADAPTER_FILE: values} | sent
        dropped = mask_and_drop(masked, algorithm, adapter, trained, kept, training.num_samples, observer)
        return training, dropped
    files = {
        name: encode({tensor: arrays[tensor] for tensor in manifest.sent_tensors})
        for name, arrays in ({ADAPTER_FILE: values} | sent).items()
    }
    update = UpdateRecord(
        protocol=PROTOCOL,
        workspace=manifest.workspace,
        round=head.number,
        base=head.sha256,
        client=client,
        num_samples=training.num_samples,
        steps=len(losses),
        train_loss=training.mean_loss,
        files={name: file_entry(contents) for name, contents in files.items()},
    )
    record = sealed(update)
    if algorithm.private_state:
        remove_old_candidates(party.home, algorithm, client, [*past, head])
        save_candidate(party.home, algorithm, head.number, sha256(record), kept)
    return training, commit_update(federation, party, [*files.items()], record, observer)
