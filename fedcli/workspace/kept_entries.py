"""This machine's copy of the enrolment's entries, which never change: a chain of 1,000 parties is fetched once."""

import json
from contextlib import suppress
from pathlib import Path

from fedcli.errors import FedError
from fedcli.workspace.publish import make_folder


class KeptEntries:
    """Files of one workspace by name, in a file of lines; of another workspace.json than theirs they are none.

    A damaged line is none, and a disk that refuses only costs time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, bytes] | None = None

    def open(self, identity: str) -> None:
        """Take the copies up that are of the workspace.json with this SHA-256, and drop others."""
        self._files = {}
        with suppress(OSError, ValueError, TypeError):
            first, *lines = self._path.read_text(encoding="utf-8").splitlines()
            if json.loads(first) == identity:
                for line in lines:
                    with suppress(ValueError, TypeError, AttributeError):
                        name, text = json.loads(line)
                        self._files[name] = text.encode()
                return
        with suppress(OSError, FedError):
            make_folder(self._path.parent)
            self._path.write_text(json.dumps(identity) + "\n", encoding="utf-8")

    @property
    def is_empty(self) -> bool:
        """Whether there is no copy, or nothing is known of the workspace yet."""
        return not self._files

    def get(self, name: str) -> bytes | None:
        """Return the copy of a file; None where there is none."""
        return None if self._files is None else self._files.get(name)

    def keep(self, name: str, contents: bytes) -> None:
        """Keep a copy of a text."""
        if self._files is None:
            return
        with suppress(OSError, UnicodeDecodeError):
            line = json.dumps([name, contents.decode()])
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            self._files[name] = contents
