"""What a client's home keeps so that it is computed once: its rows as token ids, and the reference's log-probabilities.

A file that is missing or damaged holds nothing: a hash of its arrays lies among them.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedcli.algos import Array, Arrays
from fedcli.errors import WorkspaceError
from fedcli.workspace.layout import ADAPTER_NAME, Home
from fedcli.workspace.publish import PRIVATE_FOLDER_MODE, make_folder, publish_file, remove_temporaries
from fedcli.workspace.records import Manifest

LogProbs = dict[bytes, tuple[float, ...]]
"""By a row's key: of its responses, a pair's chosen one first."""


def token_key(**parts: Any) -> str:
    """Return what tells one set of token ids from another: a hash of all that they follow from, JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def read_tokens(home: Home, key: str) -> "tuple[dict[str, Array], dict[str, Any]] | None":
    """Return the arrays kept under a key, and what was counted; None where there are none, or damaged ones."""
    arrays = _read(home.tokens(key), _hash_of_named)
    return (arrays, json.loads(arrays.pop("counts").tobytes())) if arrays else None


def save_tokens(home: Home, key: str, arrays: Arrays, counts: dict[str, Any]) -> None:
    """Keep arrays under a key, and let go of what was kept before; a disk that refuses only costs time later."""
    kept = {**arrays, "counts": np.frombuffer(json.dumps(counts).encode(), np.uint8)}
    with suppress(OSError, WorkspaceError):
        if home.folder.is_dir():
            remove_temporaries(home.folder)
            for old in home.folder.glob(home.tokens("*").name):
                old.unlink(missing_ok=True)
        _save(home.tokens(key), kept, _hash_of_named)


def share_tokens(home: Home, other: Home) -> None:
    """Let a client have the token ids that another workspace's client keeps, as the same file where that may be.

    Which rows they are of is in the name: one that does not fit is never looked at.
    """
    with suppress(OSError, WorkspaceError):
        for kept in other.folder.glob(other.tokens("*").name):
            make_folder(home.folder, PRIVATE_FOLDER_MODE)
            with suppress(FileExistsError):
                os.link(kept, home.folder / kept.name)


def reference_key(start: Manifest, precision: str) -> str:
    """Return what tells one reference from another: round 0's base model, as quantised, and adapter; the precision."""
    parts = (start.model.fingerprint, start.model.quantization, start.files[ADAPTER_NAME].sha256, precision)
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]


def read_reference(home: Home, key: str) -> LogProbs:
    """Return the log-probabilities that a client has computed so far."""
    return _read_pairs(home.reference(key))


def save_reference(home: Home, key: str, log_probs: Mapping[bytes, tuple[float, ...]]) -> None:
    """Replace a client's log-probabilities."""
    _save_pairs(home.reference(key), log_probs)


def read_losses(home: Home, key: str) -> LogProbs:
    """Return the log-probabilities that rows are scored by, as far as a client has computed them."""
    return _read_pairs(home.losses(key))


def save_losses(home: Home, key: str, log_probs: Mapping[bytes, tuple[float, ...]]) -> None:
    """Keep what rows are scored by, and let go of another adapter's; a disk that refuses only costs time later."""
    with suppress(OSError, WorkspaceError):
        for old in home.folder.glob(home.losses("*").name) if home.folder.is_dir() else ():
            old.unlink(missing_ok=True)
        _save_pairs(home.losses(key), log_probs)


def _read_pairs(path: Path) -> LogProbs:
    arrays = _read(path, _hash_of_pairs)
    pairs = zip(arrays["keys"], arrays["values"].tolist(), strict=True) if arrays else ()
    return {row.tobytes(): tuple(values) for row, values in pairs}


def _save_pairs(path: Path, log_probs: Mapping[bytes, tuple[float, ...]]) -> None:
    keys = np.frombuffer(b"".join(log_probs), np.uint8).reshape(len(log_probs), -1)
    arrays: dict[str, Array] = {"keys": keys, "values": np.array(list(log_probs.values()), np.float64)}
    _save(path, arrays, _hash_of_pairs)


def _read(path: Path, hash_of: Callable[[Arrays], bytes]) -> "dict[str, Array]":
    """Return the arrays of a file, none where it is missing or damaged."""
    try:
        arrays: dict[str, Array] = load(path.read_bytes())
        return arrays if arrays.pop("sha256").tobytes() == hash_of(arrays) else {}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return {}


def _save(path: Path, arrays: Arrays, hash_of: Callable[[Arrays], bytes]) -> None:
    publish_file(path, save({**arrays, "sha256": np.frombuffer(hash_of(arrays), np.uint8)}), mode=0o600)


def _hash_of_named(arrays: Arrays) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.digest()


def _hash_of_pairs(arrays: Arrays) -> bytes:
    return hashlib.sha256(arrays["keys"].tobytes() + arrays["values"].tobytes()).digest()
