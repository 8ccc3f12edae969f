"""`fedcli eval fetch`, and scoring that fetches by itself: real processes, a server with the publishers' files."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from support.download_server import DownloadServer
from support.judge_server import JudgeServer
from support.processes import ENVIRONMENT
from support.scripted import ROWS

from fedcli.errors import RequirementError
from fedcli.eval.data import DataSource, Files
from fedcli.eval.fetch import RECORD_NAME
from fedcli.eval.registry import BENCHMARKS
from fedcli.eval.releases import Download, Release
from fedcli.observer import Observer

DATA = Path(os.environ.get("FEDCLI_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
UNPINNED = {"medqa", "pubmedqa", "ds1000", "careqa"}
UNPINNED |= {f"multiple-{source}{name}" for source in ("", "mbpp-") for name in ("js", "cpp", "sh")}
RELEASES = {
    found.data.release.name: found.data.release
    for found in BENCHMARKS.values()
    if found.data is not None and found.data.release is not None
}


def hash_of(contents: bytes) -> str:
    return sha256(contents).hexdigest()


def path_of(download: Download) -> str:
    """Return where a server that stands in for all publishers has a file."""
    if isinstance(download.source, str):
        parts = urlsplit(download.source)
        return f"/{parts.netloc}{parts.path}"
    return f"/datasets/{download.source.repository}/resolve/{download.source.revision}/{download.source.path}"


OWN = {
    path: (ROWS / "mt-bench" / path).read_bytes()
    for path in ("question.jsonl", "reference_answer/gpt-4.jsonl", "judge_prompts.jsonl")
}
"""The tests' own rows, in MT-Bench's format."""
HASHES = {path: hash_of(contents) for path, contents in OWN.items()}
COMMAND = f"""
import sys
from dataclasses import replace
from fedcli.cli import main
from fedcli.eval.benchmarks.mt_bench import MT_BENCH
from fedcli.eval.data import DataSource
from fedcli.eval.registry import BENCHMARKS
from fedcli.eval.releases import Download, Release

downloads = tuple(
    Download(path, "https://own.example.org/" + path, sha256) for path, sha256 in {HASHES!r}.items()
)
pinned = DataSource(("question.jsonl",), "https://own.example.org", release=Release("own-bench", "MIT", downloads))
bare = DataSource(("question.jsonl",), "https://bare.example.org")
for name, data in (("own-bench", pinned), ("bare-bench", bare)):
    BENCHMARKS.add(name, replace(MT_BENCH, name=name, groups=("own",), data=data))
sys.exit(main(sys.argv[1:]))
"""
"""fedcli with two benchmarks of a test: the hashes of the files of one of them are known."""
SERVED = {f"/own.example.org/{path}": contents for path, contents in OWN.items()}


def run(*arguments: object, cwd: Path, cache: Path, url: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command in a new process, with a cache of its own and a network that ends at a server of the test."""
    network = {"FEDCLI_MIRROR": url, "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0"} if url else {"HF_HUB_OFFLINE": "1"}
    folders = {"FEDCLI_CACHE": str(cache), "HF_HOME": str(cache / "hub"), "PYTHONPATH": str(Path(__file__).parents[1])}
    line = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    environment = ENVIRONMENT | folders | network
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


