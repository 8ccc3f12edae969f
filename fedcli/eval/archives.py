"""Unpacking a part of a tar or zip archive."""

import tarfile
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import IO

from fedcli.errors import IntegrityError

_HINT = "Get the publisher's files, and name their folder with --data DIR."


def unpack(archive: Path, folder: Path, inside: str, patterns: tuple[str, ...]) -> list[str]:
    """Write an archive's files that lie in its folder `inside` and match a pattern; return their names, sorted.

    Names and patterns are relative to `inside`. Only plain files are written, and none outside of `folder`. Raises
    IntegrityError where the archive is none, or holds no such file.
    """
    names = []
    try:
        for name, file in _members(archive):
            path = PurePosixPath(name)
            is_hidden = any(part.startswith(".") for part in path.parts)  # of macOS: ._NAME; and no ".."
            if is_hidden or path.is_absolute() or not path.is_relative_to(inside):
                continue
            relative = str(path.relative_to(inside))
            if any(fnmatch(relative, pattern) for pattern in patterns):
                place = folder / relative
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(file.read())
                names.append(relative)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise IntegrityError(f"{archive} is no archive: {error}", hint=_HINT) from error
    if not names:
        raise IntegrityError(
            f"the archive holds no {' or '.join(f'{inside}/{pattern}' for pattern in patterns)}",
            hint=_HINT,
        )
    return sorted(names)


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the plain files of an archive, opened, by name."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for entry in zipped.infolist():
                if not entry.is_dir():
                    with zipped.open(entry) as file:
                        yield entry.filename, file
        return
    with tarfile.open(archive) as tarred:
        for member in tarred:
            if member.isfile() and (opened := tarred.extractfile(member)) is not None:
                with opened:
                    yield member.name.removeprefix("./"), opened
