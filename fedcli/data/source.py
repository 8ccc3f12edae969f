"""Where rows come from: local files and folders, read as a stream, and data sets of the hub.

Local files are read with the standard library and pyarrow, and data sets of the hub with `datasets` (5.2), whose
readers of local files make dates out of texts that look like one, stop at a column that appears late, shift the columns
of a CSV with a cell too many, take a path for a pattern, and name no line of a broken file.
"""

import codecs
import csv
import gzip
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO, TypeAlias

from fedcli.errors import ConfigError, RequirementError

KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **{".parquet": "parquet", ".arrow": "arrow"},
}
"""By the suffix of a file, a further .gz aside."""
PARQUET_BRANCH = "refs/convert/parquet"
"""Of the hub's repositories of data: copies of what a script would make."""
_PACKED = (".zst", ".zip", ".xz", ".bz2", ".7z", ".rar", ".lz4", ".tar", ".tgz")
_SHEETS = (".xlsx", ".xls", ".ods")
_SEPARATORS = (";", "\t", "|", ",")
_WRAPPERS = ("data", "rows", "examples", "records", "items", "instances", "train")
"""Keys of an object that is a whole file, under which its rows may stand as a list."""
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
_SPLITS = {"train", "test", "validation", "valid", "val", "dev", "eval"}
"""Words in the names of files that tell which split they hold."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_LONGEST_CELL = 2**31 - 1
_CHUNK = 1000
"""Rows of a parquet file that are read at once."""

Opener: TypeAlias = Callable[[Path], BufferedReader]


@dataclass(frozen=True)
class Row:
    """A row as its file has it; `where` names file and line (or position) for messages."""

    fields: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class Source:
    """A file, a folder of files, or a data set of the hub; its rows can be read any number of times."""

    location: Path | str
    """A path, or a hub id."""
    subset: str | None = None
    """Of a hub's data set, where it has several."""
    split: str = "train"
    revision: str | None = None
    """A branch, tag or commit of the hub's repository."""
    opener: Opener | None = None
    """Opens `location`, which then is a file that others keep; None for any place of this machine."""
    delimiter: str | None = None
    """What separates the cells of .csv files; None: a comma (.tsv: a tab), or what their header shows."""
    encoding: str | None = None
    """Of text files; None: UTF-8."""

    def rows(self) -> Iterator[Row]:
        """Yield the rows one by one.

        Raises ConfigError where a file is missing, broken or has no rows, with file and line; RequirementError for a
        data set of the hub that cannot be had.
        """
        is_empty = True
        for row in _hub_rows(self) if isinstance(self.location, str) else self._file_rows(self.location):
            is_empty = False
            yield row
        if is_empty:
            raise ConfigError(f"{self.location} holds no rows", hint="Check data.source, or fill the file.")

    def _paths(self, location: Path) -> list[Path]:
        return _files(location, self.split) if self.opener is None and location.is_dir() else [location]

    def _file_rows(self, location: Path) -> Iterator[Row]:
        for path in self._paths(location):
            yield from _file_rows(path, self)

    def remarks(self) -> list[str]:
        """Return what was decided of its files: separators that are no comma, files of several kinds or not read."""
        if isinstance(self.location, str) or self.opener is not None:
            return []
        paths = self._paths(self.location)
        remarks = []
        for path in paths:
            is_guessed = self.delimiter is None and KINDS.get(_suffix(path)) == "csv"
            if is_guessed and (found := _separator(path, self)) != _usual(path):
                remarks.append(f"{path}: its cells are separated by {found!r}, as its header shows")
        if self.location.is_dir():
            if len({KINDS.get(_suffix(path)) for path in paths}) > 1:
                remarks.append(f"{self.location}: files of several kinds are read, {', '.join(p.name for p in paths)}")
            ending = (*_PACKED, *_SHEETS)
            if packed := [path.name for path in sorted(self.location.iterdir()) if path.suffix.lower() in ending]:
                remarks.append(f"{self.location}: not read, {', '.join(packed)}")
        return remarks

    def digest(self) -> str | None:
        """Return a hash of the names and bytes of its files; None for a data set of the hub, or if one is missing."""
        if isinstance(self.location, str):
            return None
        read_as = (self.delimiter, self.encoding)
        digest = hashlib.sha256(b"" if read_as == (None, None) else repr(read_as).encode())
        try:
            for path in self._paths(self.location):
                with (self.opener or _open)(path) as file:
                    digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
        except OSError:  # reading it will say what is wrong
            return None
        return digest.hexdigest()


