"""Aggregation: from a cohort's updates to the next round. No torch: numpy and safetensors only."""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from fedcli.algos import ALGORITHMS, Algorithm
from fedcli.config import algorithm_from
from fedcli.errors import BusyError, NotReadyError, UsageError, did_you_mean
from fedcli.observer import Observer
from fedcli.quantities import describe_seconds
from fedcli.server.late import late_of, needed_beside_late
from fedcli.server.merge import MergeInputs, unchanged_files
from fedcli.server.merge_round import merge_round
from fedcli.server.merge_unequal import unequal_of
from fedcli.server.open_round import open_next_round
from fedcli.server.quorum import needed_answers, seconds_left
from fedcli.workspace.arriving import arriving, waited_too_long
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.history import Round
from fedcli.workspace.inbox import discard_update
from fedcli.workspace.locks import hold
from fedcli.workspace.merge_records import Aggregation
from fedcli.workspace.registrations import check_still_unsigned, foreign_clients, is_server

if TYPE_CHECKING:
    from fedcli.server.enrol import ServerTrust
    from fedcli.workspace.noise_keys import NoiseKey, NoiseSource


@dataclass(frozen=True)
class AggregationResult:
    """What `aggregate` did, and the latest round now; `aggregation` is None where the federation had finished before.

    `overtaken`: another server published the round first, and its aggregation stands.
    """

    status: Literal["published", "overtaken", "dry_run", "finished"]
    round: int
    state: str
    aggregation: Aggregation | None

    @property
    def published(self) -> bool:
        """Whether this call opened a round."""
        return self.status == "published"


def aggregate(
    federation: FederationState,
    *,
    algorithm: str | None = None,
    partial: bool = False,
    abandon: bool = False,
    refuse_arriving: bool = False,
    dry_run: bool = False,
    wait: float = 0.0,
    observer: Observer,
) -> AggregationResult:
    """Merge the open round's updates and publish the next round, as soon as enough of the cohort has answered.

    `algorithm` names another than the round's own for this aggregation, with the hyperparameters of fedcli.yaml where
    that has the same name, else the defaults; `partial` asks for one valid update only; `abandon` ends a round of
    secure aggregation without its updates; `refuse_arriving` refuses updates that are not all there;
    `dry_run` publishes nothing;
    `wait` is how many seconds to wait for updates or the lock. Raises NotReadyError with the missing clients, BusyError
    while another process aggregates, UsageError for an algorithm that is unknown or needs what the round's clients did
    not do.
    """
    deadline = time.monotonic() + wait
    while True:
        try:
            with hold(federation.workspace.server_lock, "the server's work"):
                federation.refresh()
                give_up_arriving(federation, all_of_them=refuse_arriving)
                return _aggregate(federation, algorithm, partial, abandon, dry_run, observer)
        except (NotReadyError, BusyError):
            if time.monotonic() + federation.poll_seconds > deadline:
                raise
        time.sleep(federation.poll_seconds)


def give_up_arriving(federation: FederationState, *, all_of_them: bool) -> None:
    """Wait no longer for what is not there of updates: of all, or where nothing has come for federation.arriving."""
    head, limit = replace(federation.head, given_up=frozenset()), federation.config.federation.arriving
    given_up: set[int] = set()
    if all_of_them or limit is not None:
        missing = head.missing_clients()
        answered = [client for client in head.awaited_clients() if client not in missing]
        if all_of_them:
            given_up = {*answered}
        elif (found := arriving(head, answered)) and limit is not None:
            from fedcli.workspace.noise_keys import keys_home

            given_up = waited_too_long(head, keys_home(federation.workspace, federation.identity), found, limit)
    if given_up != federation.head.given_up:
        federation.head = replace(head, given_up=frozenset(given_up))


def aggregate_all(federation: FederationState, *, on_round: Callable[[], None], observer: Observer) -> Round:
    """Merge every round as soon as it is ready, until the last, and return that.

    `on_round` is called after each; the observer hears what is waited for when that changes.
    """
    said = ""
    while True:
        try:
            result = aggregate(federation, observer=observer)
        except (NotReadyError, BusyError) as error:
            if error.message != said:
                said = error.message
                observer.waiting(said)
            time.sleep(federation.poll_seconds)
            continue
        if result.published:
            on_round()
            observer.round_done(result)
        if result.state == "finished":
            return federation.head


def discard(federation: FederationState, client: int) -> bool:
    """Set aside a client's update of the open round, so that it may send another; return whether there was one.

    Where there is none it is the client's oldest update of an earlier round that may still count.

    A party of another user than the server's may set its own update aside, but cannot hold the server's lock: it must
    not do so while the server merges. Raises UsageError for an id that no client has, WorkspaceError for an inbox of
    another user.
    """
    federation.check_clients([client])
    workspace = federation.workspace
    with hold(workspace.server_lock, "the server's work") if is_server(workspace) else nullcontext():
        federation.refresh()
        head = federation.head
        if head.manifest.secure_aggregation is not None and head.has_update(client):
            from fedcli.workspace.secure_files import discard_masked

            return discard_masked(head, client)
        if discard_update(head, client):
            return True
        late = late_of(federation)[0] if head.manifest.staleness is not None else []
        base = next((base for base, sender in late if sender == client), None)
        return base is not None and discard_update(base, client)


