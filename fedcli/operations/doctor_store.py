"""What `fedcli doctor` looks at of a workspace elsewhere: the store, and what this machine's key may do there."""

import uuid
from collections.abc import Iterator

from fedcli.errors import DeniedError, FedError
from fedcli.operations.finding import Finding, State
from fedcli.stores.objects import Objects
from fedcli.stores.probe import empty, probe_store
from fedcli.workspace.history import is_initialised, read_identity
from fedcli.workspace.layout import Workspace, server_home
from fedcli.workspace.object_store import ObjectStore
from fedcli.workspace.registrations import own_homes
from fedcli.workspace.split_store import SplitStore

_SYNC = "Use `fedcli sync` between it and a folder, or another store (docs/STORES.md)."
_POLICY = "Ask the operator of the store for the policy of a party (docs/STORES.md)."


def store_findings(workspace: Workspace) -> Iterator[Finding]:
    """Try the store of a workspace, where this key may write, and what it may do besides."""
    objects = objects_of(workspace)
    client, name = _own_client(workspace), f".doctor-{uuid.uuid4().hex}"
    scratch = name if client is None else f"inbox/{client}/{name}"
    for probed in probe_store(objects, scratch):
        state: State = "ok" if probed.problem is None else "failed" if probed.is_needed else "warning"
        cure = "" if probed.problem is None else probed.detail if probed.name == "reach" else _SYNC
        yield Finding(f"store: {probed.name}", state, probed.problem or probed.detail, cure)
    yield from _permissions(workspace, objects, client, name)


def objects_of(workspace: Workspace) -> Objects:
    """Return the objects of a workspace elsewhere."""
    store = workspace.store.remote if isinstance(workspace.store, SplitStore) else workspace.store
    assert isinstance(store, ObjectStore)
    return store.objects


def _own_client(workspace: Workspace) -> int | None:
    """Return a client that this user has joined as; None for the server, or where nobody has joined."""
    try:
        identity = read_identity(workspace) if is_initialised(workspace) else None
    except FedError:
        return None
    if identity is None or server_home(identity.id).keys.exists():
        return None
    return min(own_homes(identity.id), default=None)


def _permissions(workspace: Workspace, objects: Objects, client: int | None, name: str) -> Iterator[Finding]:
    """Try what a party's key must be able to do, and what it should not."""
    if client is None:
        yield Finding("store: permissions", "ok", "not tried for a party: nobody has joined from this machine")
        return
    try:
        workspace.store.names("rounds")
        objects.head(f"rounds/{name}")
    except FedError as error:
        yield Finding("store: permissions", "failed", error.message, _POLICY)
        return
    others = [f"rounds/{name}/x", f"enrolment/{name}/x", f"inbox/{client + 1}/{name}/x", f"{name}/x"]
    allowed: list[str] = []
    left: list[str] = []
    is_known = True
    for key in others:
        folder = key.rpartition("/")[0]
        try:
            objects.create(key, b"")
        except DeniedError:
            continue
        except FedError as error:
            is_known = False
            yield Finding("store: permissions", "warning", f"not known for {folder}/: {error.message}", error.hint)
            continue
        allowed.append(key)
        left += [] if _is_emptied(objects, folder) else [f"{folder}/"]
    who = f"client {client}"
    if left:
        told = f"an object stays below {' and '.join(left)}: this key may create it there, and not delete it"
        yield Finding("store: clean up", "warning", told, "Let the operator of the store remove it.")
    if allowed:
        where = ", ".join(f"{key.rpartition(f'{name}/')[0] or 'the top'}" for key in allowed)
        told = f"{who}'s key may also write in {where}: signatures tell what is forged, not what is overwritten"
        yield Finding("store: permissions", "warning", told, _POLICY)
    elif is_known:
        yield Finding("store: permissions", "ok", f"{who} may read rounds/, and write only in its inbox")


def _is_emptied(objects: Objects, folder: str) -> bool:
    """Remove what was tried; return whether nothing of it stays, as far as this key can tell."""
    try:
        return empty(objects, folder) == 0
    except FedError:
        return False
