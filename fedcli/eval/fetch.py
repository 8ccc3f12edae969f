"""Fetching a data set's files once into fedcli's cache: from the publisher or the hub, each checked by its sha256.

The files lie in benchmarks/NAME of the cache, beside a record of their hashes. They are gathered in NAME.part, under a
lock, and take their place with a rename when all of them are right. What a killed process has left there is used: files
that are whole are kept, one that is not is continued (HTTP Range).
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import TypeAlias
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from fedcli import __version__
from fedcli.data.cache import cache_folder, writing_cache
from fedcli.errors import FedError, IntegrityError, RequirementError
from fedcli.eval.archives import unpack
from fedcli.eval.releases import Download, HubFile, Release
from fedcli.observer import Observer

MIRROR_VARIABLE = "FEDCLI_MIRROR"
"""A URL below which hosts' files lie as `wget -x` stores them: https://HOST/PATH is $FEDCLI_MIRROR/HOST/PATH."""
RECORD_NAME = "fetched.json"
ATTEMPTS = 4
FIRST_WAIT = 0.5
"""Seconds before the second attempt; each further one waits twice as long."""
MOST_BYTES = 2**31
"""Of one file; the largest that is published has 160 MiB."""
_CHUNK = 2**18
_PASSING = (408, 425, 429)
"""Of the 4xx: what another attempt may mend, as with every 5xx."""

Progress: TypeAlias = Callable[[int, int | None], None]
"""Hears how many bytes are there, of how many."""


def release_folder(release: Release) -> Path:
    """Return where a data set's files lie, or would."""
    return cache_folder() / "benchmarks" / release.name


def has_record(release: Release) -> bool:
    """Return whether a data set's files were fetched and are there, without a look at what they hold."""
    folder = release_folder(release)
    files = _recorded(release, folder)
    return files is not None and all((folder / name).is_file() for name in files)


def is_whole(release: Release) -> bool:
    """Return whether all of a data set's files are in the cache with the hashes that they should have."""
    return _is_whole(release, release_folder(release))


def fetch(release: Release, observer: Observer) -> Path:
    """Return the folder of a data set's files, fetched unless they are there whole.

    Raises RequirementError where there is no network, or the publisher does not give a file; IntegrityError for a file
    with other contents than the published one, which is not kept; WorkspaceError where the cache cannot be written.
    """
    folder = release_folder(release)
    if _is_whole(release, folder):
        return folder
    with _locked(release, folder, observer):
        if not _is_whole(release, folder):  # else another process has done it meanwhile
            part = folder.with_name(f"{release.name}.part")
            for download in release.downloads:
                _complete(release, download, part, observer)
            _publish(release, part, folder)
    return folder


def url_of(download: Download) -> str:
    """Return where a file is fetched from, as $HF_ENDPOINT and $FEDCLI_MIRROR say."""
    if isinstance(download.source, HubFile):
        from huggingface_hub import hf_hub_url

        hub = download.source
        return hf_hub_url(hub.repository, hub.path, repo_type="dataset", revision=hub.revision)
    if mirror := os.environ.get(MIRROR_VARIABLE):
        return f"{mirror.rstrip('/')}/{download.source.partition('://')[2]}"
    return download.source


def is_offline() -> bool:
    """Return whether $HF_HUB_OFFLINE forbids the network."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)


def _complete(release: Release, download: Download, part: Path, observer: Observer) -> None:
    """Put one of a data set's files into the folder, or unpack it there; nothing is fetched that is there already."""
    place = part / download.path
    archive = part / f".{download.sha256}"  # or the file, before it is whole
    if download.members:
        if _unpacked(download, part):
            return
    elif _has_hash(place, download.sha256):
        return
    if not _has_hash(archive, download.sha256):
        url = url_of(download)
        if is_offline():
            raise _unavailable(release, "HF_HUB_OFFLINE is set")
        with writing_cache(part):
            part.mkdir(parents=True, exist_ok=True)
        observer.noted(f"fetching {release.name}: {url}")
        try:
            _fetch_checked(url, archive, download.sha256, partial(observer.fetched, release.name))
        except _Unavailable as error:
            raise _unavailable(release, str(error)) from error
    with writing_cache(part):
        if not download.members:
            place.parent.mkdir(parents=True, exist_ok=True)
            archive.rename(place)
            return
        names = unpack(archive, part, download.path, download.members)
        hashes = {name: _hash_of(part / name) for name in names}
        _note_of(download, part).write_text(json.dumps(hashes))
        archive.unlink()


class _Unavailable(Exception):
    """Why a file is not to be had; no further attempt would help."""


class _TooLargeError(Exception):
    """More comes than any published file holds."""


def _fetch_checked(url: str, file: Path, sha256: str, progress: Progress) -> None:
    """Fetch a URL into a file, which may hold its beginning.

    Raises _Unavailable, and IntegrityError where the contents are others: then no file stays.
    """
    try:
        is_joined = _fetch_all(url, file, progress)
    except _TooLargeError as error:
        file.unlink(missing_ok=True)
        raise IntegrityError(
            f"{url} does not hold the published file: it gives more than {MOST_BYTES:,} bytes; nothing of it is kept",
            hint="Get the publisher's file another way, and name its folder with --data DIR.",
        ) from error
    found = _hash_of(file)
    if found != sha256 and is_joined:  # of pieces that may not belong together
        file.unlink()
        _fetch_all(url, file, progress)
        found = _hash_of(file)
    if found != sha256:
        file.unlink()
        raise IntegrityError(
            f"{url} does not hold the published file: its sha256 is {found}, not {sha256}; nothing of it is kept",
            hint="Somebody has changed it there, or on the way. Get the publisher's file another way, and name its "
            "folder with --data DIR.",
        )


