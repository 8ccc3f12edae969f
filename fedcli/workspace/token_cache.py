"""A client's rows as token ids, kept in its home so that they are tokenised once: the latest set only."""

import hashlib
import json
from contextlib import suppress
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedcli.algos import Array, Arrays
from fedcli.errors import WorkspaceError
from fedcli.workspace.layout import Home
from fedcli.workspace.publish import publish_file, remove_temporaries

_COUNTS, _DIGEST = "counts", "sha256"


def token_key(**parts: Any) -> str:
    """Return what tells one set of token ids from another: a hash of all that they follow from, JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def read_tokens(home: Home, key: str) -> "tuple[dict[str, Array], dict[str, Any]] | None":
    """Return the arrays kept under a key, and what was counted; None where there are none, or damaged ones."""
    try:
        arrays = load(home.tokens(key).read_bytes())
        digest = arrays.pop(_DIGEST).tobytes()
        if digest != _digest(arrays):
            return None
        return arrays, json.loads(arrays.pop(_COUNTS).tobytes())
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def save_tokens(home: Home, key: str, arrays: Arrays, counts: dict[str, Any]) -> None:
    """Keep arrays under a key, and let go of what was kept before; a disk that refuses only costs time later."""
    kept = {**arrays, _COUNTS: np.frombuffer(json.dumps(counts).encode(), np.uint8)}
    kept[_DIGEST] = np.frombuffer(_digest(kept), np.uint8)
    with suppress(OSError, WorkspaceError):
        if home.folder.is_dir():
            remove_temporaries(home.folder)
            for old in home.folder.glob(home.tokens("*").name):
                old.unlink(missing_ok=True)
        publish_file(home.tokens(key), save(kept), mode=0o600)


def _digest(arrays: Arrays) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.digest()
