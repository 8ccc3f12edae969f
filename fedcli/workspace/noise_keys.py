"""Keys of the noise that rounds are merged with: in the server's private folder, and there before a round is published.

A key belongs to a round and to the very updates that were counted. Whoever merges the same sum again, as after a kill,
draws the same noise; another sum gets another key. Two noises of one sum would tell it half as well hidden.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from fedcli.errors import UsageError, WorkspaceError
from fedcli.privacy.noise import KEY_BYTES, hash_of, new_key
from fedcli.workspace.history import Round
from fedcli.workspace.layout import Home, Workspace, server_home, update_name
from fedcli.workspace.merge_records import Aggregation
from fedcli.workspace.publish import PRIVATE_FOLDER_MODE, PRIVATE_MODE, make_folder, publish_file
from fedcli.workspace.records import Identity
from fedcli.workspace.registrations import make_home


@dataclass(frozen=True)
class NoiseKey:
    """A key, and how many sums of the round have had one by now, this one included."""

    key: bytes
    releases: int = 1


NoiseSource: TypeAlias = Callable[[Aggregation], NoiseKey | None]
"""Gives the key for what a round counts; None where nothing is to be made of it."""


def keys_home(workspace: Workspace, identity: Identity) -> Home:
    """Return where the server's noise keys lie: a simulation's in the workspace's private/, others' outside of it."""
    if identity.simulation:
        return Home(workspace.root / "private" / "server")
    home = server_home(identity.id)
    if home.folder.resolve().is_relative_to(workspace.root.resolve()):
        raise UsageError(
            f"{home.folder} lies in the workspace, where everybody could see the keys of the noise",
            hint="Name another folder with $FEDCLI_SERVER_HOME.",
        )
    return home


def key_for(home: Home, base: Round, aggregation: Aggregation, check: Callable[[int], None]) -> NoiseKey:
    """Return the key for what a round counts; it is made, durably, where there is none. The lock is held.

    `check` hears before that how many sums of the round will have had one, and may raise.
    """
    path = home.noise / f"{update_name(base.number)}-{_digest(base, aggregation)}.key"
    others = {*home.noise.glob(f"{update_name(base.number)}-*.key")} - {path}
    check(len(others) + 1)
    if not path.exists():
        make_home(home)
        make_folder(home.noise, PRIVATE_FOLDER_MODE)
        publish_file(path, new_key().hex().encode() + b"\n", mode=PRIVATE_MODE)
    return NoiseKey(read_key(path), len(others) + 1)


def read_key(path: Path) -> bytes:
    """Read a key; raise WorkspaceError for what is none."""
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii"))
    except OSError as error:
        hint = "Check the path and its permissions."
        raise WorkspaceError(f"cannot read {path}: {error.strerror}", hint=hint) from error
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise WorkspaceError(f"{path} holds no noise key", hint="Restore it from a backup.")
    return key


def read_keys(paths: Iterable[Path]) -> dict[str, bytes]:
    """Return the keys of files, and of the `.key` files of folders, by the hash that a manifest has of each."""
    files = [file for path in paths for file in (sorted(path.glob("*.key")) if path.is_dir() else [path])]
    return {hash_of(key): key for key in map(read_key, files)}


def _digest(base: Round, aggregation: Aggregation) -> str:
    """Return what tells a sum: the round's manifest, whose updates are in it, and which of their files are clipped."""
    updates = {str(entry.client): entry.update for entry in aggregation.counted}
    text = json.dumps([base.sha256, aggregation.algorithm["name"], updates])
    return hashlib.sha256(text.encode()).hexdigest()
