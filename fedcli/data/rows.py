"""Rows of local files, and how their columns become an instruction and a response."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcli.errors import ConfigError


@dataclass(frozen=True)
class Row:
    """A row as its file has it; `where` names file and line (or position) for messages."""

    fields: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class Example:
    """What one row teaches: the response to an instruction."""

    instruction: str
    response: str


@dataclass(frozen=True)
class Preference:
    """What one row of a preference teaches: of two responses to a prompt, the better one."""

    prompt: str
    chosen: str
    rejected: str


def read_rows(path: Path) -> list[Row]:
    """Read a .jsonl file (an object a line) or a .json file (an array of objects).

    Raises ConfigError where the file is missing or empty, or a row is not an object, with file and line.
    """
    if path.suffix not in (".json", ".jsonl"):
        raise ConfigError(f"{path}: rows are read from .json and .jsonl files", hint="Convert the file first.")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read the rows in {path}: {error.strerror}",
            hint="Check data.source in fedcli.yaml, or put the file there.",
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}", hint="Convert it to UTF-8.") from error
    rows = _lines(text, path) if path.suffix == ".jsonl" else _array(text, path)
    if not rows:
        raise ConfigError(f"{path} holds no rows", hint="Check data.source in fedcli.yaml, or fill the file.")
    return rows


def write_rows(rows: list[Mapping[str, Any]]) -> bytes:
    """Return rows as the bytes of a .jsonl file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def alpaca_example(row: Row) -> Example:
    """Read a row of Alpaca's columns: instruction, input (may be absent or empty) and output.

    Instruction and input are joined by a space, as in OpenFedLLM's code. Raises ConfigError with file and line where a
    column is missing or not text.
    """
    instruction = _text(row, "instruction")
    response = _text(row, "output")
    extra = _text(row, "input") if row.fields.get("input") is not None else ""
    return Example(f"{instruction} {extra}" if extra else instruction, response)


def preference(row: Row) -> Preference:
    """Read a row with the columns prompt, chosen and rejected; raise ConfigError where one is missing or not text."""
    return Preference(*(_text(row, column) for column in ("prompt", "chosen", "rejected")))


def _text(row: Row, column: str) -> str:
    value = row.fields.get(column)
    if not isinstance(value, str):
        problem = "has no text in" if column in row.fields else "has no"
        raise ConfigError(
            f"{row.where} {problem} column {column!r}; it has {', '.join(map(str, row.fields)) or 'none'}",
            hint="Task sft needs the text columns instruction and output (input may be absent), "
            "task dpo prompt, chosen and rejected. Mend the row.",
        )
    return value


def _lines(text: str, path: Path) -> list[Row]:
    lines = text.split("\n")  # not splitlines: U+2028 and its like may stand inside a JSON string
    numbered = ((line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip())
    return [_checked(_parse(line, where), where) for line, where in numbered]


def _array(text: str, path: Path) -> list[Row]:
    document = _parse(text, str(path))
    if not isinstance(document, list):
        raise ConfigError(f"{path} does not hold a JSON array of rows", hint="Use .jsonl for an object a line.")
    return [_checked(fields, f"{path}, row {number}") for number, fields in enumerate(document, 1)]


def _checked(fields: object, where: str) -> Row:
    if not isinstance(fields, dict):
        raise ConfigError(f"{where} is not a JSON object", hint="Every row is an object of columns. Mend the row.")
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where} holds half of a UTF-16 pair: {error}", hint="Mend the row.") from error
    return Row(fields, where)


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}", hint="Mend the row.") from error
