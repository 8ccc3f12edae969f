"""Benchmarks' data is fetched once, over HTTP from a server of the test: the published bytes, or none."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from support.download_server import DownloadServer
from support.processes import ENVIRONMENT

import fedcli.eval.fetch as fetching
from fedcli.errors import IntegrityError, RequirementError, WorkspaceError
from fedcli.eval import archives
from fedcli.eval.fetch import ATTEMPTS, RECORD_NAME, fetch, has_record, is_whole, release_folder
from fedcli.eval.releases import Download, HubFile, Release
from fedcli.observer import Observer

PUBLISHER = "https://files.example.org/v1"
QUESTIONS = b'{"question": "what?"}\n' * 400
ANSWERS = b'{"answer": "that"}\n' * 100
SERVED = {"/files.example.org/v1/q.jsonl": QUESTIONS, "/files.example.org/v1/ref/a.jsonl": ANSWERS}


def hash_of(contents: bytes) -> str:
    return sha256(contents).hexdigest()


RELEASE = Release(
    "bench",
    "MIT",
    (
        Download("q.jsonl", f"{PUBLISHER}/q.jsonl", hash_of(QUESTIONS)),
        Download("ref/a.jsonl", f"{PUBLISHER}/ref/a.jsonl", hash_of(ANSWERS)),
    ),
)


class Notes(Observer):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.progress: list[tuple[str, int, int | None]] = []

    def noted(self, text: str) -> None:
        self.told.append(text)

    def fetched(self, what: str, num_bytes: int, total: int | None) -> None:
        self.progress.append((what, num_bytes, total))


@pytest.fixture(autouse=True)
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, a network, and no waiting between attempts."""
    monkeypatch.setenv("FEDCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 60)
    monkeypatch.setattr(fetching, "FIRST_WAIT", 0.0)


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def serve(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], *script: str, then: str = "well") -> DownloadServer:
    server = DownloadServer(files, script, then)
    monkeypatch.setenv("FEDCLI_MIRROR", server.url)
    return server


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_data_set_is_fetched_once_and_says_where_it_is_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    notes = Notes()
    with serve(monkeypatch, SERVED) as server:
        assert not has_record(RELEASE)
        folder = fetch(RELEASE, notes)
        assert [asked.path for asked in server.log] == list(SERVED)
        assert fetch(RELEASE, Observer()) == folder
        assert len(server.log) == 2
    assert folder == tmp_path / "cache/benchmarks/bench" == release_folder(RELEASE)
    assert is_whole(RELEASE)
    assert has_record(RELEASE)
    found = files_of(folder)
    record = json.loads(found.pop(RECORD_NAME))
    assert found == {"q.jsonl": QUESTIONS, "ref/a.jsonl": ANSWERS}
    assert record == {
        "license": "MIT",
        "downloads": {f"{PUBLISHER}/{name}": hash_of(contents) for name, contents in found.items()},
        "files": {name: hash_of(contents) for name, contents in found.items()},
    }
    assert notes.told == [f"fetching bench: {server.url}{path}" for path in SERVED]
    assert notes.progress[-1] == ("bench", len(ANSWERS), len(ANSWERS))
    assert sorted(path.name for path in folder.parent.iterdir()) == ["bench", "bench.lock"]


