"""What this user's machine remembers of files that may change: the contents that two places had last in common."""

import json
from contextlib import suppress
from pathlib import Path

from fedcli.workspace.layout import private_folder
from fedcli.workspace.publish import PRIVATE_FOLDER_MODE, make_folder, publish_file
from fedcli.workspace.records import sha256


class SyncMemory:
    """By file, the hash that both of two places had last, in whichever direction it was carried."""

    def __init__(self, workspace_id: str, *places: str) -> None:
        pair = sha256("\n".join(sorted(places)).encode())[:32]
        self._folder = private_folder(workspace_id) / "synced" / pair

    def get(self, name: str) -> str | None:
        """Return the hash that both had; None where that is not known."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads(self._path(name).read_bytes())["sha256"])
        return None

    def keep(self, name: str, contents: bytes) -> None:
        """Remember that both have these contents now."""
        digest = sha256(contents)
        if self.get(name) == digest:
            return
        make_folder(self._folder, PRIVATE_FOLDER_MODE)
        publish_file(self._path(name), json.dumps({"name": name, "sha256": digest}).encode() + b"\n", mode=0o600)

    def _path(self, name: str) -> Path:
        return self._folder / f"{sha256(name.encode())[:32]}.json"