def _aggregate(
    federation: FederationState,
    algorithm_name: str | None,
    partial: bool,
    abandon: bool,
    dry_run: bool,
    observer: Observer,
) -> AggregationResult:
    if algorithm_name is not None and algorithm_name not in ALGORITHMS:
        raise UsageError(f"unknown algorithm {algorithm_name!r}", hint=did_you_mean(algorithm_name, ALGORITHMS))
    head = federation.head
    if head.manifest.state == "finished":
        return AggregationResult("finished", head.number, "finished", None)
    if head.manifest.waits_for_parent and federation.config.federation.relay_every is not None:
        raise NotReadyError(
            f"round {head.number} waits for its parent: nobody trains in it",
            hint="Run `fedcli relay --id N -w PARENT --from REGION`: it sends the adapter up, or opens the next round.",
        )
    algorithm = _algorithm(federation, algorithm_name)
    trust = trust_of(federation)
    files: dict[str, bytes] | None
    if head.manifest.secure_aggregation is not None or abandon:
        files, aggregation = _merge_masked(federation, algorithm, trust, partial, abandon, dry_run, observer)
    else:
        files, aggregation = _merge_plain(federation, algorithm, trust, partial, dry_run, observer)
    if dry_run:
        return AggregationResult("dry_run", head.number, "open", aggregation)
    assert files is not None
    published = open_next_round(federation, files, aggregation, trust)
    following = after_publishing(federation, trust, published)
    return AggregationResult(
        "published" if published else "overtaken",
        following.number,
        following.manifest.state,
        following.manifest.aggregation,
    )


def after_publishing(federation: FederationState, trust: "ServerTrust | None", published: bool) -> Round:
    """Return the latest round, which this server has published, or another was first; note what it has published."""
    federation.refresh()
    following = federation.head
    if trust is not None and published:
        trust.note_round(following)
        if following.manifest.secure_aggregation is not None:
            from fedcli.server.attempts import start_attempt

            start_attempt(federation, trust)
    return following


def _merge_masked(
    federation: FederationState,
    algorithm: Algorithm,
    trust: "ServerTrust | None",
    partial: bool,
    abandon: bool,
    dry_run: bool,
    observer: Observer,
) -> tuple[dict[str, bytes], Aggregation]:
    """Return the next round's files of a round of secure aggregation; `abandon` and deserted ones change nothing."""
    from fedcli.server import secure_round  # of no other federation: it needs cryptography

    federation.workspace.store.sweep("rounds")
    gone = set() if trust is None else {*trust.enrolment.gone}
    if abandon or {*federation.head.manifest.cohort} <= gone:
        return secure_round.abandon(federation, algorithm)
    assert trust is not None
    return secure_round.merge_masked(federation, algorithm, trust, partial=partial, dry_run=dry_run, observer=observer)


def _merge_plain(
    federation: FederationState,
    algorithm: Algorithm,
    trust: "ServerTrust | None",
    partial: bool,
    dry_run: bool,
    observer: Observer,
) -> tuple[dict[str, bytes] | None, Aggregation]:
    """Return the next round's files of the updates that are there; raise NotReadyError where they are too few.

    A dry run of a round that gets noise has no files.
    """
    head = federation.head
    if head.manifest.privacy is not None:
        from fedcli.workspace.privacy_ledger import check_any_budget

        check_any_budget([*federation.past(), head], head.awaited_clients())
    needed = min(1, needed_answers(federation)) if partial else needed_answers(federation)
    missing = head.missing_clients()
    answered = [client for client in head.awaited_clients() if client not in missing]
    unenrolled = {} if trust is None else trust.unenrolled(answered)
    absent = {*missing, *foreign_clients(federation.workspace, answered)}
    if (
        federation.workspace.store.is_remote and head.manifest.staleness is None
    ):  # where a look at what came of each costs requests
        _check_answers(federation, sorted(absent), needed, unenrolled)
    absent |= arriving(head, [client for client in answered if client not in absent], is_quick=True).keys()
    if head.manifest.staleness is not None:
        present = [client for client in answered if client not in absent and client not in unenrolled]
        needed = needed_beside_late(federation, needed, present)
    _check_answers(federation, sorted(absent), needed, unenrolled)
    federation.workspace.store.sweep("rounds")
    config = federation.config
    inputs = MergeInputs(
        head,
        algorithm,
        config.federation.clients - (0 if trust is None else len(trust.enrolment.gone)),
        head.draw_order,
        head.num_counted,
        observer,
        authenticate=None if trust is None else trust.check_updates(head),
    )
    files, aggregation = merge_round(
        config.aggregation.as_rule(),
        inputs,
        noise=_noise(federation, needed, dry_run),
        lora=config.aggregation.as_lora(),
        unequal=unequal_of(federation, trust),
    )
    if head.manifest.staleness is not None:
        aggregation = aggregation.model_copy(update={"most_counted": config.aggregation.most_counted})
    _check_answers(federation, aggregation.missing, needed)
    if files is None and not head.awaited_clients():
        files = unchanged_files(head, algorithm)
    if files is None and not (dry_run and aggregation.counted):
        faults = "".join(f"\n  client {refused.client}: {refused.code}" for refused in aggregation.refused)
        raise NotReadyError(
            f"round {head.number} has no valid update:{faults}",
            hint="Set a refused update aside with `fedcli server discard --id N`; its client then sends another.",
        )
    return files, aggregation


