"""This machine's copy of the enrolment's entries, which never change: a chain of 1,000 parties is fetched once."""

import json
from contextlib import suppress
from pathlib import Path

from fedcli.errors import FedError
from fedcli.workspace.publish import make_folder


class KeptEntries:
    """Files of one workspace by name, in memory and in a file of lines in a folder, named by its workspace.json's hash.

    A damaged line is none, and a disk that refuses only costs time.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path: Path | None = None
        self._files: dict[str, bytes] = {}

    def open(self, identity: str) -> None:
        """Take up the copies that are of the workspace.json with this SHA-256."""
        path = self._folder / f"enrolment-{identity[:16]}.jsonl"
        if path == self._path:
            return
        self._path, self._files = path, {}
        with suppress(OSError, UnicodeDecodeError):
            for line in path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, TypeError, AttributeError):
                    name, text = json.loads(line)
                    self._files[name] = text.encode()

    @property
    def is_empty(self) -> bool:
        """Whether there is no copy."""
        return not self._files

    def get(self, name: str) -> bytes | None:
        """Return the copy of a file; None where there is none."""
        return self._files.get(name)

    def keep(self, name: str, contents: bytes) -> None:
        """Keep a copy of a text."""
        self._files[name] = contents
        if self._path is None:
            return
        with suppress(OSError, FedError, UnicodeDecodeError):
            line = json.dumps([name, contents.decode()])
            make_folder(self._folder)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def forget(self) -> None:
        """Let go of all copies."""
        self._files = {}
        with suppress(OSError):
            if self._path is not None:
                self._path.unlink()
