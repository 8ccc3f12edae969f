"""Updates, counted or not, looked at again by `fedcli verify`; and who had to be asked for them."""

import math
from collections.abc import Sequence

import numpy as np

from fedcli.errors import IntegrityError
from fedcli.randomness import draw_cohort
from fedcli.server.merge_unequal import check_steps
from fedcli.server.verification import Verification
from fedcli.server.verify_signatures import check_of_merge, enrolled_clients, gone_clients
from fedcli.workspace.history import Round, is_hidden, prunable
from fedcli.workspace.inbox import check_rows, opened_update, read_update, read_update_record
from fedcli.workspace.layout import UPDATE_RECORD
from fedcli.workspace.merge_records import Aggregation, CountedUpdate, RefusedUpdate
from fedcli.workspace.parsing import sha256
from fedcli.workspace.records import Identity
from fedcli.workspace.refusal import Refusal

ANOTHER = "is not the update that was counted"
_OF_ITS_BYTES = frozenset(
    (
        "json",
        "duplicate",
        "protocol",
        "workspace",
        "wrong_round",
        "wrong_base",
        "wrong_client",
        "wrong_cluster",
        "header",
        "schema",
    )
)
"""Codes that the same bytes get whenever they are looked at; others depend on files, owners and registrations."""
_NO_FILE = frozenset(("not_regular", "symlink"))
"""Codes of what stands in a file's place: its client, and nobody else, can put it there as it can delete the file."""
_NOT_TOO_LARGE = 1e15
"""No sum or square of such values is beyond float32: an update of these is not refused as `nonfinite`."""


def check_draw(current: Round, identity: Identity, result: Verification) -> None:
    """The cohort is the one that the federation's seed draws for the round, and training has that seed."""
    manifest, seed = current.manifest, identity.fixed.get("federation.seed")
    num_clients = identity.fixed.get("federation.clients")
    if type(seed) is not int or type(num_clients) is not int:
        return
    if manifest.train.seed != seed:
        result.report(current.folder, f"trains with the seed {manifest.train.seed}, the federation's is {seed}")
    if not 0 < len(manifest.cohort) <= num_clients:
        if len(manifest.cohort) > num_clients:
            result.report(current.folder, f"draws {len(manifest.cohort)} of {num_clients} clients")
        return
    try:
        gone = gone_clients(current)
    except IntegrityError:  # of the enrolment, which is reported by itself
        return
    everybody = [client for client in range(num_clients) if client not in gone]
    if manifest.secure_aggregation is not None and current.number > 0:
        everybody = [client for client in everybody if client in enrolled_clients(current)]
    if len(manifest.cohort) > len(everybody):
        return  # it draws some who are gone: whoever checks the enrolment names them
    drawn = draw_cohort(seed, current.number, everybody, len(manifest.cohort))
    if manifest.cohort != sorted(drawn):
        result.report(current.folder, "has another cohort than the federation's seed draws")
    elif manifest.selection is not None and manifest.selection.order != drawn:
        result.report(current.folder, "has its cohort in another order than the federation's seed draws")


def is_deserted(current: Round, base: Round) -> bool:
    """Return whether all of a round's cohort had left or were revoked when it was merged into the current one."""
    try:
        return {*base.manifest.cohort} <= gone_clients(current)
    except IntegrityError:  # of the enrolment, which is reported by itself
        return False


def is_reduced(base: Round) -> bool:
    """Return whether `gc` has removed something: the round's arrays are the first that it does."""
    return not all(map(base.has, prunable(base.manifest)))


def gone_updates(base: Round, clients: Sequence[int]) -> list[int]:
    """Return those of some clients of whose update a file, or all, is gone, or is nothing that may be read."""
    return sorted(client for client in clients if _is_gone(base, client))


def _is_gone(base: Round, client: int) -> bool:
    try:
        with opened_update(base, client) as folder:
            for name in (UPDATE_RECORD, *base.manifest.dropped_files):
                folder.read_part(name, 0, 1)
    except FileNotFoundError:
        return True
    except Refusal as refusal:
        return refusal.code in _NO_FILE
    return False


def check_record(base: Round, entry: CountedUpdate, result: Verification, *, is_pruned: bool = False) -> None:
    """Of a counted update of which files are gone, update.json is the one that was counted, or gone too.

    With `is_pruned` it was `gc` that removed the other files.
    """
    update = base.workspace.update(base.number, entry.client)
    try:
        if sha256(read_update_record(base, entry.client)) != entry.update:
            result.report(update, ANOTHER)
            return
        if is_pruned:
            return
        what = "files of it are gone"
    except FileNotFoundError:
        what = f"its {UPDATE_RECORD} is gone" if base.has_update(entry.client) else "is gone"
    except Refusal as refusal:
        if refusal.code not in _NO_FILE:
            result.report(update, no_longer_valid(refusal))
            return
        what = "may not be read, or is no file"
    result.num_gone += 1
    result.remark(update, f"was counted, and {what}; its hash is recorded: {entry.update}")


