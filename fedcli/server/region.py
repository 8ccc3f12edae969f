"""A region's rounds: which of them its parties train in, and what its parent decides of them (docs/HIERARCHY.md)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedcli.algos import Algorithm, FedAvg
from fedcli.config import Config, algorithm_from
from fedcli.errors import ConfigError
from fedcli.workspace.history import Round
from fedcli.workspace.records import Manifest
from fedcli.workspace.relay_records import ParentRound, RelayRecord
from fedcli.workspace.train_records import Schedule, TrainRecord

if TYPE_CHECKING:
    from fedcli.workspace.federation_state import FederationState


@dataclass(frozen=True)
class Place:
    """What a round has from its parent, or from the round before; `train` is None where fedcli.yaml says it."""

    relay: RelayRecord
    rounds: int
    algorithm: Algorithm
    train: TrainRecord | None = None


def next_place(config: Config, previous: Round | None) -> Place | None:
    """Return the place of the round that follows a merge, or of round 0; None where it is no region's.

    Whatever fedcli.yaml says now, what began from a parent's round goes on to its end.
    """
    before = None if previous is None else previous.manifest
    if before is not None and before.relay is not None and before.relay.left > 0:
        relay = before.relay.model_copy(update={"left": before.relay.left - 1})
        return Place(relay, before.rounds, algorithm_from(before.algorithm), before.train)
    if config.federation.relay_every is None:
        return None
    number = 0 if previous is None else previous.number + 1
    return Place(RelayRecord(left=0, parent=None), max(config.federation.rounds, number + 1), config.algorithm)


def begin_place(federation: "FederationState", parent: Round, client: int) -> Place:
    """Return the place of a region's round that begins from a parent's: open for training, or the last of all.

    Its parties train as the parent asks its clients, at the rate of the parent's round. `rounds` is as many as there
    may be. Raises ConfigError where fedcli.yaml says that the federation is no region.
    """
    config, own, above = federation.config, federation.head.manifest, parent.manifest
    every, number = config.federation.relay_every, federation.head.number + 1
    if every is None:
        raise ConfigError(
            f"{federation.workspace.address} is no region: its federation.relay_every is null",
            hint="Set it to how many rounds of its own go into one round of the parent, such as 1.",
        )
    is_open = above.state == "open"
    rounds = number + (every + 1) * (above.rounds - above.round) if is_open else number
    relay = RelayRecord(
        left=every if is_open else 0,
        parent=ParentRound(
            workspace=above.workspace,
            round=above.round,
            sha256=parent.sha256,
            client=client,
            above=ancestors(above),
        ),
    )
    rate = above.train.learning_rate
    train = above.train.model_copy(
        update={
            "schedule": Schedule(learning_rate=rate, learning_rate_min=rate, rounds=rounds),
            "seed": own.train.seed,
            "date": own.train.date,
        }
    )
    return Place(relay, rounds, client_algorithm(above), train)


def ancestors(manifest: Manifest) -> list[str]:
    """Return whose region a federation is, the nearest first."""
    if manifest.relay is None or manifest.relay.parent is None:
        return []
    return [manifest.relay.parent.workspace, *manifest.relay.parent.above]


def client_algorithm(parent: Manifest) -> Algorithm:
    """Return what the parties of a region do as clients of the parent's round, merged with the weighted mean.

    Raises ConfigError where the parent's algorithm needs of a client what a region is not.
    """
    algorithm = algorithm_from(parent.algorithm)
    if not algorithm.changes_clients():
        return FedAvg()
    if algorithm.name == "fedprox":
        return algorithm
    raise ConfigError(
        f"a region cannot take part in {algorithm.name}: its clients send or keep more than an adapter"
        f"{' (their control variates)' if algorithm.name == 'scaffold' else ''}, and a region has no such thing",
        hint="Let the parent use fedavg, fedprox or fedavgm, whose rounds equal the flat mean.",
    )


def begins_anew(current: Manifest, previous: Manifest | None) -> bool:
    """Return whether a round begins from a parent's round, and not from a merge."""
    if current.relay is None or current.relay.parent is None:
        return False
    before = None if previous is None or previous.relay is None else previous.relay.parent
    return current.relay.parent != before


def cycle_of(past: Sequence[Round], last: Round) -> list[Round]:
    """Return the rounds that a region's round was merged of, the first that began from the parent's round."""
    parent = None if last.manifest.relay is None else last.manifest.relay.parent
    return [each for each in past if each.manifest.relay is not None and each.manifest.relay.parent == parent]
