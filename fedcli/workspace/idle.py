"""A glance at the open round: whether any of its clients may have something to do here.

It validates nothing and imports little, so that cron can run it every minute. In doubt it answers yes: the full check
that follows reports what is wrong. Of a workspace elsewhere, where each look is a request, the answer is noted with the
few files that it hangs on, and holds as long as these stay as they are.
"""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcli.errors import FedError
from fedcli.workspace.layout import MANIFEST, UPDATE_RECORD, WORKSPACE_ID, Home, Workspace, default_home, is_round_name
from fedcli.workspace.publish import make_folder, publish_file
from fedcli.workspace.refusal import Refusal

MAX_BYTES = 2**28
_POLLS = "polls"
_ANY = "any"
_MOST_NOTED = 8
"""Of clients that are here: with more of them a poll would ask for each."""


@dataclass(frozen=True)
class Glance:
    """The latest round, whether it ends the federation, and whether a client of it may have to train here."""

    round: int
    is_finished: bool
    missing: list[int]
    """Who has not answered; none of an answer that was noted before, since which others may have."""
    may_train: bool
    identity: bytes
    """The contents of workspace.json, for whoever goes on from here."""


def glance(workspace: Workspace) -> Glance | None:
    """Look at the latest round that a listing shows; None where that is not what it should be."""
    if (noted := recall(workspace, _ANY)) is not None and not _has_come(workspace, noted):
        return Glance(noted["round"], noted["is_finished"], [], False, noted["identity"].encode())
    try:
        store, name = workspace.store, workspace.name
        contents = store.read(name(workspace.identity), MAX_BYTES)
        document = json.loads(contents)
        identity, is_simulation = document["id"], document.get("simulation") is True
        if not re.fullmatch(WORKSPACE_ID, identity):
            return None
        number = max(int(found) for found in store.names(name(workspace.rounds)) if is_round_name(found))
        if store.exists(name(workspace.round(number + 1) / MANIFEST)):  # a listing may be old
            return None
        manifest = json.loads(store.read(name(workspace.round(number) / MANIFEST), MAX_BYTES))
        if manifest["workspace"] != identity:
            return None
        if isinstance(privacy := manifest.get("privacy"), dict) and privacy.get("secure_aggregation") is not None:
            return None  # an answer may be due where an update stands
        sent = workspace.sent_updates(number, manifest["cohort"])
        missing = [client for client in manifest["cohort"] if client not in sent]
        may_train = any(_may_train(workspace, identity, is_simulation, client) for client in missing)
        seen = Glance(number, manifest["state"] == "finished", missing, may_train, contents)
        here = [client for client in sent if _may_train(workspace, identity, is_simulation, client)]
        _note_glance(workspace, seen, here)
        return seen
    except (OSError, ValueError, KeyError, TypeError, RecursionError, FedError, Refusal):
        return None


def _has_come(workspace: Workspace, noted: dict[str, Any]) -> bool:
    """Return whether a client that is missing has joined from this machine since an answer was noted."""
    document = json.loads(noted["identity"])
    is_simulation = document.get("simulation") is True
    return any(_may_train(workspace, document["id"], is_simulation, client) for client in noted["missing"])


def _note_glance(workspace: Workspace, seen: Glance, here: list[int]) -> None:
    """Note that no client has to train here, where this hangs on a few files: the updates of those that are here."""
    if seen.may_train or len(here) > _MOST_NOTED:
        return
    name = workspace.name
    updates = {name(workspace.update(seen.round, client) / UPDATE_RECORD): True for client in here}
    following = {name(workspace.round(seen.round + 1) / MANIFEST): False}
    answer = {"round": seen.round, "is_finished": seen.is_finished, "missing": seen.missing}
    answer |= {"identity": seen.identity.decode()}
    note(workspace, _ANY, answer, following | (updates or {name(workspace.identity): True}))


def _may_train(workspace: Workspace, identity: str, is_simulation: bool, client: int) -> bool:
    named = os.environ.get("FEDCLI_HOME")
    home = Home(Path(named)) if named else default_home(identity, client)
    if is_simulation:  # where its rows are gone, the full check says so
        return True
    return home.party.exists() or (workspace.client_rows(client).exists() and not workspace.has_joined(client))


def recall(workspace: Workspace, key: str) -> dict[str, Any] | None:
    """Return an answer that was noted under a key, where what it hangs on is unchanged: a request a file.

    None where the workspace is on a disk, nothing was noted, or something has changed.
    """
    if not workspace.store.is_remote:
        return None
    try:
        noted = json.loads(_poll(workspace, key).read_bytes())
        names, answer = dict(noted["names"]), dict(noted["answer"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return answer if workspace.store.versions([*names]) == [*names.values()] else None


def note(workspace: Workspace, key: str, answer: Mapping[str, Any], names: Mapping[str, bool]) -> None:
    """Note an answer of a workspace elsewhere with the files that it hangs on, and whether each is there.

    Nothing is noted where one has come or gone since; a disk that refuses only costs requests.
    """
    if not workspace.store.is_remote:
        return
    versions = workspace.store.versions([*names])
    if [version is not None for version in versions] != [*names.values()]:
        return
    noted = {"answer": dict(answer), "names": dict(zip(names, versions, strict=True))}
    with suppress(OSError, FedError):
        make_folder(workspace.root / _POLLS)
        publish_file(_poll(workspace, key), json.dumps(noted).encode(), mode=0o600)


def _poll(workspace: Workspace, key: str) -> Path:
    return workspace.root / _POLLS / f"{key}.json"
