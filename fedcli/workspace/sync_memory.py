"""What this user's machine remembers of files that may change: the contents that two places had last in common."""

import json
from contextlib import suppress
from pathlib import Path

from fedcli.workspace.layout import private_folder
from fedcli.workspace.parsing import sha256
from fedcli.workspace.publish import PRIVATE_FOLDER_MODE, make_folder, publish_file


class SyncMemory:
    """By file, the hash that both of two places had last, in whichever direction it was carried."""

    def __init__(self, workspace_id: str, *places: str) -> None:
        pair = sha256("\n".join(sorted(places)).encode())[:32]
        self._folder = private_folder(workspace_id) / "synced" / pair

    def get(self, name: str) -> str | None:
        """Return the hash that both had; None where that is not known."""
        return self._read(name)[0]

    def modified(self, name: str) -> float | None:
        """Return when what both had was written, by the clock of its place; None where that is not known."""
        return self._read(name)[1]

    def keep(self, name: str, contents: bytes, modified: float | None = None) -> None:
        """Remember that both have these contents now, and when they were written where that is told."""
        digest = sha256(contents)
        if self._read(name) == (digest, modified):
            return
        make_folder(self._folder, PRIVATE_FOLDER_MODE)
        document = {"name": name, "sha256": digest} | ({} if modified is None else {"modified": modified})
        publish_file(self._path(name), json.dumps(document).encode() + b"\n", mode=0o600)

    def _read(self, name: str) -> tuple[str | None, float | None]:
        with suppress(OSError, ValueError, KeyError, TypeError):
            document = json.loads(self._path(name).read_bytes())
            modified = document.get("modified")
            return str(document["sha256"]), None if modified is None else float(modified)
        return None, None

    def _path(self, name: str) -> Path:
        return self._folder / f"{sha256(name.encode())[:32]}.json"
