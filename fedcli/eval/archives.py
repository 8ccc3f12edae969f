"""Unpacking a part of a tar or zip archive."""

import tarfile
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import IO

from fedcli.errors import IntegrityError

MOST_BYTES = 2**32
"""Of all files in an archive, unpacked, whether they are kept or not."""
MOST_FILES = 10**6
_CHUNK = 2**20
_HINT = "Get the publisher's files, and name their folder with --data DIR."


def unpack(archive: Path, folder: Path, inside: str, patterns: tuple[str, ...]) -> list[str]:
    """Write an archive's files that lie in its folder `inside` and match a pattern; return their names, sorted.

    Names and patterns are relative to `inside`. Only plain files are written, and none outside of `folder`. Raises
    IntegrityError where the archive is none, holds no such file, or unpacks to more than MOST_BYTES or MOST_FILES.
    """
    names, num_files, num_bytes = [], 0, 0
    try:
        for name, size, file in _members(archive):
            num_files, num_bytes = num_files + 1, num_bytes + size
            if num_files > MOST_FILES or num_bytes > MOST_BYTES:
                raise IntegrityError(
                    f"{archive} unpacks to more than {MOST_BYTES:,} bytes or {MOST_FILES:,} files", hint=_HINT
                )
            path = PurePosixPath(name)
            is_hidden = any(part.startswith(".") for part in path.parts)  # of macOS: ._NAME; and no ".."
            if is_hidden or path.is_absolute() or not path.is_relative_to(inside):
                continue
            relative = str(path.relative_to(inside))
            if any(fnmatch(relative, pattern) for pattern in patterns):
                place = folder / relative
                place.parent.mkdir(parents=True, exist_ok=True)
                with place.open("wb") as opened:
                    left = size
                    while left and (chunk := file.read(min(left, _CHUNK))):
                        left -= opened.write(chunk)
                names.append(relative)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise IntegrityError(f"{archive} is no archive: {error}", hint=_HINT) from error
    if not names:
        raise IntegrityError(
            f"the archive holds no {' or '.join(f'{inside}/{pattern}' for pattern in patterns)}",
            hint=_HINT,
        )
    return sorted(names)


def _members(archive: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Yield the plain files of an archive: name, size as the archive tells it, and the file, opened."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for entry in zipped.infolist():
                if not entry.is_dir():
                    with zipped.open(entry) as file:
                        yield entry.filename, entry.file_size, file
        return
    with tarfile.open(archive) as tarred:
        for member in tarred:
            if member.isfile() and (opened := tarred.extractfile(member)) is not None:
                with opened:
                    yield member.name.removeprefix("./"), member.size, opened
