"""What `fedcli eval fetch` does: fetching the data of benchmarks, one data set after the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedcli.data.cache import cache_folder
from fedcli.errors import FedError, RequirementError, UsageError
from fedcli.eval.benchmark import Benchmark
from fedcli.eval.fetch import RECORD_NAME, fetch, is_whole
from fedcli.eval.registry import BENCHMARKS, find_benchmarks, find_group
from fedcli.observer import Observer


@dataclass(frozen=True)
class Fetched:
    """A data set, and what became of it."""

    name: str
    benchmarks: tuple[str, ...]
    """Those of the asked that it belongs to."""
    state: str
    """fetched, cached (it was here), failed, or not pinned: its files' hashes are not known."""
    url: str
    """The publisher's page."""
    license: str | None = None
    folder: Path | None = None
    num_files: int = 0
    num_bytes: int = 0
    hub: str | None = None
    """Of what is not pinned: the hub's data set, which is read without a check."""
    error: FedError | None = None


def fetch_benchmarks(names: Sequence[str], group: str | None, observer: Observer) -> list[Fetched]:
    """Fetch the data of benchmarks and of a group's into fedcli's cache; what fails does not stop the others.

    Raises UsageError for unknown names, or none; RequirementError where the hash of no asked file is known.
    """
    if not names and group is None:
        raise UsageError("no benchmark is named", hint="Name some, or --group G: `fedcli eval list` shows them.")
    asked = [*find_benchmarks(names), *(find_group(group) if group is not None else ())]
    sets: dict[str, list[Benchmark]] = {}
    for benchmark in (BENCHMARKS[part] for found in asked for part in (found.parts or (found.name,))):
        if benchmark.data is not None and benchmark.data.url.startswith("http"):  # else a workspace holds its rows
            release = benchmark.data.release
            same = sets.setdefault(release.name if release is not None else benchmark.name, [])
            same += [benchmark] if benchmark not in same else []
    found = [_fetch(name, benchmarks, observer) for name, benchmarks in sets.items()]
    if found and all(each.state == "not pinned" for each in found):
        told = "; ".join(describe(each) for each in found)
        raise RequirementError(told, hint="`fedcli eval list` shows the benchmarks whose data can be fetched.")
    return found


def failure(found: Sequence[Fetched]) -> FedError | None:
    """Return the error for the data sets that could not be fetched, of the first one's kind; None where all could."""
    failed = {each.name: each.error for each in found if each.error is not None}
    if not failed:
        return None
    first = next(iter(failed.values()))
    if len(found) == 1:
        return first
    return type(first)(
        f"{len(failed)} of {len(found)} data sets could not be fetched: {', '.join(failed)}",
        hint=f"What went wrong is said above. Run `fedcli eval fetch {' '.join(failed)}` again, or where there is a "
        f"network, and copy the folders that it names to {cache_folder() / 'benchmarks'}.",
    )


def describe(found: Fetched) -> str:
    """Return what became of a data set, in a line."""
    shown = ", ".join(found.benchmarks)
    name = found.name if shown == found.name else f"{found.name} (of {shown})"
    if found.error is not None:
        return f"{name}: {found.error.message}"
    if found.folder is None:
        hub = f"scoring reads the hub's {found.hub}, unchecked" if found.hub else f"get its files from {found.url}"
        return f"{name}: no hash of its published files is known, so they are not fetched; {hub}"
    verb = "is here" if found.state == "cached" else "fetched"
    size = f"{found.num_files:,} files, {found.num_bytes:,} bytes"
    return f"{name}: {verb}, {size} in {found.folder}; license: {found.license}; from {found.url}"


def _fetch(name: str, benchmarks: Sequence[Benchmark], observer: Observer) -> Fetched:
    data, of = benchmarks[0].data, tuple(benchmark.name for benchmark in benchmarks)
    assert data is not None
    release = data.release
    if release is None:
        return Fetched(name, of, "not pinned", data.url, hub=data.hub)
    try:
        state = "cached" if is_whole(release) else "fetched"
        folder = fetch(release, observer)
    except FedError as error:
        return Fetched(name, of, "failed", data.url, release.license, error=error)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != RECORD_NAME]
    size = sum(path.stat().st_size for path in files)
    return Fetched(name, of, state, data.url, release.license, folder, len(files), size)
