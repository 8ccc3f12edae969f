"""Checking a workspace against the protocol's invariants (docs/PROTOCOL.md, "What verify checks")."""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from fedcli.algos import Algorithm
from fedcli.algos.share import sent_tensors
from fedcli.config import algorithm_from
from fedcli.config.adapter_config import parse_adapter_config
from fedcli.errors import FedError, IntegrityError
from fedcli.observer import Observer
from fedcli.server.cluster_terms import split_clusters
from fedcli.server.communication_cost import cost_of, history_of
from fedcli.server.updates_again import (
    check_draw,
    check_uncounted,
    is_deserted,
    is_first_of_draw,
)
from fedcli.server.verification import Verification
from fedcli.server.verify_beside import check_baselines, check_leftovers, check_private, check_scores
from fedcli.server.verify_merge import recompute
from fedcli.server.verify_privacy import check_privacy
from fedcli.server.verify_relay import check_parents, check_place, is_beginning
from fedcli.server.verify_signatures import check_signatures, read_pins
from fedcli.server.verify_unequal import check_lapsed, check_window
from fedcli.workspace.enrolment import forget_enrolment
from fedcli.workspace.history import (
    Round,
    listed_rounds,
    read_identity,
    read_round,
)
from fedcli.workspace.layout import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_FILE,
    BASE_DELTA_CONFIG_NAME,
    BASE_DELTA_NAME,
    MANIFEST,
    MANIFEST_SIGNATURE,
    PRUNED,
    Workspace,
    adapter_name,
    is_round_name,
    round_name,
)
from fedcli.workspace.merge_records import Aggregation
from fedcli.workspace.publish import TEMPORARY_PREFIX
from fedcli.workspace.records import Identity, Manifest
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.tensors import decode


def verify(
    workspace: Workspace,
    *,
    trust: Path | None = None,
    noise_keys: Sequence[Path] = (),
    parent: str | None = None,
    observer: Observer,
) -> Verification:
    """Check every published round and counted update; what is wrong is collected, not raised. `trust` has pinned keys.

    `noise_keys` are files, or folders of them, with the keys of noise that rounds were merged with; `parent` is the
    address of a region's parent.

    Nothing is read from copies on this machine. Costs in proportion to the history: every round's files are hashed and
    every aggregate is computed again from the updates that it counted.
    """
    workspace = workspace.uncached()
    result, pins = Verification(), None if trust is None else read_pins(trust)
    keys = _read_noise_keys(noise_keys)
    identity = _read_identity(workspace, result)
    forget_enrolment(workspace)
    for entry in workspace.store.names("rounds"):
        if not entry.startswith(".") and not is_round_name(entry):
            result.report(workspace.rounds / entry, "is no round; nothing else belongs there")
    seen: dict[str, int] = {}
    previous: Round | None = None
    rounds: list[Round] = []
    expected = 0
    for number in listed_rounds(workspace):
        observer.checking(f"round {number}")
        if number != expected:
            previous = None
            missing = round_name(expected) + (f" to {round_name(number - 1)}" if number - 1 > expected else "")
            result.report(workspace.rounds / missing, "is missing though a later round stands")
        expected = number + 1
        current = _read(workspace, number, result)
        if current is not None:
            result.num_rounds += 1
            _check_round(current, identity, result)
            _check_links(current, previous, number, result)
            check_place(current, previous, result)
            if identity is not None:
                check_draw(current, identity, result)
            if current.manifest.aggregation is not None:
                _check_aggregation(current, current.manifest.aggregation, previous, seen, result)
                if previous is not None:
                    check_window(current, current.manifest.aggregation, previous, rounds, result)
                if previous is not None and identity is not None:
                    if previous.manifest.secure_aggregation is None:
                        check_uncounted(current, current.manifest.aggregation, previous, result)
                    num_clients = int(identity.fixed.get("federation.clients", 0)) or len(previous.manifest.cohort)
                    check_privacy(current, current.manifest.aggregation, previous, result)
                    recompute(current, current.manifest.aggregation, previous, rounds, num_clients, keys, result)
            if number == 0:
                check_baselines(current, result)
        previous = current
        if current is not None:
            rounds.append(current)
    check_scores(workspace, result)
    check_leftovers(workspace, result)
    if identity is not None:
        result.num_signatures = check_signatures(workspace, identity, rounds, pins, result.report, result.remark)
    if rounds:
        check_lapsed(rounds, result)
        check_private(rounds, result)
        check_parents(rounds, parent, result)
    if previous is not None and previous.has(PRUNED):
        result.report(previous.folder / PRUNED, "removes what may not be removed: the latest round's files")
    if not result.num_rounds:
        result.report(workspace.rounds, "holds no round")
    return result