def find_source(
    name: str,
    root: Path,
    *,
    subset: str | None = None,
    split: str | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
) -> Source:
    """Return the source that a path (from `root`) or a hub id names; raise ConfigError where it can be neither."""
    if not name.strip():
        raise ConfigError("a source of rows names nothing", hint="Set data.source to a file, a folder or a hub id.")
    path = root / os.path.expanduser(name)
    if path.exists():
        return Source(path, subset, split or "train", delimiter=delimiter, encoding=encoding)
    if _HUB_ID.fullmatch(name) and _suffix(path) not in KINDS:
        return Source(name, subset, split or "train")
    raise ConfigError(
        f"cannot read the rows in {path}: no such file or folder",
        hint="Check data.source in fedcli.yaml (or --data), or put the file there; on the hub a name is OWNER/NAME.",
    )


def absolute_path(name: str) -> str:
    """Return a path of the current folder absolute; a name that is no file's (of the hub, say) as it is."""
    path = Path(os.path.expanduser(name))
    return str(path.absolute()) if name and (path.exists() or _suffix(path) in KINDS) else name


def write_row(fields: Mapping[str, Any]) -> bytes:
    """Return a row as a line of a .jsonl file; what JSON has no form for (a date of a parquet file) becomes text."""
    return (json.dumps(fields, ensure_ascii=False, default=str) + "\n").encode()


def read_rows(path: Path, opener: Opener | None = None) -> list[Row]:
    """Return all rows of a file; raise ConfigError as `Source.rows` does."""
    return list(Source(path, opener=opener).rows())


def _files(folder: Path, split: str) -> list[Path]:
    """Return a folder's files of a split, in the order of their names; all files, where names tell no split."""
    state = folder / "state.json"
    if state.is_file():  # as `datasets` saves it; other files beside these are its cache
        try:
            return [folder / entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{state} does not list the files of rows", hint="Save the folder again.") from error
    found = [file for file in sorted(folder.iterdir()) if _suffix(file) in KINDS and file.is_file()]
    files = [file for file in found if not file.name.startswith((".", "dataset_info.", "dataset_dict."))]
    splits = {file: _SPLITS & set(re.split(r"[^a-z]+", file.name.lower())) for file in files}
    if any(splits.values()):
        files = [file for file in files if split in splits[file]]
    for inner in (folder / split, folder / "data"):
        if not files and inner.is_dir():
            return _files(inner, split)
    if not files:
        names = ", ".join(sorted(os.listdir(folder))[:5]) or "nothing"
        raise ConfigError(
            f"{folder} holds no files of rows for the split {split}",
            hint=f"Files of rows end in {', '.join(KINDS)} (or .gz behind it); data.split names another split. "
            f"The folder holds {names}.",
        )
    return files


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if _is_packed(path) else path).suffix.lower()


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _file_rows(path: Path, source: Source) -> Iterator[Row]:
    kind = KINDS.get(_suffix(path))
    if kind is None:
        problem, hint = f"rows are read from {', '.join(KINDS)} files, and .gz of these", "Convert the file first."
        if path.suffix.lower() in _PACKED:
            problem, hint = f"it is packed as {path.suffix}, and only .gz is unpacked here", "Unpack the file first."
        elif path.suffix.lower() in _SHEETS:
            hint = "It is a spreadsheet: save it as .csv."
        raise ConfigError(f"{path}: {problem}", hint=hint)
    opener = source.opener or _open
    try:
        _check_head(path, kind, opener)
        if kind == "json":
            yield from _json_rows(path, source)
        elif kind == "csv":
            yield from _csv_rows(path, source)
        else:
            with _unpacked(path) as plain:
                yield from _arrow_rows(path, plain, kind)
    except UnicodeError as error:
        known = "such as latin-1 or cp1252"
        with opener(path) as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                known = "by its first bytes utf-16"
        raise ConfigError(
            f"{path} is not {source.encoding or 'UTF-8'} text: {error}",
            hint=f"Set data.encoding (or --encoding) to what it is, {known}, or convert it to UTF-8.",
        ) from error
    except (EOFError, zlib.error) as error:
        raise ConfigError(f"{path} is damaged: {error}", hint="Fetch the file again.") from error
    except OSError as error:
        raise ConfigError(
            f"cannot read the rows in {path}: {error.strerror or error}",
            hint="Check data.source in fedcli.yaml (or --data), or mend the file.",
        ) from error


def _check_head(path: Path, kind: str, opener: Opener) -> None:
    """Raise ConfigError for a file that begins like something else than what its name says."""
    with opener(path) as file:
        head = file.read(64)
    known = _HEADS if kind in ("parquet", "arrow") or _is_packed(path) else _HEADS | _BINARY_HEADS
    for start, (what, hint) in known.items():
        if head.lstrip().lower().startswith(start.lower()):
            raise ConfigError(f"{path} is {what}", hint=hint)


