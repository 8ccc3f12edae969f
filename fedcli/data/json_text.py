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


def _wrapped(document: Any, depth: int = 2) -> tuple[str, list[Any]] | None:
    """Return the list of rows that an object wraps, or that an object inside it does, and the keys that lead there."""
    for key in _WRAPPERS if isinstance(document, dict) and depth else ():
        rows = document.get(key)
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            return key, rows
        if (inner := _wrapped(rows, depth - 1)) is not None:
            return f"{key}.{inner[0]}", inner[1]
    return None