def _noise(federation: FederationState, needed: int, dry_run: bool) -> "NoiseSource | None":
    """Return what makes the key of the open round's noise once nothing else can keep the round from being published.

    Raises NotReadyError where the round would pass its budget. None where the round needs no noise.
    """
    head, privacy = federation.head, federation.head.manifest.privacy
    if privacy is None or not privacy.is_at_server:
        return None
    from fedcli.workspace.noise_keys import key_for, keys_home
    from fedcli.workspace.privacy_ledger import check_budget

    home = keys_home(federation.workspace, federation.identity)

    def source(aggregation: Aggregation) -> "NoiseKey | None":
        _check_answers(federation, aggregation.missing, needed)
        counted = [entry.client for entry in aggregation.counted]
        rounds = [*federation.past(), head]

        def check(releases: int) -> None:
            check_budget(rounds, counted, releases)

        if dry_run:
            check(1)
            return None
        return key_for(home, head, aggregation, check)

    return source


def trust_of(federation: FederationState) -> "ServerTrust | None":
    """Return what the server signs and checks signatures with; None where signatures are off."""
    if federation.identity.signatures is None:
        check_still_unsigned(federation.workspace, federation.identity)
        return None
    from fedcli.server.enrol import current_trust  # where nothing is signed nobody needs cryptography

    return current_trust(federation)


def _algorithm(federation: FederationState, name: str | None) -> Algorithm:
    """Return the algorithm to merge a round with: its own, or the named one where the clients did what that needs."""
    head, config = federation.head, federation.config
    own = algorithm_from(head.manifest.algorithm)
    if name is None or name == own.name:
        return own
    if head.manifest.relay is not None:
        raise UsageError(
            f"--algo {name}: round {head.number} is a region's, whose parent gets the mean of its updates by rows",
            hint="Leave --algo out: what becomes of the mean is the parent's algorithm.",
        )
    algorithm = config.algorithm if config.algorithm.name == name else ALGORITHMS[name](name=name)
    if algorithm.changes_clients():
        raise UsageError(
            f"--algo {name}: it changes how clients train, too, and those of round {head.number} train for {own.name}",
            hint=f"To switch from the next round on, set algorithm.name to {name} in fedcli.yaml and aggregate without "
            "--algo: the round that this opens carries it.",
        )
    return algorithm


def _check_answers(
    federation: FederationState, missing: list[int], needed: int, unenrolled: Mapping[int, str] = MappingProxyType({})
) -> None:
    """Raise NotReadyError where too few of the cohort have answered; who is not enrolled has not."""
    head = federation.head
    awaited = head.awaited_clients()
    missing = [client for client in missing if client in awaited and client not in unenrolled]
    answered = len(awaited) - len(missing) - len(unenrolled)
    if answered < needed:
        sent = federation.workspace.sent_updates(head.number, missing)
        present = [client for client in missing if client in sent]
        absent = [client for client in missing if client not in present]
        foreign = foreign_clients(federation.workspace, present)
        half = [client for client in present if client not in foreign]
        lists = {
            "missing": absent,
            "arriving, with files still to come": half,
            "sent by a user who has not joined": foreign,
            "not enrolled": [*unenrolled],
        }
        names = "; ".join(f"{which}: {', '.join(map(str, found))}" for which, found in lists.items() if found)
        names += "".join(f"\n  client {client}: {what}" for client, what in arriving(head, half[:20]).items())
        hint = f"Run `fedcli client train --id {absent[0]}`" if absent else "Wait until the files are copied"
        hint += "; `server aggregate --refuse-arriving` refuses what will not come" if half else ""
        if unenrolled:
            from fedcli.server.enrol import hint_to_enrol

            hint = hint_to_enrol(unenrolled)
        if answered:
            hint += ", or go on without them: `server aggregate --partial`"
        left = seconds_left(federation)
        if left is not None and left > 0:
            hint += f". The deadline is in {describe_seconds(left)}; then one valid update is enough"
        elif left is not None:
            hint += f". The deadline was {describe_seconds(-left)} ago: one valid update is enough"
        raise NotReadyError(
            f"round {head.number} waits for {needed - answered} more of its {len(awaited)} clients; {names}",
            hint=f"{hint}.",
        )
