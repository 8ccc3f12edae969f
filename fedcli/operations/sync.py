"""Carrying a workspace from one place to another: what is there stays, what is lacking comes whole."""

from contextlib import suppress
from dataclasses import dataclass

from fedcli.errors import FedError, UsageError, WorkspaceError
from fedcli.observer import Observer
from fedcli.operations.carry import Carried, Carrier, Judge
from fedcli.operations.sync_pair import Pair
from fedcli.operations.sync_walk import CARRIED, Scope, Walk
from fedcli.workspace.history import is_initialised, read_identity, read_round
from fedcli.workspace.layout import CONFIG_NAME, Workspace
from fedcli.workspace.parsing import sha256
from fedcli.workspace.records import Identity
from fedcli.workspace.split_store import LOCAL
from fedcli.workspace.sync_memory import SyncMemory


def sync(
    source: Workspace,
    target: Workspace,
    *,
    client: int | None = None,
    replace: bool = False,
    observer: Observer,
) -> Carried:
    """Carry what the target lacks of a workspace; a target that is empty becomes a copy of it.

    With a `client` only what that party needs and sends. With `replace` what may change is the source's wherever the
    two differ. Raises WorkspaceError where the source is no workspace, or the target another one or something else.
    """
    if not is_initialised(source):
        raise WorkspaceError(
            f"{source.address} is no workspace: it holds no {source.identity.name}",
            hint="Name the place that has the workspace first, and then the one that lacks something.",
        )
    identity = read_identity(source)
    judge = _Memory(SyncMemory(identity.id, source.address, target.address), replace)
    return carry_all(source, target, identity, judge, Scope.of_party(client), observer=observer)


def carry_all(
    source: Workspace,
    target: Workspace,
    identity: Identity,
    judge: Judge,
    scope: Scope,
    *,
    observer: Observer,
) -> Carried:
    """Carry what a target lacks of a workspace, as `judge` has it where something has changed."""
    if source.address == target.address:
        raise UsageError(f"{source.address} is both places", hint="Name two: where it comes from, and where it goes.")
    result = Carried(source.address, target.address, identity.id, is_first=_check_target(target, identity))
    carrier = Carrier(source.store, target.store, judge, result, observer)
    Walk(Pair(source, target, identity), scope, carrier, result).run()
    return result


@dataclass(frozen=True)
class _Memory:
    """Tells who has changed a file since both places had the same."""

    memory: SyncMemory
    replaces: bool

    def is_newer(self, name: str, ours: bytes, theirs: bytes | None) -> bool | None:
        known = self.memory.get(name)
        if self.replaces:
            return True
        if theirs is None:
            return known != sha256(ours)
        if known == sha256(theirs):
            return True
        return False if known == sha256(ours) else None

    def agreed(self, name: str, contents: bytes) -> None:
        self.memory.keep(name, contents)


def _check_target(target: Workspace, identity: Identity) -> bool:
    """Return whether the target is empty or half of a first copy; raise WorkspaceError where it is something else."""
    if is_initialised(target):
        other = read_identity(target)
        if other.id != identity.id:
            raise WorkspaceError(
                f"{target.address} is another workspace: {other.id}, not {identity.id}",
                hint="Name the other copy of the same workspace, or an empty place.",
            )
        return False
    start = None
    with suppress(FedError):  # half of something else is told below
        start = read_round(target, 0)
    names = {name for name in target.store.names("") if not name.startswith(".")}
    names -= {*LOCAL} if target.store.is_remote else set()
    is_copy = start is not None and start.manifest.workspace == identity.id
    odd = sorted(names - {*CARRIED, *((CONFIG_NAME,) if is_copy else ())})
    if odd or (start is not None and not is_copy):
        what = f"{odd[0]} lies there" if odd else "its round 0 is another workspace's"
        raise WorkspaceError(
            f"{target.address} is neither empty nor a copy of this workspace: {what}",
            hint="Name an empty place: it becomes a copy.",
        )
    return True