def _read_identity(workspace: Workspace, result: Verification) -> Identity | None:
    try:
        return read_identity(workspace)
    except FedError as error:
        if not listed_rounds(workspace) or isinstance(error.__cause__, OSError):
            raise  # no damage: nothing was made here yet, or this machine is in trouble
        result.report(workspace.identity, error.message)
        return None


def _read(workspace: Workspace, number: int, result: Verification) -> Round | None:
    try:
        current = read_round(workspace, number)
    except IntegrityError as error:
        result.report(workspace.round(number), error.message)
        return None
    if current is None:
        result.report(workspace.round(number), f"has no {MANIFEST}")
    return current


def _check_round(current: Round, identity: Identity | None, result: Verification) -> None:
    """Every listed file exists with its hash; the adapter has the manifest's tensors, its settings fedcli's schema."""
    manifest = current.manifest
    if identity is not None and manifest.workspace != identity.id:
        result.report(current.folder, f"belongs to workspace {manifest.workspace}, not to {identity.id}")
    adapters = {*map(adapter_name, range(manifest.num_clusters))}
    wanted = adapters | ({BASE_DELTA_NAME} if manifest.delta_tensors else set())
    for name in sorted(wanted - manifest.files.keys()):
        result.report(current.folder, f"does not list {name}, which clients need")
    pruned = _pruned_files(current, result)
    for name in manifest.files:
        try:
            contents = current.read(name)
            result.num_files += 1
            if name in adapters:
                decode(contents, manifest.tensors)
            elif name == BASE_DELTA_NAME:
                decode(contents, manifest.delta_tensors)
            elif name in (ADAPTER_CONFIG_NAME, BASE_DELTA_CONFIG_NAME):
                parse_adapter_config(contents, "it")
        except FedError as error:
            if isinstance(error.__cause__, OSError):
                raise  # this machine is in trouble: that is nothing of the workspace's
            if name not in pruned or current.has(name):
                result.report(current.folder / name, error.message)
        except Refusal as refusal:
            result.report(current.folder / name, refusal.reason)
        except (OSError, ValueError) as error:  # a name that no file can have
            result.report(current.folder, f"lists {name[:80]!a}: {error}")
    signature = {MANIFEST_SIGNATURE} if manifest.enrolment is not None else set()
    foreign = current.names() - {MANIFEST, PRUNED, *signature, *manifest.files}
    for name in sorted(name for name in foreign if not name.startswith(TEMPORARY_PREFIX)):
        if name.rpartition("/")[2].startswith("."):
            result.remark(current.folder / name, "is a name that nobody reads, such as other tools leave")
            continue
        result.report(current.folder / name, "is not listed in the manifest: a published round never changes")
    try:
        algorithm = algorithm_from(manifest.algorithm)
        if manifest.update_files != [ADAPTER_FILE, *algorithm.update_files]:
            result.report(current.folder, f"asks for {manifest.update_files}, which its algorithm does not fit")
        if manifest.update_tensors != _sent(algorithm, manifest):
            result.report(current.folder, "asks for other tensors than its algorithm has updates carry")
    except IntegrityError as error:
        result.report(current.folder, error.message)
    if (manifest.state == "finished" or manifest.waits_for_parent) != (manifest.cohort == []):
        result.report(current.folder, f"is {manifest.state} with a cohort of {len(manifest.cohort)}")
    if (manifest.state == "finished") != (manifest.round >= manifest.rounds):
        result.report(current.folder, f"is {manifest.state}, and it is round {manifest.round} of {manifest.rounds}")
    if manifest.cohort != sorted(set(manifest.cohort)):
        result.report(current.folder, "has a cohort that is not sorted, or names a client twice")
    try:
        current.check_unchanged()
    except IntegrityError as error:
        result.report(current.folder, error.message)
    selection = manifest.selection
    if selection is not None and (sorted(selection.order) != manifest.cohort or selection.count > len(selection.order)):
        result.report(current.folder, "has a selection that is not of its cohort")


def _sent(algorithm: Algorithm, manifest: Manifest) -> list[str] | None:
    return sent_tensors(algorithm, manifest.share, manifest.round, manifest.tensors, manifest.private or ())


