"""Where a workspace's files lie in an object store: records under their names, the rest below `.HASH/` beside them.

HASH is the first 16 hexadecimal digits of the record's SHA-256, so that two attempts never mix (docs/PROTOCOL.md).
"""

import re
from pathlib import PurePosixPath

from fedcli.workspace.layout import MANIFEST, UPDATE_RECORD
from fedcli.workspace.parsing import sha256
from fedcli.workspace.secure_records import ANSWER_RECORD

_RECORDS = (
    (re.compile(r"rounds/[0-9]{5,}"), MANIFEST),
    (re.compile(r"inbox/[0-9]+/round-[0-9]{5,}"), UPDATE_RECORD),
    (re.compile(r"inbox/[0-9]+/repair-[0-9]{5,}-[0-9]+"), ANSWER_RECORD),
)
SIGNED_FOLDERS = ("enrolment", "attempts", "repair")
"""Folders of records, each X.json with its X.sig."""
ATTEMPT = re.compile(r"\.[0-9a-f]{16}")


def record_of(name: str) -> str | None:
    """Return the name of the record by which a file or folder is there; None for what is there by itself."""
    parts = PurePosixPath(name).parts
    for depth in (2, 3):
        folder = "/".join(parts[:depth])
        for pattern, record in _RECORDS:
            if len(parts) >= depth and pattern.fullmatch(folder):
                return f"{folder}/{record}"
    if len(parts) == 2 and parts[0] in SIGNED_FOLDERS and name.endswith(".sig"):
        return name.removesuffix(".sig") + ".json"
    return None


def attempt_key(name: str, record: str, contents: bytes) -> str:
    """Return where a file lies whose record has these contents."""
    return key_below(name, record, attempt_name(contents))


def attempt_name(contents: bytes) -> str:
    """Return the folder, beside a record with these contents, in which its files lie."""
    return f".{sha256(contents)[:16]}"


def key_below(name: str, record: str, attempt: str) -> str:
    """Return where a file lies whose record leads to this folder."""
    folder = PurePosixPath(record).parent
    return f"{folder}/{attempt}/{PurePosixPath(name).relative_to(folder)}"


def without_attempt(path: str) -> tuple[str, str | None]:
    """Return a path without the folder of an attempt in it, and that folder's name."""
    parts = path.split("/")
    for position, part in enumerate(parts[:-1]):
        if ATTEMPT.fullmatch(part):
            return "/".join(parts[:position] + parts[position + 1 :]), part
    return path, None
