"""A client's cache of the reference model's log-probabilities, so that each row is computed once."""

import hashlib
from collections.abc import Mapping

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedcli.algos import Array
from fedcli.workspace.layout import ADAPTER_NAME, Home
from fedcli.workspace.publish import publish_file
from fedcli.workspace.records import Manifest

LogProbs = dict[bytes, tuple[float, ...]]
"""By a row's key: of its responses, a pair's chosen one first."""


def reference_key(start: Manifest, precision: str) -> str:
    """Return what tells one reference from another: round 0's base model, as quantised, and adapter; the precision."""
    parts = (start.model.fingerprint, start.model.quantization, start.files[ADAPTER_NAME].sha256, precision)
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]


def read_reference(home: Home, key: str) -> LogProbs:
    """Return what a client has computed so far; nothing where the file is missing or damaged."""
    try:
        arrays = load(home.reference(key).read_bytes())
        if arrays["sha256"].tobytes() != _digest(arrays["keys"], arrays["values"]):
            return {}
        return {
            key.tobytes(): tuple(values) for key, values in zip(arrays["keys"], arrays["values"].tolist(), strict=True)
        }
    except (FileNotFoundError, SafetensorError, KeyError, ValueError, TypeError):
        return {}


def save_reference(home: Home, key: str, log_probs: Mapping[bytes, tuple[float, ...]]) -> None:
    """Replace a client's cache."""
    arrays: dict[str, Array] = {
        "keys": np.frombuffer(b"".join(log_probs), np.uint8).reshape(len(log_probs), -1),
        "values": np.array(list(log_probs.values()), np.float64),
    }
    arrays["sha256"] = np.frombuffer(_digest(arrays["keys"], arrays["values"]), np.uint8)
    publish_file(home.reference(key), save(arrays), mode=0o600)


def _digest(keys: Array, values: Array) -> bytes:
    return hashlib.sha256(keys.tobytes() + values.tobytes()).digest()