@pytest.mark.slow
def test_a_benchmark_with_a_judge_runs_to_scores_with_no_other_command(small: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    num = 2 * len(OWN["question.jsonl"].splitlines())
    with JudgeServer() as judge, DownloadServer(SERVED, ["500", "break"]) as server:
        line = ("eval", "own-bench", "--base", "--max-new-tokens", 4)
        line += ("--judge-model", "j", "--judge-url", judge.url, "--yes", "--json")
        done = run(*line, cwd=small, cache=cache, url=server.url)
        (record,) = json.loads(done.stdout)["scores"]
        assert done.stderr == ""
        assert {name: entry["value"] for name, entry in record["scores"].items() if not entry["is_detail"]} == {
            **{"MT-1": 7, "MT-2": 7, "MT-Avg": 7}
        }
        assert (record["data"]["files"], record["num_items"]) == ("question.jsonl", num)
        assert (len(server.log), len(judge.log)) == (5, num)


@pytest.mark.slow
def test_the_command_fetches_what_it_can_and_names_what_it_cannot(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = cache / "benchmarks/own-bench"
    place: dict[str, Any] = {"cwd": tmp_path, "cache": cache}
    size = sum(map(len, OWN.values()))
    offline = run("eval", "fetch", "own-bench", **place, code=8).stderr
    assert "the data of own-bench is not here, and cannot be fetched: HF_HUB_OFFLINE is set" in offline
    assert (
        f"Run `fedcli eval fetch own-bench` where there is a network, and copy the folder that it names to {folder}"
        in (offline)
    )
    bare = run("eval", "fetch", "bare-bench", **place, code=8).stderr
    assert "bare-bench: no hash of its published files is known" in bare
    assert "https://bare.example.org" in bare
    assert "no benchmark is named" in run("eval", "fetch", **place, code=2).stderr
    assert "nothing to fetch" in run("eval", "fetch", "demo", **place).stderr
    with DownloadServer(SERVED, ["changed"]) as server:
        refused = run("eval", "fetch", "--group", "own", "--json", **place, url=server.url, code=7)
        own, bare_set = json.loads(refused.stdout)
        assert (own["state"], own["error"]["exit_code"], own["folder"]) == ("failed", 7, None)
        assert "its sha256 is" in own["error"]["message"]
        assert (bare_set["state"], bare_set["error"]) == ("not pinned", None)
        done = run("eval", "fetch", "--group", "own", **place, url=server.url)
        assert done.stdout == (
            f"own-bench: fetched, 3 files, {size:,} bytes in {folder}; license: MIT; from https://own.example.org\n"
        )
        assert "bare-bench: no hash of its published files is known" in done.stderr
        assert f"fetching own-bench: {server.url}/own.example.org/question.jsonl" in done.stderr
    (own,) = json.loads(run("eval", "fetch", "own-bench", "--json", **place).stdout)
    assert own == {
        **{
            "name": "own-bench",
            "benchmarks": ["own-bench"],
            "state": "cached",
            "license": "MIT",
            "error": None,
            "hub": None,
        },
        **{"folder": str(folder), "num_files": 3, "num_bytes": size, "url": "https://own.example.org"},
    }
    listed = {entry["name"]: entry for entry in json.loads(run("eval", "list", "--json", **place).stdout)}
    assert [listed["own-bench"][name] for name in ("data", "license", "pinned")] == ["cached", "MIT", True]
    assert [listed["bare-bench"][name] for name in ("data", "license", "pinned")] == ["missing", None, False]


@pytest.mark.slow
def test_scoring_without_a_network_names_the_command_to_run_elsewhere(small: Path, tmp_path: Path) -> None:
    error = json.loads(
        run("eval", "own-bench", "--base", "--json", cwd=small, cache=tmp_path / "cache", code=8).stdout
    )["error"]
    assert error["message"] == "the data of own-bench is not here, and cannot be fetched: HF_HUB_OFFLINE is set"
    assert "`fedcli eval fetch own-bench`" in error["hint"]
    assert error["hint"].endswith(f"{tmp_path / 'cache/benchmarks/own-bench'}.")
    assert not (small / "eval").exists()


# Where the data is read from


QUESTION = b'{"question": 1}\n'
PINNED = DataSource(
    ("q.jsonl",),
    "https://own.example.org",
    release=Release("pinned", "MIT", (Download("q.jsonl", "https://own.example.org/q", hash_of(QUESTION)),)),
)
ON_HUB = replace(PINNED, hub="own/rows")


class Notes(Observer):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def noted(self, text: str) -> None:
        self.told.append(text)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DownloadServer]:
    """A network that ends at a server, an empty cache, and none of the hub's."""
    monkeypatch.setenv("FEDCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with DownloadServer({"/own.example.org/q": QUESTION}) as found:
        monkeypatch.setenv("FEDCLI_MIRROR", found.url)
        yield found


def test_a_folder_comes_first_then_the_cache_and_files_of_one_benchmark_from_one_place(
    server: DownloadServer, tmp_path: Path
) -> None:
    own = tmp_path / "own/pinned"
    own.mkdir(parents=True)
    (own / "q.jsonl").write_bytes(b"{}")
    local = Files("bench", PINNED, (own,)).provided(Observer())
    assert (local.find(), local.roots, server.log) == ([own / "q.jsonl"], (own,), [])
    fetched = Files("pinned", PINNED, (tmp_path,)).provided(Observer())
    assert fetched.find() == [tmp_path / "cache/benchmarks/pinned/q.jsonl"]
    assert [row.fields for row in fetched.rows()] == [{"question": 1}]


def test_a_named_folder_that_lacks_the_files_is_told_and_nothing_is_fetched(
    server: DownloadServer, tmp_path: Path
) -> None:
    with pytest.raises(RequirementError, match=r"pinned is not here: q\.jsonl") as caught:
        Files("pinned", PINNED, (tmp_path,), may_fetch=False).provided(Observer())
    assert "`fedcli eval fetch pinned`" in caught.value.hint
    assert server.log == []


@pytest.mark.parametrize("outcome", ["404", "changed"])
def test_the_hub_stands_in_for_a_publisher_that_does_not_give_the_pinned_file_and_that_is_said(
    server: DownloadServer, outcome: str
) -> None:
    server.then = outcome
    notes = Notes()
    files = Files("pinned", ON_HUB)
    assert files.provided(notes) == files
    (_, told) = notes.told
    assert told.endswith("; the hub's own/rows is read instead, which is not pinned")
    with pytest.raises(Exception, match=r"cannot be fetched|does not hold the published file"):
        Files("pinned", PINNED).provided(Observer())


def test_offline_the_hubs_cache_stands_in_where_it_has_the_data_set(
    server: DownloadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    files, notes = Files("pinned", ON_HUB), Notes()
    with pytest.raises(RequirementError, match="HF_HUB_OFFLINE is set"):
        files.provided(notes)
    (tmp_path / "hub/datasets--own--rows").mkdir(parents=True)
    assert files.provided(notes) == files
    assert "HF_HUB_OFFLINE is set; the hub's own/rows is read instead" in notes.told[0]
    assert server.log == []


# The publishers' files


def test_every_benchmark_has_its_files_hashes_but_those_that_are_named() -> None:
    bare = {name for name, found in BENCHMARKS.items() if found.data is not None and found.data.release is None}
    assert bare - {"demo", "demo-tuning", "rows"} == UNPINNED
    sources = [download.source for release in RELEASES.values() for download in release.downloads]
    assert all(source.startswith("https://") for source in sources if isinstance(source, str))
    assert set(RELEASES) <= set(BENCHMARKS)  # so that `fedcli eval fetch NAME` takes them
    assert all(len(download.sha256) == 64 for release in RELEASES.values() for download in release.downloads)


def test_the_documentation_names_the_license_of_every_data_set_and_what_is_not_checked() -> None:
    page = (Path(__file__).parents[1] / "docs/EVALUATION.md").read_text()
    rows = re.findall(r"^\| (`.*?) \| .* \| (.*?) \|$", page, re.MULTILINE)
    licenses = {name: license for names, license in rows for name in re.findall(r"`([\w-]+)`", names)}
    for name, found in BENCHMARKS.items():
        if found.data is not None and found.data.release is not None:
            assert found.data.release.license.startswith(licenses[name.removesuffix("-likelihood")])
    unchecked = page.partition("No hash is known of the files of ")[2].partition(".")[0]
    assert set(re.findall(r"`([\w-]+)`", unchecked)) == UNPINNED


def published() -> dict[str, bytes]:
    """Return the publishers' files that this machine has, by hash."""
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not here; FEDCLI_TEST_DATA names its folder")
    files = [path.read_bytes() for path in DATA.rglob("*") if path.is_file()]
    files.append((DATA / "mbpp/mbpp.jsonl").read_bytes().replace(b"\r\n", b"\n") + b"\n")  # as Git has it
    return {hash_of(contents): contents for contents in files}


def served(contents: dict[str, bytes]) -> tuple[dict[str, bytes], list[str]]:
    """Return files by their paths on the server, and the names of the data sets that are complete."""
    files, names = {}, []
    for release in RELEASES.values():
        found = {path_of(each): contents.get(each.sha256) for each in release.downloads}
        files |= {path: whole for path, whole in found.items() if whole is not None}
        names += [release.name] if all(whole is not None for whole in found.values()) else []
    return files, names


@pytest.mark.slow
def test_the_publishers_own_files_are_fetched_and_read_by_their_benchmarks(small: Path, tmp_path: Path) -> None:
    files, names = served(published())
    wanted = {"mt-bench", "vicuna", "advbench", "gsm8k", "humaneval", "mbpp", "fiqa", "nwgi", "tfns"}
    assert set(names) == wanted
    cache = tmp_path / "cache"
    with DownloadServer(files) as server:
        found = json.loads(run("eval", "fetch", *names, "--json", cwd=tmp_path, cache=cache, url=server.url).stdout)
        assert {each["name"]: each["state"] for each in found} == dict.fromkeys(wanted, "fetched")
    line = ("eval", *names, "--base", "--limit", 1, "--max-new-tokens", 2, "--json")
    records = json.loads(run(*line, cwd=small, cache=cache).stdout)["scores"]
    assert {record["benchmark"] for record in records} == wanted
    assert all(record["num_items"] >= 1 for record in records)


@pytest.mark.slow
def test_mt_bench_itself_runs_to_scores_with_no_other_command(small: Path, tmp_path: Path) -> None:
    files, _ = served(published())
    with JudgeServer() as judge, DownloadServer(files) as server:
        line = ("eval", "mt-bench", "--base", "--limit", 3, "--max-new-tokens", 4)
        line += ("--judge-model", "j", "--judge-url", judge.url, "--yes", "--json")
        (record,) = json.loads(run(*line, cwd=small, cache=tmp_path / "cache", url=server.url).stdout)["scores"]
    assert record["scores"]["MT-Avg"]["value"] == 7
    assert (record["num_items"], record["data"]["files"]) == (6, "question.jsonl")
    assert (tmp_path / "cache/benchmarks/mt-bench" / RECORD_NAME).is_file()
