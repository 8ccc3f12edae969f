"""Records as bytes: JSON that is sealed by a checksum, and read from strangers."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from fedcli.errors import ArrivingError, IntegrityError
from fedcli.workspace.record import Record
from fedcli.workspace.refusal import Refusal

CHANGED = "its contents do not have the checksum that it names"

RecordT = TypeVar("RecordT", bound=Record)


def sha256(contents: bytes | memoryview) -> str:
    """Return the lowercase hex SHA-256 of stored bytes."""
    return hashlib.sha256(contents).hexdigest()


def sealed(record: Record) -> bytes:
    """Return a record's JSON with a `checksum` of all its other keys: it tells a file that has changed on its disk."""
    document = record.model_dump(mode="json")
    text = json.dumps(document | {"checksum": _checksum(document)}, sort_keys=True, indent=1, ensure_ascii=False)
    return text.encode() + b"\n"


def is_unchanged(document: Mapping[str, Any]) -> bool:
    """Return whether a record is as `sealed` wrote it; one without a checksum is taken for whole."""
    named = document.get("checksum")
    if named is None:
        return True
    try:
        return bool(named == _checksum({key: value for key, value in document.items() if key != "checksum"}))
    except (RecursionError, ValueError):  # a stranger's, such as no JSON of `sealed` is
        return False


def _checksum(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Parse a stranger's UTF-8 JSON object; raise Refusal(json), for NaN and any depth too, or Refusal(duplicate)."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            raise Refusal("duplicate", f"{what} has a key twice in one object")
        return mapping

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Refusal("json", f"{what} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise Refusal("json", f"{what} is not a JSON object")
    return document


def is_cut_short(contents: bytes) -> bool:
    """Return whether what is no JSON object may be the beginning of one, as while a file is copied."""
    text = contents.rstrip()
    if text and not text.startswith(b"{"):
        return False
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return not text.endswith(b"}") or error.pos >= len(error.doc)
    except (ValueError, RecursionError):
        return False
    return False


def parse_record(kind: type[RecordT], data: bytes, path: Path) -> RecordT:
    """Read a record that the server wrote; raise IntegrityError where it is not one."""
    try:
        document = parse_object(data, path.name)
        record = kind.model_validate(document)
        if kind.tells_changes or is_unchanged(document):
            return record
        problem = CHANGED
    except Refusal as refusal:
        problem = refusal.reason
        if kind.arrives and is_cut_short(data):
            hint = "Wait until it is copied; where nothing copies it, restore it from a backup."
            raise ArrivingError(f"{path} is damaged, or not whole yet: {problem}", hint=hint) from None
    except ValidationError as error:
        problem = first_fault(error)
    raise IntegrityError(f"{path} is damaged: {problem}", hint="Restore it from a backup; `fedcli verify` lists more.")


def first_fault(error: ValidationError) -> str:
    """Return the first thing that is wrong with a record, and where."""
    fault = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}"
