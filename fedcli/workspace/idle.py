"""A glance at the open round: whether any of its clients may have something to do here.

It validates nothing and imports little, so that cron can run it every minute. In doubt it answers yes: the full check
that follows reports what is wrong.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from fedcli.errors import FedError
from fedcli.workspace.layout import MANIFEST, WORKSPACE_ID, Home, Workspace, default_home, is_round_name
from fedcli.workspace.refusal import Refusal

MAX_BYTES = 2**28


@dataclass(frozen=True)
class Glance:
    """The latest round, whether it ends the federation, and whether a client of it may have to train here."""

    round: int
    is_finished: bool
    missing: list[int]
    may_train: bool
    identity: bytes
    """The contents of workspace.json, for whoever goes on from here."""


def glance(workspace: Workspace) -> Glance | None:
    """Look at the latest round that a listing shows; None where that is not what it should be."""
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
        return Glance(number, manifest["state"] == "finished", missing, may_train, contents)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, FedError, Refusal):
        return None


def _may_train(workspace: Workspace, identity: str, is_simulation: bool, client: int) -> bool:
    named = os.environ.get("FEDCLI_HOME")
    home = Home(Path(named)) if named else default_home(identity, client)
    if is_simulation:  # where its rows are gone, the full check says so
        return True
    return home.party.exists() or (workspace.client_rows(client).exists() and not workspace.has_joined(client))
