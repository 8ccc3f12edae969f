"""history.jsonl: what a party or the server did, as it did it; what the workspace says later is compared with that."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedcli.workspace.publish import explained


def note(path: Path, event: str, **facts: Any) -> None:
    """Append a line, durably; of a line that a kill cut short the next one keeps apart."""
    line = json.dumps({"time": round(time.time(), 3), "event": event, **facts}, sort_keys=True).encode() + b"\n"
    with explained(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, b"\n" + line if is_torn else line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_history(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines that are whole."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            document = json.loads(line)
        except ValueError:
            continue
        if isinstance(document, dict):
            yield document