def _fetch_all(url: str, file: Path, progress: Progress) -> bool:
    """Fetch what a file lacks of a URL, and return whether it is joined of several pieces.

    Raises _Unavailable, with the last attempt's reason, where all attempts fail.
    """
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
        try:
            return _fetch_rest(url, file, progress)
        except HTTPError as error:
            error.close()
            reason = f"{url}: HTTP status {error.code} ({error.reason})"
            if error.code == 416:  # more is there than the URL holds
                file.unlink()
            elif error.code < 500 and error.code not in _PASSING:
                raise _Unavailable(reason) from error
        except _Broken as error:
            reason = f"{url}: {error}"
        except (OSError, HTTPException, ValueError) as error:
            reason = f"{url}: {getattr(error, 'reason', None) or str(error) or type(error).__name__}"
    raise _Unavailable(f"{reason}; {ATTEMPTS} attempts")


class _Broken(Exception):
    """A connection that ended too early."""


def _fetch_rest(url: str, file: Path, progress: Progress) -> bool:
    """Append to a file what it lacks of a URL, or write it anew where the server sends all of it: then return False."""
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT

    start = file.stat().st_size if file.exists() else 0
    headers = {"User-Agent": f"fedcli/{__version__}"} | ({"Range": f"bytes={start}-"} if start else {})
    with urlopen(Request(url, headers=headers), timeout=HF_HUB_DOWNLOAD_TIMEOUT) as reply:
        is_rest = start > 0 and reply.status == 206
        if not is_rest:
            start = 0
        length = reply.headers["Content-Length"]
        total = None if length is None else start + int(length)
        if total is not None and total > MOST_BYTES:
            raise _TooLargeError
        with writing_cache(file), file.open("ab" if is_rest else "wb") as opened:
            for chunk in _chunks(reply):
                start += len(chunk)
                if start > MOST_BYTES:  # it told no length, or another one
                    raise _TooLargeError
                opened.write(chunk)
                progress(start, total)
    if total is not None and start < total:
        raise _Broken(f"the connection ended after {start:,} of {total:,} bytes")
    return is_rest


def _chunks(reply: HTTPResponse) -> Iterator[bytes]:
    """Yield a reply's bytes; raise _Broken for what goes wrong with the connection, which is no fault of the disk's."""
    while True:
        try:
            chunk = reply.read1(_CHUNK)
        except (OSError, HTTPException) as error:
            raise _Broken(str(error) or type(error).__name__) from error
        if not chunk:
            return
        yield chunk


def _publish(release: Release, part: Path, folder: Path) -> None:
    """Give a data set's folder its name, with a record of what lies in it."""
    files: dict[str, str] = {}
    for download in release.downloads:
        files |= _unpacked(download, part) if download.members else {download.path: download.sha256}
    record = {
        "license": release.license,
        "downloads": {url: download.sha256 for url, download in zip(_sources(release), release.downloads, strict=True)},
        "files": files,
    }
    with writing_cache(folder):
        for path in part.rglob("*"):  # notes, and what an earlier version of fedcli has left
            if path.is_file() and str(path.relative_to(part)) not in files:
                path.unlink()
        (part / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n")
        if folder.exists():  # and not what it should be
            shutil.rmtree(folder)
        part.rename(folder)


def _sources(release: Release) -> list[str]:
    """Return the publishers' own addresses of a data set's files."""
    return [
        source if isinstance(source, str) else f"hf://datasets/{source.repository}@{source.revision}/{source.path}"
        for source in (download.source for download in release.downloads)
    ]


def _recorded(release: Release, folder: Path) -> dict[str, str] | None:
    """Return the hashes of the files that a folder should hold, by name; None where it does not tell.

    Files that lie in the cache as they were published need no record.
    """
    files = {download.path: download.sha256 for download in release.downloads if not download.members}
    if len(files) == len(release.downloads):
        return files
    try:
        record = json.loads((folder / RECORD_NAME).read_bytes())
        kept = set(record["downloads"].values())
        recorded: dict[str, str] = record["files"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return recorded if kept == {download.sha256 for download in release.downloads} else None


def _is_whole(release: Release, folder: Path) -> bool:
    files = _recorded(release, folder)
    return bool(files) and all(_has_hash(folder / name, sha256) for name, sha256 in (files or {}).items())


def _note_of(download: Download, part: Path) -> Path:
    """Return where the hashes of an archive's files are noted until all of the data set is there."""
    return part / f".{download.sha256}.json"


def _unpacked(download: Download, part: Path) -> dict[str, str]:
    """Return the hashes of an archive's unpacked files, by name; none where they are not all there, whole."""
    try:
        hashes: dict[str, str] = json.loads(_note_of(download, part).read_bytes())
    except (OSError, ValueError):  # such as what a killed process was writing
        return {}
    return hashes if all(_has_hash(part / name, sha256) for name, sha256 in hashes.items()) else {}


def _has_hash(path: Path, sha256: str) -> bool:
    try:
        return _hash_of(path) == sha256
    except OSError:
        return False


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(release: Release, folder: Path, observer: Observer) -> Iterator[None]:
    """Hold the data set's lock; wait for it where another process has it."""
    from filelock import FileLock, Timeout

    with writing_cache(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f"{release.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            observer.noted(f"waiting for another process, which fetches {release.name}")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _unavailable(release: Release, reason: str) -> FedError:
    """Return the error for files that are not to be had here, with the command that gets them elsewhere."""
    return RequirementError(
        f"the data of {release.name} is not here, and cannot be fetched: {reason}",
        hint=f"Run `fedcli eval fetch {release.name}` where there is a network, and copy the folder that it names to "
        f"{release_folder(release)}.",
    )
