"""A glance at the open round: whether any of its clients may have something to do here.

It validates nothing and loads next to nothing, so that cron may look every minute; where it is not sure it says that
there may be something, and whoever looks properly then tells what is wrong.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from fedcli.errors import WorkspaceError
from fedcli.workspace.layout import MANIFEST, WORKSPACE_ID, Home, Workspace, default_home, is_round_name, update_name


@dataclass(frozen=True)
class Glance:
    """The latest round, whether it ends the federation, and whether a client of it may have to train here."""

    round: int
    is_finished: bool
    may_train: bool


def glance(workspace: Workspace) -> Glance | None:
    """Look at the latest round that a listing shows; None where that is not what it should be."""
    try:
        identity = json.loads(workspace.identity.read_bytes())["id"]
        if not re.fullmatch(WORKSPACE_ID, identity):
            return None
        number = max(int(name) for name in os.listdir(workspace.rounds) if is_round_name(name))
        if (workspace.round(number + 1) / MANIFEST).exists():  # a listing may be old
            return None
        manifest = json.loads((workspace.round(number) / MANIFEST).read_bytes())
        if manifest["workspace"] != identity:
            return None
        may_train = any(_may_train(workspace, identity, number, client) for client in manifest["cohort"])
        return Glance(number, manifest["state"] == "finished", may_train)
    except (OSError, ValueError, KeyError, TypeError, WorkspaceError):
        return None


def _may_train(workspace: Workspace, identity: str, number: int, client: int) -> bool:
    if os.path.lexists(workspace.client_inbox(client) / update_name(number)):
        return False
    named = os.environ.get("FEDCLI_HOME")
    home = Home(Path(named)) if named else default_home(identity, client)
    return home.party.exists() or (
        workspace.client_rows(client).exists() and not workspace.registration(client).exists()
    )
