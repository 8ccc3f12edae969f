"""The rows of one file, read as a stream, with the standard library and pyarrow.

`datasets` (5.2) has readers of local files, which make dates out of texts that look like one, stop at a column that
appears late, shift the columns of a CSV with a cell too many, take a path for a pattern, and name no line of a broken
file.
"""

import codecs
import csv
import errno
import gzip
import json
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO, TypeAlias

from fedcli.data.json_text import Repeating, documents, keyed, parse
from fedcli.errors import ConfigError, WorkspaceError

KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **{".parquet": "parquet", ".arrow": "arrow"},
}
"""By the suffix of a file, a further .gz aside."""
_PACKED = (".zst", ".zip", ".xz", ".bz2", ".7z", ".rar", ".lz4", ".tar", ".tgz")
_SHEETS = (".xlsx", ".xls", ".ods")
NOT_READ = (*_PACKED, *_SHEETS)
"""Ends of names of files that may hold rows and are not read."""
_SEPARATORS = (";", "\t", "|", ",")
_HEADS = {
    b"version https://git-lfs": ("a pointer of git-lfs, not the file itself", "Fetch the file: `git lfs pull`."),
    b"/annex/objects/": ("a pointer of git-annex, not the file itself", "Fetch the file: `git annex get`."),
    b"<!doctype html": ("a web page", "Download the file itself."),
    b"<html": ("a web page", "Download the file itself."),
}
"""What files begin with that hold no rows, whatever their names say."""
_BINARY_HEADS = {
    b"\x1f\x8b": ("packed by gzip", "Let its name end in .gz."),
    b"PAR1": ("a parquet file", "Let its name end in .parquet."),
    b"ARROW1": ("an arrow file", "Let its name end in .arrow."),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "Unpack it, or save it as .csv."),
    b"\x28\xb5\x2f\xfd": ("packed by zstd", "Unpack it: `zstd -d FILE`."),
}
"""What files begin with that are no text."""
_OF_THE_FILE = (None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP)
"""Errors that another name, other rights or another file mends; what else there is comes from the disk."""
_LONGEST_CELL = 2**31 - 1
_CHUNK = 1000
"""Rows of a parquet file that are read at once."""


Opener: TypeAlias = Callable[[Path], BufferedReader]


@dataclass(frozen=True)
class Row:
    """A row as its file has it; `where` names file and line (or position) for messages."""

    fields: Mapping[str, Any]
    where: str
    repeated: str | None = None
    """A key that an object of the row names twice, of which JSON's readers keep the last."""


@dataclass(frozen=True)
class FileForm:
    """How a file is read."""

    opener: Opener | None = None
    """Opens it, where it is a file that others keep; None for any place of this machine."""
    delimiter: str | None = None
    """What separates the cells of a .csv file; None: a comma (.tsv: a tab), or what its header shows."""
    encoding: str | None = None
    """Of a text file; None: UTF-8."""
    keyed_by: str | None = None
    """The column that has the key of a row's list, where the file is an object of lists of rows; None for others."""


def suffix_of(path: Path) -> str:
    """Return what the name of a file ends in, a further .gz aside."""
    return (path.with_suffix("") if _is_packed(path) else path).suffix.lower()


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def file_rows(path: Path, form: FileForm) -> Iterator[Row]:
    """Yield a file's rows as a stream; raise ConfigError where it is missing or broken, with its line."""
    kind = KINDS.get(suffix_of(path))
    if kind is None:
        problem, hint = f"rows are read from {', '.join(KINDS)} files, and .gz of these", "Convert the file first."
        if path.suffix.lower() in _PACKED:
            problem, hint = f"it is packed as {path.suffix}, and only .gz is unpacked here", "Unpack the file first."
        elif path.suffix.lower() in _SHEETS:
            hint = "It is a spreadsheet: save it as .csv."
        raise ConfigError(f"{path}: {problem}", hint=hint)
    if form.keyed_by is not None and kind != "json":
        raise ConfigError(
            f"{path}: data.keyed_by is {form.keyed_by!r}, and only a .json file is an object of lists of rows",
            hint="Leave data.keyed_by out, and name a column of the rows in data.partition.by.",
        )
    opener = form.opener or open_file
    try:
        _check_head(path, kind, opener, form.encoding)
        if form.keyed_by is not None:
            with _opened(path, form) as file:
                found = keyed(file.read(), path, form.keyed_by)
            for where, fields, repeated in found:
                yield Row(fields, where, repeated)
        elif kind == "json":
            yield from _json_rows(path, form)
        elif kind == "csv":
            yield from _csv_rows(path, form)
        else:
            with _unpacked(path) as plain:
                yield from _arrow_rows(path, plain, kind)
    except UnicodeError as error:
        known = "such as latin-1 or cp1252"
        with opener(path) as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                known = "by its first bytes utf-16"
        raise ConfigError(
            f"{path} is not {form.encoding or 'UTF-8'} text: {error}",
            hint=f"Set data.encoding (or --encoding) to what it is, {known}, or convert it to UTF-8.",
        ) from error
    except (EOFError, zlib.error) as error:
        raise ConfigError(f"{path} is damaged: {error}", hint="Fetch the file again.") from error
    except OSError as error:
        told = f"cannot read the rows in {path}: {error.strerror or error}"
        if error.errno not in _OF_THE_FILE:
            raise WorkspaceError(told, hint="Check that path and its disk, then run it again.") from error
        hint = "Check data.source in fedcli.yaml (or --set, --data), or mend the file."
        raise ConfigError(told, hint=hint) from error


