"""Which old rounds may go: none that anything still refers to."""

from collections.abc import Container, Sequence
from dataclasses import dataclass

from fedcli.scoring.table import best_rounds
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.history import Round
from fedcli.workspace.layout import Workspace
from fedcli.workspace.locks import hold
from fedcli.workspace.pruning import Pruning
from fedcli.workspace.scores import read_scores, unfinished_targets
from fedcli.workspace.target_name import TargetName
from fedcli.workspace.window import base_of, counted_by_base, window_start

_MAY_COUNT = "updates made from it may still count"


@dataclass(frozen=True)
class Collection:
    """What `gc` removed, or would remove; rounds that stay whole, each with what refers to it."""

    is_dry_run: bool
    rounds: list[int]
    kept: dict[int, str]
    num_files: int
    num_bytes: int
    num_foreign: int
    """Updates that are left because they belong to another unix user."""


def collect(federation: FederationState, *, dry_run: bool = False) -> Collection | None:
    """Remove the arrays of old rounds and of their updates; None where fedcli.yaml has no retention.

    Either way what killed processes left half-written goes. What stays tells that the rest was there: manifests,
    update.json of counted updates, and a PRUNED.json. Killed at any instant, the next call goes on. Raises BusyError
    while the server works.
    """
    workspace, retention = federation.workspace, federation.config.retention
    if retention.keep_last is None:
        if not dry_run:
            workspace.store.sweep_abandoned()
        return None
    with hold(workspace.server_lock, "the server's work"):
        federation.refresh()
        head = federation.head
        rounds = [*federation.past(), head]
        kept = kept_rounds(workspace, head.number, retention.keep_last, retention.keep_every)
        late = dict.fromkeys(range(window_start(head), head.number), _MAY_COUNT) | _made_late(rounds, kept)
        kept = dict(sorted((late | kept).items()))
        counted, pruning = counted_by_base(rounds), Pruning(workspace, dry_run)
        done, pruned = [], set()
        for closed in rounds[:-1]:
            if closed.number in kept:
                pruned |= {closed.number} if closed.pruned() is not None else set()
                continue
            before = pruning.num_files
            pruning.prune(closed, counted.get(closed.number, {}))
            if pruning.num_files > before:
                done.append(closed.number)
        if not dry_run:
            workspace.store.sweep_abandoned()
        whole = {number: reason for number, reason in kept.items() if number not in pruned}
        return Collection(dry_run, done, whole, pruning.num_files, pruning.num_bytes, pruning.num_foreign)


def kept_rounds(workspace: Workspace, latest: int, keep_last: int, keep_every: int | None) -> dict[int, str]:
    """Return the rounds that stay whole, each with what refers to it.

    An update is needed as long as the round that it was made in: `verify` computes the next one from both.
    """
    records = read_scores(workspace)
    of_rounds = [record for record in records if record.target_name.kind == "round"]
    reasons = dict.fromkeys(range(0, latest, keep_every or latest + 1), "kept by keep_every")
    for metric in sorted({f"{record.name}.{name}" for record in of_rounds for name in record.scores}):
        reasons[best_rounds(workspace, metric, records)[0][0]] = f"the best in {metric}"
    unfinished = {TargetName.parse(target) for target in unfinished_targets(workspace)}
    numbers = [name.number for name in unfinished if name.kind == "round" and name.number is not None]
    reasons |= {number: "its scores are not finished" for number in numbers if number < latest}
    reasons |= dict.fromkeys(range(max(0, latest + 1 - keep_last), latest), "kept by keep_last")
    return dict(sorted((reasons | {0: "the start", latest: "the latest"}).items()))


def _made_late(rounds: Sequence[Round], kept: Container[int]) -> dict[int, str]:
    """Return the rounds that late updates were made from which went into a round behind one that stays whole."""
    found: dict[int, str] = {}
    for closing in rounds[1:]:
        merge = closing.manifest.aggregation
        if merge is not None and closing.number - 1 in kept:
            reason = f"updates made from it went into round {closing.number}"
            found |= {base_of(closing, entry): reason for entry in merge.counted if entry.base is not None}
    return found