def check_counted(base: Round, entry: CountedUpdate, result: Verification) -> None:
    """A counted update passes every check again, and is the one that was counted, as it was counted."""
    path = base.workspace.update(base.number, entry.client)
    try:
        update = read_update(base, entry.client)
    except Refusal as refusal:
        result.report(path, no_longer_valid(refusal))
        return
    if update is None or update.sha256 != entry.update:
        result.report(path, ANOTHER)
        return
    result.num_updates += 1
    if base.manifest.withholds:
        return
    said = (update.record.num_samples, update.record.train_loss, update.num_bytes)
    if said != (entry.num_samples, entry.train_loss, entry.bytes if entry.bytes is not None else update.num_bytes):
        result.report(path, "was counted with another num_samples, loss or size than it has")


def check_uncounted(current: Round, aggregation: Aggregation, base: Round, result: Verification) -> None:
    """A refused update is refused again; of a missing one nothing lies there.

    A client can mend an update that was refused, or send one late: this is told, and no violation. What the same bytes
    get at any time is one.
    """
    try:
        authenticate = check_of_merge(current, base) if aggregation.refused else None
    except IntegrityError:  # of the enrolment, which is reported by itself
        return
    for refused in aggregation.refused:
        path = base.workspace.update(base.number, refused.client)
        if refused.base is not None or is_hidden(base.workspace, refused.client):
            continue  # a late update is not looked at again
        try:
            update = read_update(base, refused.client, authenticate=authenticate)
            if update is None:
                continue
            check_rows(base, refused.client, update)
            if aggregation.step_weighting is not None:
                check_steps(base, update)
        except Refusal:
            continue
        said = f"was refused ({refused.code}), and is valid"
        is_same = refused.update in (None, update.sha256)
        arrays = [array for of_file in update.files.values() for array in of_file.values()]
        is_small = all(np.abs(array).max(initial=0) < _NOT_TOO_LARGE for array in arrays)
        if is_same and (refused.code in _OF_ITS_BYTES or (refused.code == "nonfinite" and is_small)):
            result.report(path, f"{said}: the round does not tell the truth of it")
        else:
            result.remark(path, f"{said} now: its client has mended it since, or the round does not tell the truth")
    for client in [] if base.manifest.staleness is not None else aggregation.missing:  # those may count later
        if not is_hidden(base.workspace, client) and base.has_update(client):
            path = base.workspace.update(base.number, client)
            result.remark(path, "was not counted: it came late, or the round does not tell the truth of it")


def no_longer_valid(refused: RefusedUpdate | Refusal) -> str:
    """Return what is wrong with an update that was counted."""
    return f"was counted, and is not valid any more: {refused.code}: {refused.reason}"


def is_first_of_draw(
    counted: list[int], surplus: list[int], previous: Round, num_late: int = 0, most_counted: int | None = None
) -> bool:
    """Return whether no more count than may, and nobody is surplus but behind as many as may.

    Beside those of the round itself late updates count; where a client may count so often only, it may be surplus.
    """
    if not surplus or most_counted is not None:
        return len(counted) + num_late <= previous.num_counted
    place = {client: number for number, client in enumerate(previous.draw_order)}
    behind = max(place.get(client, 0) for client in counted) if counted else -1
    return len(counted) + num_late == previous.num_counted and all(place.get(client, 0) > behind for client in surplus)


def is_same_record(again: CountedUpdate, recorded: CountedUpdate) -> bool:
    """Return whether two records agree; the last digits of norms and products depend on how numpy was built."""
    close = math.isclose(again.delta_norm or 0.0, recorded.delta_norm or 0.0, rel_tol=1e-9)
    unchecked = {"delta_norm": recorded.delta_norm} | ({"bytes": None} if recorded.bytes is None else {})
    if recorded.cosine is not None or recorded.num_samples is None:
        figures = ("weight", "cosine", "change", "file_weights")
        close = close and all(_close(getattr(again, name), getattr(recorded, name)) for name in figures)
        unchecked |= {name: getattr(recorded, name) for name in figures}
    return close and again.model_copy(update=unchecked) == recorded


def _close(again: object, recorded: object) -> bool:
    """Return whether two figures of an update, or two mappings of such, are the same but for their last digits."""
    if isinstance(again, dict) and isinstance(recorded, dict):
        return again.keys() == recorded.keys() and all(_close(again[name], recorded[name]) for name in again)
    if isinstance(again, float) and isinstance(recorded, float):
        return math.isclose(again, recorded, rel_tol=1e-6, abs_tol=1e-9)
    return again == recorded