HALF = len(QUESTIONS) // 2
BAD_DAYS: list[tuple[list[str], list[int]]] = [
    (["500"], [0, 0]),
    (["429", "503", "500"], [0, 0, 0, 0]),
    (["break"], [0, HALF]),
    (["break", "500", "break"], [0, HALF, HALF, HALF + (len(QUESTIONS) - HALF) // 2]),
    (["break", "whole"], [0, HALF]),
    (["unsized"], [0]),
    (["slow"], [0]),
    (["break", "changed"], [0, HALF, 0]),
    (["longer"], [0]),
]
"""What becomes of the first requests, and where each asks the file to begin."""


@pytest.mark.parametrize(("script", "starts"), BAD_DAYS, ids=str)
def test_what_a_connection_does_to_a_file_is_mended_or_the_file_is_refused(
    script: list[str], starts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(monkeypatch, SERVED, *script) as server:
        if script == ["longer"]:
            with pytest.raises(IntegrityError, match="does not hold the published file"):
                fetch(RELEASE, Observer())
        else:
            assert (fetch(RELEASE, Observer()) / "q.jsonl").read_bytes() == QUESTIONS
        assert [asked.start for asked in server.log if asked.path.endswith("q.jsonl")] == starts


def test_a_server_that_falls_silent_is_left_and_asked_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    with serve(monkeypatch, SERVED, "stall") as server:
        monkeypatch.setattr(fetching, "ATTEMPTS", 100)  # on a machine under load others may take as long
        assert (fetch(RELEASE, Observer()) / "q.jsonl").read_bytes() == QUESTIONS
        assert [asked.start for asked in server.log][:2] == [0, HALF]


@pytest.mark.parametrize("outcome", ["changed", "longer"])
def test_contents_that_are_not_the_published_ones_are_refused_and_nothing_of_them_is_kept(
    outcome: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with serve(monkeypatch, SERVED, "well", then=outcome) as server:
        with pytest.raises(IntegrityError) as caught:
            fetch(RELEASE, Observer())
        assert f"{server.url}/files.example.org/v1/ref/a.jsonl" in caught.value.message
        assert hash_of(ANSWERS) in caught.value.message
        kept = {name for name in files_of(tmp_path / "cache") if not name.endswith(".lock")}
        assert kept == {"benchmarks/bench.part/q.jsonl"}  # which was right
        assert not has_record(RELEASE)
        server.then = "well"
        fetch(RELEASE, Observer())
    assert is_whole(RELEASE)
    assert [asked.path for asked in server.log].count("/files.example.org/v1/q.jsonl") == 1


@pytest.mark.parametrize(("outcome", "num"), [("404", 1), ("403", 1), ("500", ATTEMPTS), ("503", ATTEMPTS)])
def test_a_status_is_told_with_the_command_to_run_elsewhere_and_where_the_files_belong(
    outcome: str, num: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with serve(monkeypatch, SERVED, then=outcome) as server:
        with pytest.raises(RequirementError) as caught:
            fetch(RELEASE, Observer())
        assert server.outcomes() == [outcome] * num
    assert f"{server.url}/files.example.org/v1/q.jsonl: HTTP status {outcome}" in caught.value.message
    assert "`fedcli eval fetch bench`" in caught.value.hint
    assert str(tmp_path / "cache/benchmarks/bench") in caught.value.hint


def test_without_a_network_the_same_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(monkeypatch, SERVED) as server:
        pass
    with pytest.raises(RequirementError, match=rf"cannot be fetched: {server.url}/.*; {ATTEMPTS} attempts"):
        fetch(RELEASE, Observer())
    go_offline(monkeypatch)
    with pytest.raises(RequirementError, match="cannot be fetched: HF_HUB_OFFLINE is set"):
        fetch(RELEASE, Observer())


def test_a_file_that_changes_in_the_cache_is_fetched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(monkeypatch, SERVED):
        folder = fetch(RELEASE, Observer())
        (folder / "q.jsonl").write_bytes(b"{}\n")
        assert has_record(RELEASE)
        assert not is_whole(RELEASE)
        assert fetch(RELEASE, Observer()) == folder
    assert (folder / "q.jsonl").read_bytes() == QUESTIONS


def test_files_that_a_person_puts_into_the_cache_are_taken_where_their_hashes_are_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_offline(monkeypatch)
    folder = release_folder(RELEASE)
    (folder / "ref").mkdir(parents=True)
    (folder / "q.jsonl").write_bytes(QUESTIONS)
    (folder / "ref/a.jsonl").write_bytes(ANSWERS[1:])
    with pytest.raises(RequirementError, match="HF_HUB_OFFLINE"):
        fetch(RELEASE, Observer())
    (folder / "ref/a.jsonl").write_bytes(ANSWERS)
    assert fetch(RELEASE, Observer()) == folder


MEMBERS = {
    "data/test/a_test.csv": b"a\n",
    "data/test/deep/b_test.csv": b"b\n",
    "data/dev/a_dev.csv": b"c\n",
    "data/test/._a_test.csv": b"of macOS",
    "data/train/big.csv": b"not wanted",
    "data/test/../../../../escaped.csv": b"outside",
    "/data/test/absolute.csv": b"outside",
    "else/test/a_test.csv": b"not wanted",
}


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, contents in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(contents)
            file.addfile(entry, io.BytesIO(contents))
        link = tarfile.TarInfo("data/test/link.csv")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    return buffer.getvalue()


def zip_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, contents in members.items():
            file.writestr(name, contents)
    return buffer.getvalue()


@pytest.mark.parametrize("pack", [tar_of, zip_of])
def test_of_an_archive_the_named_files_are_unpacked_and_none_outside(
    pack: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    archive = pack(MEMBERS)
    release = Release(
        "packed", "MIT", (Download("data", f"{PUBLISHER}/d.tar", hash_of(archive), ("test/*.csv", "dev/*.csv")),)
    )
    with serve(monkeypatch, {"/files.example.org/v1/d.tar": archive}) as server:
        folder = fetch(release, Observer())
        found = files_of(folder)
        record = json.loads(found.pop(RECORD_NAME))
        assert found == {"test/a_test.csv": b"a\n", "test/deep/b_test.csv": b"b\n", "dev/a_dev.csv": b"c\n"}
        assert record["files"] == {name: hash_of(contents) for name, contents in found.items()}
        assert not list(tmp_path.rglob("escaped.csv"))
        (folder / "dev/a_dev.csv").unlink()
        assert not has_record(release)
        assert not is_whole(release)
        fetch(release, Observer())
        assert files_of(folder)["dev/a_dev.csv"] == b"c\n"
        (folder / RECORD_NAME).write_text("{")
        assert not is_whole(release)
        fetch(release, Observer())
        assert is_whole(release)
        assert len(server.log) == 3


def test_what_a_killed_process_has_half_unpacked_and_files_of_an_earlier_version_do_no_harm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    archive = zip_of(MEMBERS)
    packed = Download("data", f"{PUBLISHER}/d.zip", hash_of(archive), ("dev/*.csv",))
    missing = Download("late.txt", f"{PUBLISHER}/late.txt", hash_of(b"late"))
    release = Release("packed", "MIT", (packed, missing))
    served = {"/files.example.org/v1/d.zip": archive}
    part = tmp_path / "cache/benchmarks/packed.part"
    with serve(monkeypatch, served) as server:
        with pytest.raises(RequirementError, match=r"late\.txt: HTTP status 404"):
            fetch(release, Observer())
        with pytest.raises(RequirementError):  # what was unpacked is not fetched again
            fetch(release, Observer())
        assert [asked.path for asked in server.log].count("/files.example.org/v1/d.zip") == 1
        (part / f".{packed.sha256}.json").write_text('{"dev/a_')
        (part / "old/test.jsonl").parent.mkdir()
        (part / "old/test.jsonl").write_text("{}")
        served["/files.example.org/v1/late.txt"] = b"late"
        found = files_of(fetch(release, Observer()))
        assert set(found) == {"dev/a_dev.csv", "late.txt", RECORD_NAME}
        assert [asked.path for asked in server.log].count("/files.example.org/v1/d.zip") == 2
    assert is_whole(release)


def test_an_archive_without_the_named_files_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for archive, words in ((tar_of({"else/a.csv": b"a"}), "holds no data/test/"), (b"no archive", "is no archive")):
        release = Release("packed", "MIT", (Download("data", f"{PUBLISHER}/d", hash_of(archive), ("test/*.csv",)),))
        with (
            serve(monkeypatch, {"/files.example.org/v1/d": archive}),
            pytest.raises(IntegrityError, match=words),
        ):
            fetch(release, Observer())


def test_a_cache_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDCLI_CACHE", str(tmp_path / "file"))
    with serve(monkeypatch, SERVED), pytest.raises(WorkspaceError, match="cannot write fedcli's cache"):
        fetch(RELEASE, Observer())


# Several processes


FETCH = """
import sys
from fedcli.eval.fetch import fetch
from fedcli.eval.releases import Download, HubFile, Release
from fedcli.observer import Observer
class Shown(Observer):
    def noted(self, text):
        print(text, flush=True)
print(fetch(eval(sys.argv[1]), Shown()), flush=True)
"""


def started(release: Release, cache: Path, **environment: str) -> subprocess.Popen[str]:
    variables = {"FEDCLI_CACHE": str(cache), "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(Path(__file__).parents[1])}
    line = [sys.executable, "-c", FETCH, repr(release)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(line, env=ENVIRONMENT | variables | environment, text=True, **pipes)


BIG = bytes(range(256)) * 4096
ONE_BIG = Release("big", "MIT", (Download("big.bin", f"{PUBLISHER}/big.bin", hash_of(BIG)),))


@pytest.mark.slow
def test_of_two_processes_one_fetches_and_the_other_waits(tmp_path: Path) -> None:
    with DownloadServer({"/files.example.org/v1/big.bin": BIG}, ["stall"]) as server:
        first = started(ONE_BIG, tmp_path, FEDCLI_MIRROR=server.url, HF_HUB_DOWNLOAD_TIMEOUT="300")
        server.wait(1, "stall")
        second = started(ONE_BIG, tmp_path, FEDCLI_MIRROR=server.url)
        assert second.stdout is not None
        assert second.stdout.readline() == "waiting for another process, which fetches big\n"
        server.let_go()
        folder = f"{tmp_path / 'benchmarks/big'}\n"
        assert second.communicate(timeout=300)[0] == folder
        assert first.communicate(timeout=300)[0].endswith(folder)
        assert [asked.start for asked in server.log] == [0, len(BIG) // 2]
    assert (tmp_path / "benchmarks/big/big.bin").read_bytes() == BIG


@pytest.mark.slow
def test_a_fetch_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    with DownloadServer({"/files.example.org/v1/big.bin": BIG}, ["stall"]) as server:
        killed = started(ONE_BIG, tmp_path, FEDCLI_MIRROR=server.url, HF_HUB_DOWNLOAD_TIMEOUT="300")
        part = tmp_path / "benchmarks/big.part" / f".{hash_of(BIG)}"
        end = time.monotonic() + 300
        while not part.exists() or part.stat().st_size < len(BIG) // 2:
            assert time.monotonic() < end
            time.sleep(0.01)
        os.kill(killed.pid, signal.SIGKILL)
        killed.communicate(timeout=300)
        assert not (tmp_path / "benchmarks/big").exists()
        again = started(ONE_BIG, tmp_path, FEDCLI_MIRROR=server.url)
        assert again.communicate(timeout=300)[0].endswith("benchmarks/big\n")
        assert [asked.start for asked in server.log] == [0, len(BIG) // 2]
    assert (tmp_path / "benchmarks/big/big.bin").read_bytes() == BIG
    assert sorted(path.name for path in (tmp_path / "benchmarks").iterdir()) == ["big", "big.lock"]


@pytest.mark.slow
def test_files_of_the_hub_come_from_its_endpoint_over_its_redirects_and_never_where_it_is_switched_off(
    tmp_path: Path,
) -> None:
    path = f"/datasets/own/rows/resolve/{'c' * 40}/data/q.jsonl"
    source = HubFile("own/rows", "c" * 40, "data/q.jsonl")
    release = Release("hub-rows", "MIT", (Download("q.jsonl", source, hash_of(QUESTIONS)),))
    with DownloadServer({path: QUESTIONS}, ["break", "500"]) as server:
        addresses = {"HF_ENDPOINT": server.url, "FEDCLI_MIRROR": "http://127.0.0.1:9/of-publishers"}
        off = started(release, tmp_path, **addresses, HF_HUB_OFFLINE="1")
        assert off.communicate(timeout=300)[0] == ""
        assert server.redirected == []
        process = started(release, tmp_path, **addresses)
        folder = tmp_path / "benchmarks/hub-rows"
        assert process.communicate(timeout=300)[0] == f"fetching hub-rows: {server.url}{path}\n{folder}\n"
        assert server.redirected == [path] * 3
        assert [(asked.start, asked.outcome) for asked in server.log] == [(0, "break"), (HALF, "500"), (HALF, "well")]
    assert (folder / "q.jsonl").read_bytes() == QUESTIONS
    record = json.loads((folder / RECORD_NAME).read_text())
    assert record["downloads"] == {f"hf://datasets/own/rows@{'c' * 40}/data/q.jsonl": hash_of(QUESTIONS)}


@pytest.mark.parametrize("outcome", ["well", "unsized"])
def test_more_than_any_published_file_holds_is_not_fetched_and_nothing_of_it_is_kept(
    outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "MOST_BYTES", len(QUESTIONS) - 1)
    with (
        serve(monkeypatch, SERVED, outcome),
        pytest.raises(IntegrityError, match=r"gives more than 8,\d\d\d bytes; nothing"),
    ):
        fetch(RELEASE, Observer())
    part = release_folder(RELEASE).with_name("bench.part")
    assert not files_of(part)


@pytest.mark.parametrize("pack", [tar_of, zip_of])
@pytest.mark.parametrize(("name", "most"), [("MOST_BYTES", 10**6), ("MOST_FILES", 3)])
def test_an_archive_is_unpacked_up_to_a_bound(
    pack: Any, name: str, most: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(archives, name, most)
    archive = tmp_path / "archive"
    archive.write_bytes(pack({f"data/{number}.csv": b"0" * 300_000 for number in range(4)}))
    with pytest.raises(IntegrityError, match="unpacks to more than"):
        archives.unpack(archive, tmp_path / "out", "data", ("*.csv",))
    assert len(list((tmp_path / "out").iterdir())) == 3
