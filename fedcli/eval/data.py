"""Where a benchmark's rows come from: the publisher's own files in a local folder, else a data set of the hub."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from fedcli.data.file_rows import Opener, Row
from fedcli.data.source import Source, find_source
from fedcli.errors import FedError, RequirementError, UsageError
from fedcli.eval.fetch import fetch, is_offline
from fedcli.eval.releases import Release
from fedcli.observer import Observer

BENCHMARKS_VARIABLE = "FEDCLI_BENCHMARKS"


@dataclass(frozen=True)
class DataSource:
    """What a publisher gives out: the names of its files (patterns; one that matches is enough), and where from."""

    files: tuple[str, ...]
    """Glob patterns relative to the folder, in the order of preference."""
    url: str
    """Where a user gets the files."""
    folders: tuple[str, ...] = ()
    """Names of sub-folders that may hold them, besides the benchmark's own name."""
    hub: str | None = None
    subset: str | None = None
    split: str = "test"
    revision: str | None = None
    """A branch of the hub's repository: that of the parquet copy, where a set comes as a script."""
    instead: str = ""
    """What to do where the files are missing, if there is nowhere to get them."""
    release: Release | None = None
    """Its files by their hashes, which are fetched where no folder has them; None where the hashes are not known."""
    is_any_file: bool = False
    """Whether a file that is named in place of a folder is its data, whatever its name."""

    @property
    def is_cached_from_hub(self) -> bool:
        """Whether the hub's cache holds its data set."""
        from huggingface_hub.constants import HF_HUB_CACHE

        return self.hub is not None and (Path(HF_HUB_CACHE) / f"datasets--{self.hub.replace('/', '--')}").is_dir()


def find_files(folder: Path, pattern: str) -> list[Path]:
    """Return a folder's files that match a pattern, sorted."""
    return sorted(path for path in folder.glob(pattern) if path.is_file())


Finder: TypeAlias = Callable[[Path, str], list[Path]]


@dataclass(frozen=True)
class Files:
    """The data of one benchmark on this machine."""

    benchmark: str
    source: DataSource
    roots: tuple[Path, ...] = ()
    """Folders to look in, the first first: each may hold the files, or a folder of the benchmark's name with them."""
    may_fetch: bool = True
    """Whether the hub is asked where no folder has the files."""
    finder: Finder = find_files
    opener: Opener | None = None
    """Whoever keeps one of the folders lists it and opens its files; by default it is a folder as any."""

    @property
    def named_file(self) -> Path | None:
        """The file that a user names in place of a folder, None where it is one or none is named."""
        return self.roots[0] if not self.may_fetch and self.roots and self.roots[0].is_file() else None

    def find(self, *patterns: str) -> list[Path]:
        """Return the files that match the first pattern with a match (default: the source's), sorted; else []."""
        if self.source.is_any_file and (file := self.named_file) is not None:
            return [file]
        for root in self.roots:
            for folder in (root / self.benchmark, *(root / name for name in self.source.folders), root):
                for pattern in patterns or self.source.files:
                    if found := self.finder(folder, pattern):
                        return found
        return []

    def require(self, *patterns: str) -> list[Path]:
        """Return what `find` does; raise RequirementError that says what is missing, where from, and how to name it."""
        if found := self.find(*patterns):
            return found
        raise self.missing(*patterns)

    def missing(self, *patterns: str, reason: str = "") -> RequirementError:
        """Return the error for data that is not to be had."""
        wanted = " or ".join(patterns or self.source.files)
        looked = ", ".join(map(str, self.roots)) or "no folder"
        hub = f"; the hub does not give it: {reason}" if reason else ""
        release = self.source.release
        command = "" if release is None else f"Run `fedcli eval fetch {release.name}` and leave --data out; or get"
        return RequirementError(
            f"the data of {self.benchmark} is not here: {wanted} (looked in {looked}{hub})",
            hint=self.source.instead
            or f"{command or 'Get'} the files from {self.source.url}, then name their folder with --data DIR, or put "
            f"them into {self.benchmark}/ in the folder that ${BENCHMARKS_VARIABLE} names.",
        )

    def provided(self, observer: Observer) -> "Files":
        """Return where to read the data from: a folder, else its release, fetched into the cache, else the hub.

        Raises RequirementError where neither is to be had (the hub is asked later), and as `fetch` does for what has no
        data set on the hub that could stand in; UsageError for a file in place of a folder.
        """
        source = self.source
        if (file := self.named_file) is not None and not source.is_any_file:
            hint = "Name the folder that holds it; `fedcli eval rows --data FILE` scores rows of your own."
            raise UsageError(f"--data {file} is no folder: {self.benchmark} has files of its own", hint=hint)
        if self.find():
            return self
        if not self.may_fetch or (source.release is None and source.hub is None):
            raise self.missing()
        if source.release is None:
            return self
        try:
            folder = fetch(source.release, observer)
        except FedError as error:
            if source.hub is None or (is_offline() and not source.is_cached_from_hub):
                raise
            observer.noted(f"{error.message}; the hub's {source.hub} is read instead, which is not pinned")
            return self
        return replace(self, roots=(*self.roots, folder))

    def rows(self) -> Iterator[Row]:
        """Yield the rows of the local files, else of the hub's data set.

        Raises RequirementError where neither is to be had, ConfigError for a file that cannot be read.
        """
        if found := self.find():
            for path in found:
                yield from find_source(str(path), path.parent).rows()
        else:
            yield from self.hub_rows(self.source.subset)

    def hub_rows(self, subset: str | None) -> Iterator[Row]:
        """Yield the rows of the hub's data set, or of another subset of it; raise as `rows` does."""
        if self.source.hub is None or not self.may_fetch:
            raise self.missing()
        try:
            yield from Source(self.source.hub, subset, self.source.split, self.source.revision).rows()
        except RequirementError as error:
            raise self.missing(reason=error.message) from error


def find_roots(named: Path | None) -> tuple[Path, ...]:
    """Return the folder (or file) of benchmarks that was named, else $FEDCLI_BENCHMARKS'; raise UsageError for none."""
    if named is not None:
        if not named.exists():
            raise UsageError(f"--data {named}: no such folder", hint="Name a folder that holds the benchmark's files.")
        return (named.absolute(),)
    return tuple(Path(name).absolute() for name in os.environ.get(BENCHMARKS_VARIABLE, "").split(os.pathsep) if name)