def _pruned_files(current: Round, result: Verification) -> set[str]:
    """Return the files that may be gone; PRUNED.json lists them as the manifest does, and spares what others need."""
    try:
        pruned = current.pruned()
    except IntegrityError as error:
        result.report(current.folder / PRUNED, error.message)
        return set()
    if pruned is None:
        return set()
    if current.number == 0 or pruned.round != current.number or ADAPTER_CONFIG_NAME in pruned.files:
        result.report(current.folder / PRUNED, "removes what may not be removed")
        return set()
    if not pruned.files.items() <= current.manifest.files.items():
        result.report(current.folder / PRUNED, "lists other files than the manifest")
    return {*pruned.files}


def _check_links(current: Round, previous: Round | None, number: int, result: Verification) -> None:
    """Rounds are chained by the hashes of their manifests."""
    manifest = current.manifest
    if number == 0:
        if manifest.parent is not None or manifest.aggregation is not None:
            result.report(current.folder, "is round 0 and yet has a parent or an aggregation")
        return
    if manifest.aggregation is None:
        result.report(current.folder, "says nothing of the aggregation that it came from")
    if previous is None:
        return
    if manifest.parent != previous.sha256:
        result.report(current.folder, f"names another parent than round {number - 1}'s manifest.json")
    if previous.manifest.state == "finished":
        result.report(current.folder, "follows a finished round")
    with suppress(IntegrityError):  # an algorithm that is not known is told once
        if manifest.cost not in (None, cost_of(manifest, previous.manifest)):
            result.report(current.folder, "states another cost than its files and counted updates give")
    if manifest.cost is not None and manifest.history != history_of(manifest, previous.manifest):
        result.report(current.folder, "states another history of algorithms than the rounds before it")
    if manifest.clusters != split_clusters(previous.manifest.clusters, manifest.aggregation):
        result.report(current.folder, "has other clusters than the round before it leaves")
    for key in ("task", "model", "tensors"):
        if getattr(manifest, key) != getattr(previous.manifest, key):
            result.report(current.folder, f"changes {key}, which is fixed")
    if _ranks(manifest) != _ranks(previous.manifest):
        result.report(current.folder, "changes the clients' ranks, which are fixed")
    if manifest.files.get(ADAPTER_CONFIG_NAME) != previous.manifest.files.get(ADAPTER_CONFIG_NAME):
        result.report(current.folder, f"changes {ADAPTER_CONFIG_NAME}, which is fixed")


def _ranks(manifest: Manifest) -> Mapping[str, int]:
    return {} if manifest.lora is None else manifest.lora.ranks or {}


def _check_aggregation(
    current: Round, aggregation: Aggregation, previous: Round | None, seen: dict[str, int], result: Verification
) -> None:
    """The cohort is accounted for, as the order of the draw has it, and no update is counted twice in the history."""
    counted = [entry.client for entry in aggregation.counted if entry.base is None]
    refused = [entry.client for entry in aggregation.refused if entry.base is None]
    num_late = len(aggregation.counted) - len(counted)
    folder = current.folder
    if not aggregation.counted and previous is not None and previous.manifest.secure_aggregation is not None:
        result.remark(folder, "counts no update: secure aggregation was abandoned, or all had left or were revoked")
    elif is_beginning(current, previous):
        pass  # the place that it has is checked by itself
    elif not aggregation.counted and (previous is None or not is_deserted(current, previous)):
        result.report(folder, "counts no update, and of the cohort before not all had left or were revoked")
    accounts = (counted, refused, aggregation.missing, aggregation.surplus)
    for clients in accounts:
        if clients != sorted(set(clients)):
            result.report(folder, f"lists clients out of order or twice: {clients}")
    if previous is not None and sorted(itertools.chain(*accounts)) != previous.manifest.cohort:
        result.report(folder, f"does not account for each client of round {previous.number}'s cohort exactly once")
    elif (
        previous is not None
        and not is_beginning(current, previous)
        and not is_first_of_draw(counted, aggregation.surplus, previous, num_late, aggregation.most_counted)
    ):
        result.report(folder, f"does not count the first {previous.num_counted} valid updates in draw order")
    for entry in aggregation.counted:
        if entry.update in seen:
            result.report(folder, f"counts client {entry.client}'s update, which round {seen[entry.update]} did")
        seen[entry.update] = current.number


def _read_noise_keys(paths: Sequence[Path]) -> dict[str, bytes]:
    if not paths:
        return {}
    from fedcli.workspace.noise_keys import read_keys  # only who has keys needs them

    return read_keys(paths)
