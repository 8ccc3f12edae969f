"""Objects in a text of JSON: one, several, or a list of them that an object wraps; and keys that stand twice."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedcli.errors import ConfigError

_WRAPPERS = ("data", "rows", "examples", "records", "items", "instances", "train")
"""Keys of an object that is a whole file, under which its rows may stand as a list."""


class Repeating(dict[str, Any]):
    """An object that names a key twice, or holds one that does."""

    key = ""
    """The first such key."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of a document; JSON's own reader keeps the last of two values without a word."""
    fields = dict(pairs)
    key: str | None
    if len(fields) < len(pairs):
        key = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
    else:
        values = (each for value in fields.values() for each in (value if type(value) is list else (value,)))
        key = next((value.key for value in values if type(value) is Repeating), None)
        if key is None:
            return fields
    repeating = Repeating(fields)
    repeating.key = key
    return repeating


def parse(text: str, where: object) -> Any:
    """Return what a text of JSON says, `Repeating` objects among it; raise ConfigError where it is none."""
    try:
        document = json.loads(text, object_pairs_hook=_object)
        if "\\u" in text:  # only an escape can be half of a pair
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where} holds half of a UTF-16 pair: {error}", hint="Mend the row.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}", hint="Mend the row.") from error
    return document


def documents(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the objects of a text, one behind the other; of a single one that wraps a list of rows, the rows."""
    decoder = json.JSONDecoder()
    ends = re.compile(r"\S")
    found: list[tuple[str, Any]] = []
    position = 0
    while start := ends.search(text, position):
        where = f"{path}, line {text.count(chr(10), 0, start.start()) + 1}"
        try:
            _, position = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError) as error:
            line = text.count("\n", 0, getattr(error, "pos", start.start())) + 1
            raise ConfigError(
                f"{path}, line {line} is not JSON: {getattr(error, 'msg', error)}",
                hint="Mend it: a file holds an object a line, or one array of objects.",
            ) from error
        found.append((where, parse(text[start.start() : position], where)))
    if len(found) == 1 and (wrapped := _wrapped(found[0][1])) is not None:
        key, rows = wrapped
        found = [(f"{path}, {key}, row {number}", row) for number, row in enumerate(rows, 1)]
    yield from found


def keyed(text: str, path: Path, column: str) -> list[tuple[str, dict[str, Any], str | None]]:
    """Return the rows of an object of lists of rows, each with its list's key in a column.

    Of each there is its place, its fields, and a key that it names twice. Raises ConfigError for any other document, a
    key of two lists, and a row that has another value in the column.
    """
    wanted = "an object of lists of rows, as data.keyed_by says"
    document = parse(text, path)
    if not isinstance(document, dict) or not document:
        raise ConfigError(
            f"{path} is not {wanted}, but {'an empty one' if document == {} else f'a {type(document).__name__}'}",
            hint='Such a file is {"KEY": [{...}, ...], ...}. For rows one a line, or in one list, leave keyed_by out.',
        )
    if isinstance(document, Repeating) and document.key in document:
        raise ConfigError(
            f"{path}: the key {document.key!r} stands twice, and JSON's readers keep the last",
            hint="Join the two lists, or give one another key.",
        )
    rows = []
    for key, entries in document.items():
        if not isinstance(entries, list):
            raise ConfigError(
                f"{path}: what {key!r} names is no list, and the file is to be {wanted}",
                hint="Take it out; or leave data.keyed_by out, where the file is rows one a line, or in a list.",
            )
        for number, fields in enumerate(entries, 1):
            where = f"{path}, {key!r}, row {number}"
            if not isinstance(fields, dict):
                raise ConfigError(f"{where} is not a JSON object", hint="Write every row as an object of columns.")
            if fields.get(column, key) != key:
                raise ConfigError(
                    f"{where} has {fields[column]!r} in column {column!r}, where the key of its list is to stand",
                    hint="Name another column in data.keyed_by, and in data.partition.by.",
                )
            rows.append((where, {**fields, column: key}, fields.key if isinstance(fields, Repeating) else None))
    return rows


def _wrapped(document: Any, depth: int = 2) -> tuple[str, list[Any]] | None:
    """Return the list of rows that an object wraps, or that an object inside it does, and the keys that lead there."""
    for key in _WRAPPERS if isinstance(document, dict) and depth else ():
        rows = document.get(key)
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            return key, rows
        if (inner := _wrapped(rows, depth - 1)) is not None:
            return f"{key}.{inner[0]}", inner[1]
    return None
