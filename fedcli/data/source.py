"""Where rows come from: local files and folders, read as a stream, and data sets of the hub.

JSON is read with the standard library and the other kinds with `datasets`, whose JSON reader makes dates out of texts
that look like one, ends at a column that appears late, and names no line of a broken file (version 5.2).
"""

import gzip
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

from fedcli.errors import ConfigError, FedError, RequirementError

KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""By the suffix of a file, a further .gz aside."""
_NO_ROWS = {"dataset_info.json", "state.json", "dataset_dict.json"}
"""What `datasets` writes beside the rows in a folder."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")


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

    def rows(self) -> Iterator[Row]:
        """Yield the rows one by one.

        Raises ConfigError where a file is missing, broken or has no rows, with file and line; RequirementError for a
        data set of the hub that cannot be had.
        """
        is_empty = True
        for row in _hub_rows(self) if isinstance(self.location, str) else _folder_or_file(self.location, self.split):
            is_empty = False
            yield row
        if is_empty:
            raise ConfigError(f"{self.location} holds no rows", hint="Check data.source, or fill the file.")


def find_source(name: str, root: Path, *, subset: str | None = None, split: str | None = None) -> Source:
    """Return the source that a path (from `root`) or a hub id names; raise ConfigError where it can be neither."""
    path = root / Path(name).expanduser()
    if path.exists():
        return Source(path, subset, split or "train")
    if _HUB_ID.fullmatch(name) and _suffix(path) not in KINDS and not name.startswith("."):
        return Source(name, subset, split or "train")
    raise ConfigError(
        f"cannot read the rows in {path}: no such file or folder",
        hint="Check data.source in fedcli.yaml (or --data), or put the file there.",
    )


def write_row(fields: Mapping[str, Any]) -> bytes:
    """Return a row as a line of a .jsonl file; what JSON has no form for (a date of a parquet file) becomes text."""
    return (json.dumps(fields, ensure_ascii=False, default=str) + "\n").encode()


def read_rows(path: Path) -> list[Row]:
    """Return all rows of a file; raise ConfigError as `Source.rows` does."""
    return list(find_source(str(path), path.parent).rows())


def _folder_or_file(path: Path, split: str) -> Iterator[Row]:
    if not path.is_dir():
        yield from _file_rows(path)
        return
    files = sorted(file for file in path.iterdir() if _suffix(file) in KINDS and file.name not in _NO_ROWS)
    if not files and (path / split).is_dir():  # a folder of splits, as `datasets` saves it
        yield from _folder_or_file(path / split, split)
        return
    for file in files:
        yield from _file_rows(file)


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _file_rows(path: Path) -> Iterator[Row]:
    kind = KINDS.get(_suffix(path))
    if kind is None:
        raise ConfigError(
            f"{path}: rows are read from {', '.join(KINDS)} files, and .gz of these", hint="Convert the file first."
        )
    try:
        if kind == "json":
            yield from _json_rows(path)
        else:
            with _unpacked(path) as plain:
                yield from _datasets_rows(path, plain, kind)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}", hint="Convert it to UTF-8.") from error
    except EOFError as error:
        raise ConfigError(f"{path} ends too early: {error}", hint="Fetch the file again.") from error
    except OSError as error:
        raise ConfigError(
            f"cannot read the rows in {path}: {error.strerror or error}",
            hint="Check data.source in fedcli.yaml (or --data), or mend the file.",
        ) from error


def _json_rows(path: Path) -> Iterator[Row]:
    """Read an object a line, or one array of objects, whichever the file holds."""
    with _opened(path) as file:
        start = file.read(1)
        while start.isspace() or start == "\ufeff":
            start = file.read(1)
        file.seek(0)
        yield from _array(file, path) if start == "[" else _lines(file, path)


def _opened(path: Path) -> TextIO:
    # newline="\n": only this ends a line; U+2028 and its like may stand inside a JSON string
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="\n")
    return path.open(encoding="utf-8-sig", newline="\n")


def _lines(file: Iterable[str], path: Path) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _checked(_parse(line, where), where)


def _array(file: TextIO, path: Path) -> Iterator[Row]:
    document = _parse(file.read(), str(path))
    assert isinstance(document, list)
    for number, fields in enumerate(document, 1):
        yield _checked(fields, f"{path}, row {number}")


def _checked(fields: object, where: str) -> Row:
    if not isinstance(fields, dict):
        raise ConfigError(f"{where} is not a JSON object", hint="Every row is an object of columns. Mend the row.")
    return Row(fields, where)


def _parse(text: str, where: str) -> object:
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
    if path.suffix != ".gz":
        yield path
        return
    with TemporaryDirectory() as scratch:
        plain = Path(scratch) / path.with_suffix("").name
        with gzip.open(path) as packed, plain.open("wb") as file:
            shutil.copyfileobj(packed, file)
        yield plain


def _datasets_rows(path: Path, plain: Path, kind: str) -> Iterator[Row]:
    """Read a file of another kind with `datasets`, without its cache: no copy of private rows is made."""
    from pyarrow import ArrowException

    datasets = _import_datasets()
    options: dict[str, Any] = {}
    if kind == "csv":  # every cell is its text: "NA" is no gap, and "007" no number
        separator = "\t" if _suffix(path) == ".tsv" else ","
        options = {"sep": separator, "keep_default_na": False, "features": _csv_features(datasets, plain, separator)}
    try:
        rows = datasets.load_dataset(kind, data_files=[str(plain)], split="train", streaming=True, **options)
        for number, fields in enumerate(rows, 1):
            yield Row(fields, f"{path}, row {number}")
    except (ValueError, TypeError, KeyError, ArrowException, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        problem = " ".join(str(error.__cause__ or error).split())
        raise ConfigError(f"{path} is no {kind} file that can be read: {problem}", hint="Mend the file.") from error


def _csv_features(datasets: Any, path: Path, separator: str) -> Any:
    import csv

    with path.open(encoding="utf-8", newline="") as file:
        names = next(csv.reader(file, delimiter=separator), [])
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"{path}: its first line does not name the columns, each once", hint="Put a header line in front."
        )
    return datasets.Features({name: datasets.Value("string") for name in names})


def _hub_rows(source: Source) -> Iterator[Row]:
    """Read a data set of the hub, fetched once into the hub's cache and mapped into memory from there."""
    datasets = _import_datasets()
    try:
        rows = datasets.load_dataset(source.location, source.subset, split=source.split)
    except FedError:
        raise
    except Exception as error:  # a dozen kinds, of datasets, huggingface_hub and its HTTP library
        raise RequirementError(
            f"cannot load the data set {source.location!r} (split {source.split}): {' '.join(str(error).split())}",
            hint="Check its name, data.subset and data.split, the network and the hub's cache (HF_HOME); "
            "or set data.source to a local file.",
        ) from error
    for number, fields in enumerate(rows, 1):
        yield Row(fields, f"{source.location}, row {number}")


def _import_datasets() -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets
