"""Damage to a workspace's files, and updates that are not what their client wrote."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from support.federation import ADAPTER

LAST = "rounds/00002"


def flipped(name: str, position: int, workspace: Path) -> None:
    """Flip the lowest bit of one byte of a file."""
    data = bytearray((workspace / name).read_bytes())
    data[position] ^= 1
    (workspace / name).write_bytes(data)


def removed(name: str, workspace: Path) -> None:
    """Remove a file or a directory."""
    path = workspace / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def edited(edit: Callable[[dict], object], workspace: Path) -> None:
    """Edit the last round's manifest, which no other names as its parent: the chain of hashes stays whole."""
    path = workspace / LAST / "manifest.json"
    manifest = json.loads(path.read_bytes())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def tear(workspace: Path, client: int) -> None:
    """Cut a dropped adapter short."""
    os.truncate(workspace / "inbox" / str(client) / "round-00000" / ADAPTER, 100)


def replace_adapter(update: Path, contents: bytes) -> None:
    """Give a dropped update another adapter, with its size and hash in update.json."""
    (update / ADAPTER).write_bytes(contents)
    record = json.loads((update / "update.json").read_bytes())
    record.pop("checksum", None)
    record["files"][ADAPTER] = {"sha256": hashlib.sha256(contents).hexdigest(), "bytes": len(contents)}
    (update / "update.json").write_text(json.dumps(record))


def replace_file(path: Path, change) -> None:
    """Change the arrays of an update's file, with its size and hash in update.json."""
    contents = save({name: change(array) for name, array in load_file(path).items()})
    path.write_bytes(contents)
    record = json.loads((path.parent / "update.json").read_bytes())
    record.pop("checksum", None)
    record["files"][path.name] = {"sha256": hashlib.sha256(contents).hexdigest(), "bytes": len(contents)}
    (path.parent / "update.json").write_text(json.dumps(record))


def as_bfloat16(arrays: dict[str, np.ndarray]) -> bytes:
    """Return a safetensors file of BF16: float32 without its low 16 bits. numpy has no such type."""
    header, body = {}, b""
    for name, array in arrays.items():
        part = (np.ascontiguousarray(array, "<f4").view("<u4") >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": array.shape, "data_offsets": [len(body), len(body) + len(part)]}
        body += part
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body
