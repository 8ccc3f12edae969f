"""A simulation's rows, data/client-N.jsonl, written as a stream whatever their number."""

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from filecmp import cmp
from io import BufferedReader
from pathlib import Path
from typing import Any, Self

from fedcli.errors import WorkspaceError
from fedcli.workspace.layout import Workspace
from fedcli.workspace.publish import (
    PRIVATE_MODE,
    explained,
    make_folder,
    publish_file,
    remove_temporaries,
    sync,
    temporary_folder,
)
from fedcli.workspace.read import read_file

BUFFER_BYTES = 2**24
MAX_CARD_BYTES = 2**24


class RowFiles:
    """Gathers rows by client beside their final names; `publish` renames all files, and without it nothing stays."""

    def __init__(self, workspace: Workspace, num_clients: int) -> None:
        self._workspace = workspace
        self._num_clients = num_clients
        self._stack = ExitStack()
        self._scratch = workspace.data  # a folder in it, once this is entered
        self._buffers: dict[int, bytearray] = {}
        self._num_buffered = 0

    def __enter__(self) -> Self:
        with explained(self._workspace.data):
            make_folder(self._workspace.data)
            remove_temporaries(self._workspace.data)
            self._scratch = self._stack.enter_context(temporary_folder(self._workspace.data))
            try:
                for client in range(self._num_clients):
                    self._temporary(client).touch()
            except BaseException:
                self._stack.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, client: int, line: bytes) -> None:
        """Add a row to a client's file."""
        self._buffers.setdefault(client, bytearray()).extend(line)
        self._num_buffered += len(line)
        if self._num_buffered >= BUFFER_BYTES:
            self._flush()

    def publish(self, *, replace: bool = False) -> None:
        """Give all files their final names.

        Raises WorkspaceError, and changes nothing, where one is there with other contents, unless they may be replaced.
        """
        self._flush()
        rows = [(self._temporary(client), self._workspace.client_rows(client)) for client in range(self._num_clients)]
        new = [(made, final) for made, final in rows if not final.is_file() or not cmp(made, final, shallow=False)]
        for _, final in new:
            if final.exists() and not replace:
                raise WorkspaceError(
                    f"{final} is there already, and is not what data.source gives",
                    hint="Move it away, or write over it with `fedcli data partition --replace`; or keep it, and set "
                    "data.source to null in fedcli.yaml or with --set.",
                )
        with explained(self._workspace.data):
            for made, final in new:
                os.chmod(made, PRIVATE_MODE)
                sync(made)
                os.replace(made, final)

    def _flush(self) -> None:
        with explained(self._scratch):
            for client, lines in self._buffers.items():
                with self._temporary(client).open("ab") as file:
                    file.write(lines)
        self._buffers.clear()
        self._num_buffered = 0

    def _temporary(self, client: int) -> Path:
        return self._scratch / f"{client}.jsonl"


def has_rows(workspace: Workspace, client: int) -> bool:
    """Return whether a simulated client has rows."""
    return workspace.client_rows(client).is_file()


def find_files(folder: Path, pattern: str) -> list[Path]:
    """Return the files of rows in a folder of data/ that match a pattern, sorted."""
    return sorted(path for path in folder.glob(pattern) if path.is_file())


def open_rows(path: Path) -> BufferedReader:
    """Open a file of rows in data/."""
    return path.open("rb")


def any_rows(workspace: Workspace) -> bool:
    """Return whether any simulated client has rows."""
    return any(workspace.data.glob("client-*.jsonl"))


def save_beside_rows(workspace: Workspace, files: Mapping[Path, bytes], card: Mapping[str, Any]) -> None:
    """Write what belongs to a split: held-out rows, and the card of what it gave to each client."""
    written = json.dumps(card, indent=1, ensure_ascii=False).encode() + b"\n"
    for path, contents in files.items():
        publish_file(path, contents, mode=PRIVATE_MODE)
    publish_file(workspace.data_card, written)


def read_data_card(workspace: Workspace) -> bytes:
    """Return a split's card; raise FileNotFoundError, or Refusal for what is no file of at most MAX_CARD_BYTES."""
    return read_file(workspace.data_card, limit=MAX_CARD_BYTES)
