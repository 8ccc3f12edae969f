"""What `fedcli verify` checks of a region: that its rounds begin from its parent's, and that its sums went up."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedcli.errors import FedError, IntegrityError
from fedcli.server.region import begins_anew
from fedcli.server.verification import Verification
from fedcli.workspace.address import workspace_at
from fedcli.workspace.history import Round, is_initialised, read_identity, read_round
from fedcli.workspace.inbox import read_update_record
from fedcli.workspace.layout import ADAPTER_NAME, Workspace
from fedcli.workspace.records import parse_update_record
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.registrations import own_homes, read_party
from fedcli.workspace.relay_records import ParentRound

_OWN = ("schedule", "seed", "date")
"""Of `train`, what a region's round does not have from its parent's: the rate is constant over its rounds."""


def is_beginning(current: Round, previous: Round | None) -> bool:
    """Return whether a round begins from a parent's, so that no update made it."""
    return begins_anew(current.manifest, None if previous is None else previous.manifest)


def check_place(current: Round, previous: Round | None, result: Verification) -> None:
    """A region's round stands where the one before it lets it stand."""
    manifest, folder = current.manifest, current.folder
    before = None if previous is None else previous.manifest.relay
    relay = manifest.relay
    if relay is None:
        if before is not None and before.left > 0:
            result.report(folder, "is no region's, and the round before it is, with rounds left before its sum goes up")
        return
    if previous is None and current.number > 0:
        return  # the round before is missing or damaged, which is told
    if begins_anew(manifest, None if previous is None else previous.manifest):
        merge = manifest.aggregation
        if merge is not None and (merge.counted or merge.refused):
            result.report(folder, "begins from its parent's round, and yet says that it was merged of updates")
        if (relay.left == 0) != (manifest.state == "finished"):
            result.report(
                folder, f"begins from its parent's round with {relay.left} rounds left, and is {manifest.state}"
            )
        if manifest.train.learning_rate != manifest.train.schedule.learning_rate:
            result.report(folder, "trains at another rate than its parent's round")
        return
    if before is not None and before.left > 0:
        assert previous is not None
        same = ("train", "algorithm", "rounds") if relay.left > 0 else ("train", "rounds")
        if relay.left != before.left - 1:
            result.report(
                folder, f"has {relay.left} rounds left before its sum goes up, the round before had {before.left}"
            )
        if odd := [name for name in same if getattr(manifest, name) != getattr(previous.manifest, name)]:
            result.report(folder, f"changes {', '.join(odd)}, which its parent's round has fixed")
    elif relay.left > 0 or relay.parent is not None:
        result.report(folder, "goes on with no beginning from its parent's round")


@dataclass(frozen=True)
class _Beginning:
    """A round that begins from a parent's, and the sum that was made of it; None before it was."""

    first: Round
    origin: ParentRound
    summed: Round | None


def check_parents(rounds: Sequence[Round], given: str | None, result: Verification) -> None:
    """What began from rounds of a parent has their adapters, and what the parent counted of it is what was summed.

    `given` is the address of a parent; else it is where this user has relayed the region to. Of a parent that is not at
    hand it is told that nothing was looked at.
    """
    unseen: dict[str, list[int]] = {}
    parents: dict[str, Workspace | None] = {}
    for each in _beginnings(rounds):
        origin = each.origin
        if origin.workspace not in parents:
            parents[origin.workspace] = _find_parent(origin, given)
        if (parent := parents[origin.workspace]) is None:
            unseen.setdefault(origin.workspace, []).append(each.first.number)
            continue
        try:
            _check_beginning(each, parent, result)
        except FedError as error:
            if isinstance(error.__cause__, OSError):
                raise
            result.report(each.first.folder, f"begins from a round that cannot be looked at: {error.message}")
    for workspace, numbers in unseen.items():
        which = f"round{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
        result.remark(
            rounds[0].workspace.rounds,
            f"{which} begin from rounds of workspace {workspace}, which are not looked at: name it with --parent",
        )
    if given is not None and all(parent is None for parent in parents.values()):
        raise IntegrityError(
            f"no round begins from one of {given}",
            hint="Name the parent that the region was relayed to, or leave --parent out.",
        )


def _beginnings(rounds: Sequence[Round]) -> list[_Beginning]:
    found: list[_Beginning] = []
    previous: Round | None = None
    for current in rounds:
        relay = current.manifest.relay
        if relay is not None and relay.parent is not None:
            if is_beginning(current, previous):
                found.append(_Beginning(current, relay.parent, None))
            elif relay.left == 0 and found and found[-1].origin == relay.parent:
                found[-1] = _Beginning(found[-1].first, relay.parent, current)
        previous = current
    return found


def _find_parent(origin: ParentRound, given: str | None) -> Workspace | None:
    """Return the workspace of a parent; None where this user does not know where it lies, or it is another's."""
    home = own_homes(origin.workspace).get(origin.client)
    record = None if home is None else read_party(home)
    address = given or (None if record is None or record.region is None else record.region.parent)
    if address is None:
        return None
    workspace = workspace_at(address).uncached()
    try:
        is_it = is_initialised(workspace) and read_identity(workspace).id == origin.workspace
    except IntegrityError:
        is_it = False
    return workspace if is_it else None


def _check_beginning(each: _Beginning, parent: Workspace, result: Verification) -> None:
    origin, first = each.origin, each.first
    stands = read_round(parent, origin.round)
    if stands is None or stands.sha256 != origin.sha256:
        what = "is gone" if stands is None else "is another"
        result.report(first.folder, f"began from round {origin.round} of {parent.address}, which {what} now")
        return
    above, own = stands.manifest, first.manifest
    if above.files[ADAPTER_NAME] != own.files[ADAPTER_NAME]:
        result.report(first.folder, f"has another adapter than round {origin.round} of {parent.address}")
    there, here = (each.train.model_dump(exclude={*_OWN}) for each in (above, own))
    if there != here:
        odd = [name for name in there if there[name] != here[name]]
        result.report(first.folder, f"asks for another {', '.join(odd)} than round {origin.round} of {parent.address}")
    result.num_relayed += 1
    following = read_round(parent, origin.round + 1)
    merge = None if following is None else following.manifest.aggregation
    counted = {} if merge is None else {entry.client: entry.update for entry in merge.counted}
    if origin.client in counted and stands.manifest.secure_aggregation is None:
        _check_sum(each, stands, result)


def _check_sum(each: _Beginning, stands: Round, result: Verification) -> None:
    """The update that the parent counted is the region's sum."""
    client = each.origin.client
    try:
        record = parse_update_record(read_update_record(stands, client))
    except (FileNotFoundError, Refusal):
        return  # it is hidden, or gone: the parent's own check tells
    if record.relay is None or record.relay.workspace != each.first.manifest.workspace:
        return  # the party sent something of its own
    if each.summed is None or record.relay.sha256 != each.summed.sha256:
        result.report(
            stands.workspace.update(stands.number, client),
            f"was counted as round {record.relay.round} of the region, and is not the round that stands there",
        )