def _check_head(path: Path, kind: str, opener: Opener, encoding: str | None) -> None:
    """Raise ConfigError for a file that begins like something else than what its name says."""
    with opener(path) as file:
        head = file.read(64)
    known = _HEADS if kind in ("parquet", "arrow") or _is_packed(path) else _HEADS | _BINARY_HEADS
    for start, (what, hint) in known.items():
        if head.lstrip().lower().startswith(start.lower()):
            raise ConfigError(f"{path} is {what}", hint=hint)
    if encoding and head.startswith(codecs.BOM_UTF8) and codecs.lookup(encoding).name not in ("utf-8", "utf-8-sig"):
        raise ConfigError(
            f"{path} begins with the mark of UTF-8, and is to be read as {encoding}",
            hint="Leave data.encoding (or --encoding) out.",
        )


def _json_rows(path: Path, form: FileForm) -> Iterator[Row]:
    """Read an object a line, or one array of objects, or objects over several lines, whichever the file holds."""
    with _opened(path, form) as file:
        start = file.read(1)
        while start.isspace() or start == "\ufeff":
            start = file.read(1)
        file.seek(0)
        rows: Iterator[tuple[str, Any]]
        if start == "[" and (document := _array(file, path)) is not None:
            rows = ((f"{path}, row {number}", fields) for number, fields in enumerate(document, 1))
        elif start == "{" and not _is_lines(file):
            rows = documents(file.read(), path)
        else:
            lines = ((f"{path}, line {number}", line) for number, line in enumerate(file, 1) if line.strip())
            rows = ((where, parse(line, where)) for where, line in lines)
        for number, (where, fields) in enumerate(rows, 1):
            if not isinstance(fields, dict):
                raise _no_object(where, fields, number, rows)
            yield Row(fields, where, fields.key if isinstance(fields, Repeating) else None)


def _array(file: TextIO, path: Path) -> list[Any] | None:
    """Return the array that a file is; None for one of several, and at its start again."""
    try:
        found: list[Any] = parse(file.read(), path)
    except ConfigError as error:
        if not str(error.__cause__).startswith("Extra data"):
            raise
        file.seek(0)
        return None
    return found


def _no_object(where: str, value: Any, number: int, others: Iterator[tuple[str, Any]]) -> ConfigError:
    """Return what is wrong with the first row that is no object, with the number of such rows."""
    count, total = 1, number
    with suppress(ConfigError):  # a later row that is broken in another way
        for _, other in others:
            count, total = count + (not isinstance(other, dict)), total + 1
    shown = json.dumps(value, ensure_ascii=False)
    hint = 'Write every row as an object of columns: {"instruction": ..., "output": ...}.'
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        hint = 'Write every list of messages as an object with a column: {"messages": [...]}.'
    return ConfigError(
        f"{where} is not a JSON object, but {shown[:60]}{'...' * (len(shown) > 60)} ({count} of {total} rows are none)",
        hint=hint,
    )