def _json_rows(path: Path, source: Source) -> Iterator[Row]:
    """Read an object a line, or one array of objects, or objects over several lines, whichever the file holds."""
    with _opened(path, source) as file:
        start = file.read(1)
        while start.isspace() or start == "\ufeff":
            start = file.read(1)
        file.seek(0)
        rows: Iterable[tuple[str, Any]]
        if start == "[":
            rows = ((f"{path}, row {number}", fields) for number, fields in enumerate(_parse(file.read(), path), 1))
        elif start == "{" and not _is_lines(file):
            rows = _documents(file.read(), path)
        else:
            lines = ((f"{path}, line {number}", line) for number, line in enumerate(file, 1) if line.strip())
            rows = ((where, _parse(line, where)) for where, line in lines)
        for where, fields in rows:
            if not isinstance(fields, dict):
                raise ConfigError(
                    f"{where} is not a JSON object", hint="Every row is an object of columns. Mend the row."
                )
            yield Row(fields, where)


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


def _documents(text: str, path: Path) -> Iterator[tuple[str, Any]]:
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
        found.append((where, _parse(text[start.start() : position], where)))
    if len(found) == 1 and isinstance(found[0][1], dict):
        for key in _WRAPPERS:
            rows = found[0][1].get(key)
            if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
                found = [(f"{path}, {key}, row {number}", row) for number, row in enumerate(rows, 1)]
                break
    yield from found


def _open(path: Path) -> BufferedReader:
    return path.open("rb")


def _opened(path: Path, source: Source, newline: str = "\n") -> TextIO:
    # newline="\n": only this ends a line; U+2028 and its like may stand inside a JSON string
    named = source.encoding
    encoding = "utf-8-sig" if named is None or codecs.lookup(named).name == "utf-8" else named
    if _is_packed(path):
        return gzip.open(path, "rt", encoding=encoding, newline=newline)
    return TextIOWrapper((source.opener or _open)(path), encoding=encoding, newline=newline)


def _parse(text: str, where: object) -> Any:
    try:
        document = json.loads(text)
        if "\\u" in text:  # only an escape can be half of a pair
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where} holds half of a UTF-16 pair: {error}", hint="Mend the row.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}", hint="Mend the row.") from error
    return document


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


def _usual(path: Path) -> str:
    return "\t" if _suffix(path) == ".tsv" else ","


def _separator(path: Path, source: Source) -> str:
    """Return what separates a file's cells: where the usual finds one column, what finds most of them in the header."""
    if source.delimiter is not None:
        return source.delimiter
    usual = _usual(path)
    try:
        with _opened(path, source, newline="") as file:
            header = next((line for line in file if line.strip()), "")
    except (OSError, EOFError, zlib.error, UnicodeError):  # reading the rows will say what is wrong
        return usual
    if header.count(usual):
        return usual
    return max((usual, *_SEPARATORS), key=header.count)


def _csv_rows(path: Path, source: Source) -> Iterator[Row]:
    """Read a file with a header line; every cell is its text."""
    csv.field_size_limit(_LONGEST_CELL)
    separator = _separator(path, source)
    with _opened(path, source, newline="") as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        try:
            names = next(filter(None, reader), [])  # blank lines may come before the header
            if len(set(names)) < len(names):
                raise ConfigError(
                    f"{path}: its first line does not name the columns, each once", hint="Put a header line in front."
                )
            for number, cells in enumerate(filter(None, reader), 1):  # blank lines are no rows
                if len(cells) != len(names):
                    raise ConfigError(
                        f"{path}, line {reader.line_num} has {len(cells)} cells, the header {len(names)}",
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


def _hub_rows(source: Source) -> Iterator[Row]:
    """Read a data set of the hub, fetched once into the hub's cache and mapped into memory from there."""
    import datasets

    datasets.disable_progress_bars()
    try:
        # the branch of parquet copies has no card that would name subsets: they are its folders
        subset = {"data_dir" if source.revision == PARQUET_BRANCH else "name": source.subset}
        rows = datasets.load_dataset(source.location, **subset, split=source.split, revision=source.revision)
    except Exception as error:  # a dozen kinds, of datasets, huggingface_hub and its HTTP library
        raise RequirementError(
            f"cannot load the data set {source.location!r} (split {source.split}): {' '.join(str(error).split())}",
            hint="There is no such file or folder here. For a data set of the hub check its name, data.subset, "
            "data.split, the network and the hub's cache (HF_HOME).",
        ) from error
    for number, fields in enumerate(rows, 1):
        yield Row(fields, f"{source.location}, row {number}")
