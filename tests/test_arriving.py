"""Files that a tool copies one by one, in any order and under names of its own, are waited for and then counted."""

import itertools
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.federation import all_take_part, configure, read_manifest
from support.processes import Run, results, runner, warm
from support.signed import at, join, make_signed, train, tree

from fedcli import Federation
from fedcli.errors import ArrivingError, NotReadyError
from fedcli.workspace.arriving import arriving

slow = pytest.mark.slow
ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Run:
    return runner(capsys)


@pytest.fixture(scope="session")
def signed_template(small_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed workspace W with three parties that are enrolled and have sent; all is this user's, in `home`."""
    folder = tmp_path_factory.mktemp("signed")
    place = make_signed(small_template, folder / "W", folder / "home")
    with at(folder / "home"):
        for client in range(3):
            Federation.open(place).server.enrol(client, join(place, client))
            train(place, client)
    return folder


@pytest.fixture
def signed(signed_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path(shutil.copytree(signed_template, tmp_path / "P"))
    monkeypatch.setenv("XDG_DATA_HOME", str(folder / "home"))
    return folder / "W"


BESIDE = {"rsync": ".{}.a1B2c3", "syncthing": ".syncthing.{}.tmp", "browser": "{}.part"}
BESIDE |= {"inplace": "", "placeholders": ""}
"""Tools by the names under which they write at first; placeholders: all files stand there, empty, before."""


def steps_of_a_copy(whole: Path, place: Path, order: tuple[str, ...], tool: str) -> Iterator[None]:
    """Copy a folder's files in an order, as a tool does it; stop before each change and not at the end."""
    place.mkdir()
    for name in order if tool == "placeholders" else ():
        (place / name).touch()
    for name in order:
        yield
        contents = (whole / name).read_bytes()
        (place / name).parent.mkdir(exist_ok=True)
        beside = {"rsync": f".{name}.a1B2c3", "syncthing": f".syncthing.{name}.tmp", "browser": f"{name}.part"}.get(
            tool
        )
        if not beside:  # under its own name, such as `rsync --inplace` and cp
            (place / name).write_bytes(contents[: len(contents) // 2])
            yield
            (place / name).write_bytes(contents)
        else:
            (place / name).with_name(beside).write_bytes(contents[: len(contents) // 2])
            yield
            (place / name).with_name(beside).write_bytes(contents)
            (place / name).with_name(beside).rename(place / name)


@pytest.mark.parametrize(
    "tool", [pytest.param(tool, marks=[] if tool in ("rsync", "inplace") else slow) for tool in BESIDE]
)
def test_an_update_is_waited_for_whatever_the_tool_and_the_order(signed: Path, tmp_path: Path, tool: str) -> None:
    update, whole = signed / "inbox/1/round-00000", tmp_path / "whole"
    shutil.move(update, whole)
    names = ("update.json", "update.sig", ADAPTER)
    orders = [*itertools.permutations(names)]
    server = Federation.open(signed).server
    for order in orders if tool in ("rsync", "inplace") else orders[::3]:
        shutil.rmtree(update, ignore_errors=True)
        for _ in steps_of_a_copy(whole, update, order, tool):
            with pytest.raises(NotReadyError, match="arriving, with files still to come: 1"):
                server.aggregate()
    merge = server.aggregate().aggregation
    assert [entry.client for entry in merge.counted] == [0, 1, 2]


def test_what_is_missing_is_named_and_the_limit_and_the_operator_end_the_waiting(
    signed: Path, run: Run, tmp_path: Path
) -> None:
    update = signed / "inbox/1/round-00000"
    os.truncate(update / ADAPTER, 100)
    size = json.loads((update / "update.json").read_bytes())["files"][ADAPTER]["bytes"]
    found = results(run, "status", "-w", signed)
    assert (found["arriving"], found["not_there"]) == ([1], {"1": f"{ADAPTER} has 100 of {size:,} bytes"})
    code, _, err = run("server", "aggregate", "-w", signed)
    assert code == 6
    assert f"client 1: {ADAPTER} has 100 of {size:,} bytes" in err
    assert "--refuse-arriving" in err
    again = Path(shutil.copytree(signed.parent, tmp_path / "again")) / "W"
    assert results(run, "server", "aggregate", "--refuse-arriving", "-w", signed)["round"] == 1
    refused = read_manifest(signed, 1)["aggregation"]["refused"]
    assert [(entry["client"], entry["code"]) for entry in refused] == [(1, "size")]
    configure(again, "federation.arriving=400s")
    server = Federation.open(again).server
    with pytest.raises(NotReadyError):
        server.aggregate()
    configure(again, "federation.arriving=0.4")
    os.truncate(again / "inbox/1/round-00000" / ADAPTER, 200)
    with pytest.raises(NotReadyError):  # more has come
        Federation.open(again).server.aggregate()
    time.sleep(0.5)
    os.unlink(again / "inbox/1/round-00000/update.sig")  # even that is a change
    with pytest.raises(NotReadyError):
        Federation.open(again).server.aggregate()
    time.sleep(0.5)
    merge = Federation.open(again).server.aggregate().aggregation
    assert [(entry.client, entry.code) for entry in merge.refused] == [(1, "unsigned")]


def test_a_round_is_waited_for_whatever_the_order(signed: Path, tmp_path: Path) -> None:
    Federation.open(signed).server.aggregate()
    new, entries = signed / "rounds/00001", signed / "enrolment"
    whole = Path(shutil.copytree(new, tmp_path / "whole"))
    files = [path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()]
    assert len(files) == 4
    for order in [*itertools.permutations(sorted(files))][::5]:
        shutil.rmtree(new)
        for number, _ in enumerate(steps_of_a_copy(whole, new, order, "inplace")):
            if number == 0:
                assert train_quietly(signed) == "already_submitted"  # an empty folder is no round
            elif (new / "manifest.json").exists() or any(new.rglob("*.*")):
                with pytest.raises((ArrivingError, NotReadyError)) as raised:
                    train(signed, 0)
                assert raised.value.exit_code == 6
    sig, last = entries / "00003.sig", entries / "00003.json"
    kept = {path: path.read_bytes() for path in (sig, last)}
    for missing in (sig, last):
        missing.unlink()
        with pytest.raises(ArrivingError):
            train(signed, 0)
        missing.write_bytes(kept[missing])
    first = Path(shutil.move(signed / "rounds/00000", tmp_path / "first"))
    with pytest.raises(ArrivingError, match="is missing though a later round exists"):
        train(signed, 0)
    shutil.move(first, signed / "rounds/00000")
    assert train(signed, 0).round == 1


def train_quietly(workspace: Path) -> str:
    return train(workspace, 0).status


def test_a_registration_that_is_half_there_refuses_nothing(signed: Path) -> None:
    path = signed / "clients/1.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    server = Federation.open(signed).server
    with pytest.raises(NotReadyError, match="arriving, with files still to come: 1"):
        server.aggregate()
    path.write_bytes(whole)
    assert len(server.aggregate().aggregation.counted) == 3


LEFTOVERS = (
    "inbox/1/round-00000/.update.json.Ab12Cd",
    "inbox/1/round-00000/adapter_model (1).safetensors",
    "inbox/1/round-00000/adapter_model.safetensors.part",
    "inbox/1/round-00000 (conflicted copy 2026-11-30)/update.json",
    "inbox/1/round-00000.sync-conflict-20261130-101010-ABCDEFG/update.json",
    "inbox/2 (1)/round-00000/update.json",
    "inbox/desktop.ini",
    "clients/1 (1).json",
    "clients/.1.json.Ab12Cd",
    "clients/1.sync-conflict-20261130-101010-ABCDEFG.json",
    "clients/1.json.crdownload",
    "enrolment/00000 (1).json",
    "enrolment/00001.sync-conflict-20261130-101010-ABCDEFG.json",
    "enrolment/.syncthing.00002.json.tmp",
    "rounds/.00001.Ab12Cd",
    "rounds/00000/.manifest.json.Ab12Cd",
    "rounds/00000/adapter/.syncthing.adapter_config.json.tmp",
)


def test_what_tools_leave_behind_changes_nothing_and_is_told_once(signed: Path, run: Run) -> None:
    for name in LEFTOVERS:
        (signed / name).parent.mkdir(parents=True, exist_ok=True)
        (signed / name).write_bytes(b"")
    assert results(run, "status", "-w", signed)["answered"] == [0, 1, 2]
    merge = Federation.open(signed).server.aggregate().aggregation
    assert [entry.client for entry in merge.counted] == [0, 1, 2]
    train(signed, 1)
    found = Federation.open(signed).verify()
    assert found.violations == []
    told_of = "that nobody reads, such as other tools leave"
    told = [f"{remark.path.relative_to(signed)} {remark.problem}" for remark in found.remarks]
    assert told == [
        f"rounds/00000/.manifest.json.Ab12Cd is a name {told_of}",
        f"rounds/00000/adapter/.syncthing.adapter_config.json.tmp is a name {told_of}",
        f"inbox/2 (1) and 10 more are names {told_of}",
    ]
    (signed / "rounds/00001 (1)").mkdir()
    (signed / "rounds/00000/manifest (1).json").touch()
    assert len(Federation.open(signed).verify().violations) == 2


def test_what_is_whole_and_what_is_discarded_is_not_arriving(small: Path) -> None:
    all_take_part(small)
    head = Federation.open(small).state.head
    assert arriving(head, [0, 1, 2, 3]) == {}
    (small / "inbox/0/round-00000/update.json").write_text("{}")
    assert arriving(head, [0]) == {}  # it is whole, and no record: that is for the merge to refuse


@slow
@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")
@pytest.mark.parametrize("options", [("-a",), ("-a", "--inplace", "--bwlimit=400")])
def test_a_federation_over_rsync_in_a_loop(small_template: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    server, homes = make_signed(small_template, tmp_path / "server/W", tmp_path / "server/home"), {}
    mirrors = {client: tmp_path / f"party-{client}/W" for client in range(3)}
    stop = threading.Event()

    def copy(source: Path, target: Path, *names: str) -> None:
        for name in names:
            if (source / name).exists():
                target.mkdir(parents=True, exist_ok=True)
                subprocess.run(["rsync", *options, str(source / name), str(target)], check=False, capture_output=True)

    def mirror() -> None:
        while not stop.is_set():
            for place in mirrors.values():
                copy(server, place, "inbox", "clients", "rounds", "enrolment", "workspace.json", "fedcli.yaml")
                copy(place, server, "clients", "inbox")

    def until(done: Callable[[], bool], home: Path, *words: object) -> None:
        """Run a command, as cron would, until something is there."""
        deadline = time.monotonic() + 60
        while not done():
            found = warm()(*words, cwd=tmp_path, environment={"XDG_DATA_HOME": str(home)})
            if found.returncode not in (0, 6) or time.monotonic() > deadline:
                wrong.append(f"{words}: {found.returncode}: {found.stdout}{found.stderr}")
                return
            time.sleep(0.05)

    wrong: list[str] = []
    loop = threading.Thread(target=mirror)
    loop.start()
    try:
        for client, place in mirrors.items():
            homes[client] = tmp_path / f"party-{client}/home"
            while not (place / "fedcli.yaml").exists() or not (place / "rounds/00000/manifest.sig").exists():
                time.sleep(0.1)
            with at(homes[client]):
                own = join(place, client)
            deadline = time.monotonic() + 60
            while not (server / f"clients/{client}.sig").exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            with at(tmp_path / "server/home"):
                Federation.open(server).server.enrol(client, own)
        parties = []
        for client, place in mirrors.items():

            def work(client: int = client, place: Path = place) -> None:
                last = place / f"inbox/{client}/round-00001"
                until(last.exists, homes[client], "client", "train", "--id", client, "-w", place)

            parties.append(threading.Thread(target=work))
        for party in parties:
            party.start()
        until((server / "rounds/00002").exists, tmp_path / "server/home", "server", "aggregate", "-w", server)
        for party in parties:
            party.join()
    finally:
        stop.set()
        loop.join()
    assert wrong == []
    for number in (1, 2):
        merge = read_manifest(server, number)["aggregation"]
        assert ([entry["client"] for entry in merge["counted"]], merge["refused"]) == ([0, 1, 2], [])
    with at(tmp_path / "server/home"):
        assert Federation.open(server).verify().violations == []
    assert tree(server)