def _is_lines(file: TextIO) -> bool:
    """Return whether a file of objects has one a line, more than one; it is read from its start again."""
    line = ""
    while not line.strip():
        line = file.readline()
    try:
        json.loads(line)
        is_lines = any(other.strip() for other in file)
    except json.JSONDecodeError as error:  # an object that goes on, or several on one line
        is_lines = error.pos < len(line.rstrip()) and not error.msg.startswith("Extra data")
    except (ValueError, RecursionError):
        is_lines = True
    file.seek(0)
    return is_lines


def open_file(path: Path) -> BufferedReader:
    """Open a file of this machine."""
    return path.open("rb")


def _opened(path: Path, form: FileForm, newline: str = "\n") -> TextIO:
    # newline="\n": only this ends a line; U+2028 and its like may stand inside a JSON string
    named = form.encoding
    encoding = "utf-8-sig" if named is None or codecs.lookup(named).name == "utf-8" else named
    if _is_packed(path):
        return gzip.open(path, "rt", encoding=encoding, newline=newline)
    return TextIOWrapper((form.opener or open_file)(path), encoding=encoding, newline=newline)


@contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """Yield a file's own path, or for a .gz that of its contents in a temporary folder."""
    if not _is_packed(path):
        yield path
        return
    with TemporaryDirectory() as scratch:
        plain = Path(scratch) / path.with_suffix("").name
        with gzip.open(path) as packed, plain.open("wb") as file:
            shutil.copyfileobj(packed, file)
        yield plain


def usual_separator(path: Path) -> str:
    """Return what separates the cells of a file of this name: a comma, or a tab."""
    return "\t" if suffix_of(path) == ".tsv" else ","


def separator_of(path: Path, form: FileForm) -> str:
    """Return what separates a file's cells: where the usual finds one column, what finds most of them in the header."""
    if form.delimiter is not None:
        return form.delimiter
    usual = usual_separator(path)
    try:
        with _opened(path, form, newline="") as file:
            header = next((line for line in file if line.strip()), "")
    except (OSError, EOFError, zlib.error, UnicodeError):  # reading the rows will say what is wrong
        return usual
    if header.count(usual):
        return usual
    return max((usual, *_SEPARATORS), key=header.count)


def _csv_rows(path: Path, form: FileForm) -> Iterator[Row]:
    """Read a file with a header line; every cell is its text."""
    csv.field_size_limit(_LONGEST_CELL)
    separator = separator_of(path, form)
    with _opened(path, form, newline="") as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        try:
            names = [name.lstrip("\ufeff") for name in next(filter(None, reader), [])]  # blank lines may come first
            for name, count in Counter(names).items():
                if count > 1:
                    raise ConfigError(
                        f"{path}: its first line does not name the columns, each once: {name!r} stands {count} times",
                        hint="Give every column a name of its own; where the first line is a row, put a header before.",
                    )
            for number, cells in enumerate(filter(None, reader), 1):  # blank lines are no rows
                if len(cells) != len(names):
                    at = reader.line_num
                    others: list[bool] = []
                    with suppress(csv.Error):  # a later line that is broken in another way
                        others.extend(len(more) != len(names) for more in filter(None, reader))
                    raise ConfigError(
                        f"{path}, line {at} has {len(cells)} cells, the header {len(names)} "
                        f"({1 + sum(others)} of {number + len(others)} rows have another number than it)",
                        hint=f"Quote cells that hold {separator!r}, or set another separator: data.delimiter.",
                    )
                yield Row(dict(zip(names, cells, strict=True)), f"{path}, row {number}")
        except csv.Error as error:
            raise ConfigError(f"{path}, line {reader.line_num}: {error}", hint="Mend that line.") from error


def _arrow_rows(path: Path, plain: Path, kind: str) -> Iterator[Row]:
    """Read a parquet file, or an arrow file of either form, batch by batch."""
    import pyarrow
    from pyarrow import ipc, parquet

    try:
        with pyarrow.memory_map(str(plain)) as file:
            if kind == "parquet":
                # without threads: with them the interpreter sometimes aborts at its end
                batches = parquet.ParquetFile(file).iter_batches(_CHUNK, use_threads=False)
            elif file.read(6) == b"ARROW1":  # the form with a footer; the other is a stream
                reader = ipc.open_file(file)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            else:
                file.seek(0)
                batches = ipc.open_stream(file)
            rows = (fields for batch in batches for fields in batch.to_pylist())
            for number, fields in enumerate(rows, 1):
                yield Row(fields, f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{path} is no {kind} file that can be read: {problem}", hint="Mend the file.") from error
