"""Where rows come from: local files and folders, and data sets of the hub, which `datasets` reads."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcli.data.file_rows import (
    KINDS,
    NOT_READ,
    FileForm,
    Opener,
    Row,
    file_rows,
    open_file,
    separator_of,
    suffix_of,
    usual_separator,
)
from fedcli.errors import ConfigError, RequirementError

PARQUET_BRANCH = "refs/convert/parquet"
"""Of the hub's repositories of data: copies of what a script would make."""
_SPLITS = {"train", "test", "validation", "valid", "val", "dev", "eval"}
"""Words in the names of files that tell which split they hold."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


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
    keyed_by: str | None = None
    """The column that has the key of a row's list, of files that are an object of lists of rows; None for others."""

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

    @property
    def _form(self) -> FileForm:
        return FileForm(self.opener, self.delimiter, self.encoding, self.keyed_by)

    def _paths(self, location: Path) -> list[Path]:
        return _files(location, self.split) if self.opener is None and location.is_dir() else [location]

    def _file_rows(self, location: Path) -> Iterator[Row]:
        for path in self._paths(location):
            yield from file_rows(path, self._form)

    def remarks(self) -> list[str]:
        """Return what was decided of its files: separators that are no comma, files of several kinds or not read."""
        if isinstance(self.location, str) or self.opener is not None:
            return []
        paths = self._paths(self.location)
        remarks = []
        for path in paths:
            is_guessed = self.delimiter is None and KINDS.get(suffix_of(path)) == "csv"
            if is_guessed and (found := separator_of(path, self._form)) != usual_separator(path):
                remarks.append(f"{path}: its cells are separated by {found!r}, as its header shows")
        if self.location.is_dir():
            if len({KINDS.get(suffix_of(path)) for path in paths}) > 1:
                remarks.append(f"{self.location}: files of several kinds are read, {', '.join(p.name for p in paths)}")
            if packed := [path.name for path in sorted(self.location.iterdir()) if path.suffix.lower() in NOT_READ]:
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
                with (self.opener or open_file)(path) as file:
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
    keyed_by: str | None = None,
) -> Source:
    """Return the source that a path (from `root`) or a hub id names; raise ConfigError where it can be neither."""
    if not name.strip():
        raise ConfigError("a source of rows names nothing", hint="Set data.source to a file, a folder or a hub id.")
    path = root / os.path.expanduser(name)
    if path.exists():
        return Source(path, subset, split or "train", delimiter=delimiter, encoding=encoding, keyed_by=keyed_by)
    if _HUB_ID.fullmatch(name) and suffix_of(path) not in KINDS:
        if keyed_by is not None:
            raise ConfigError(
                f"data.keyed_by is {keyed_by!r}, and data.source names a data set of the hub, {name}",
                hint="It is for a .json file that is an object of lists of rows. Leave it out, or name a file.",
            )
        return Source(name, subset, split or "train")
    raise ConfigError(
        f"cannot read the rows in {path}: no such file or folder",
        hint="Check data.source in fedcli.yaml (or --set, --data), or put the file there. "
        "On the hub a name is OWNER/NAME.",
    )


def absolute_path(name: str) -> str:
    """Return a path of the current folder absolute; a name that is no file's (of the hub, say) as it is."""
    path = Path(os.path.expanduser(name))
    return str(path.absolute()) if name and (path.exists() or suffix_of(path) in KINDS) else name


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
    found = [file for file in sorted(folder.iterdir()) if suffix_of(file) in KINDS and file.is_file()]
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
