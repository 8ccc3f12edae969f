"""This machine's cache of what workspaces elsewhere hold, by hash: a round's adapter is fetched once."""

import os
from contextlib import suppress
from pathlib import Path

from fedcli.errors import FedError
from fedcli.workspace.parsing import sha256
from fedcli.workspace.publish import PRIVATE_FOLDER_MODE, make_folder, publish_file, remove_temporaries

MOST_BYTES = 2 * 2**30
"""What the cache holds at most; what was used last stays."""


class KeptObjects:
    """Files by their SHA-256 in a folder; a damaged one is none, and a disk that refuses only costs time."""

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        self._folder = folder
        self._most_bytes = most_bytes

    def get(self, digest: str) -> bytes | None:
        """Return the file with a hash; None where it is not here."""
        path = self._folder / digest
        with suppress(OSError):
            contents = path.read_bytes()
            if sha256(contents) == digest:
                os.utime(path)
                return contents
            path.unlink()
        return None

    def keep(self, digest: str, contents: bytes) -> None:
        """Keep a file, and let go of those that were not used for the longest time."""
        if len(contents) > self._most_bytes:
            return
        with suppress(OSError, FedError):
            make_folder(self._folder, PRIVATE_FOLDER_MODE)
            remove_temporaries(self._folder)
            self._make_room(len(contents))
            publish_file(self._folder / digest, contents, mode=0o600)

    def _make_room(self, num_bytes: int) -> None:
        found = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in self._folder.iterdir())
        used = sum(size for _, size, _ in found)
        for _, size, path in found:
            if used + num_bytes <= self._most_bytes:
                break
            path.unlink(missing_ok=True)
            used -= size
