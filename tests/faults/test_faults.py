"""Faults of disks and machines, one by one: what is changed on a disk, half copied, killed, or at another time."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import faults
from support.faults import Fault
from support.federation import ADAPTER, CONTROL_DELTA, all_take_part, answer, configure, read_manifest, restart
from support.scores import ACCURACY, keep

from fedcli import Federation
from fedcli.errors import IntegrityError, NotReadyError
from fedcli.workspace import publish
from fedcli.workspace.layout import Workspace
from fedcli.workspace.store import DirectoryStore

DAY = 86400


def violations(root: Path) -> list[str]:
    return [f"{violation.path}: {violation.problem}" for violation in Federation(Workspace(root)).verify().violations]


def retyped(path: Path, pattern: str, replacement: str) -> None:
    """Change a text file as a disk would: nothing else of it."""
    text = path.read_text()
    changed = re.sub(pattern, replacement, text, count=1)
    assert changed != text
    path.write_text(changed)


CHANGES = {
    "learning rate": (r'("learning_rate": 0\.0*)\d', r"\g<1>9"),
    "a key": ['"surplus"', '"Burplus"'],
    "steps": (r'"steps": \d', '"steps": 7'),
    "seed": (r'"seed": \d', '"seed": 4'),
    "decay": (r'"weight_decay": 0.0', '"weight_decay": 0.5'),
    "cohort": (r'"missing": \[\]', '"missing":[ ]'),
}


@pytest.mark.parametrize("change", ["learning rate", "a key", "steps", "seed", "decay"])
def test_a_change_of_the_head_manifest_is_a_violation_and_no_client_trains_on_it(small, change):
    all_take_part(small)
    Federation.open(small).server.aggregate()
    assert violations(small) == []
    path = small / "rounds/00001/manifest.json"
    retyped(path, *CHANGES[change])
    damage = f"{path.parent}: {path} is damaged: its contents do not have the checksum that it names"
    seed = [f"{path.parent}: trains with the seed 4, the federation's is 0"] if change == "seed" else []
    assert sorted(violations(small)) == sorted([damage, *seed])
    with pytest.raises(IntegrityError, match="checksum"):
        Federation.open(small).round(1).check_unchanged()


def test_a_manifest_without_a_checksum_has_the_learning_rate_of_its_schedule(small):
    path = small / "rounds/00000/manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["checksum"]
    path.write_text(json.dumps(manifest))
    assert violations(small) == []
    manifest["train"]["learning_rate"] *= 30
    path.write_text(json.dumps(manifest))
    assert "its schedule gives" in violations(small)[0]


@pytest.mark.slow
def test_training_stops_at_a_manifest_that_its_disk_has_changed(small):
    retyped(small / "rounds/00000/manifest.json", *CHANGES["learning rate"])
    done = faults.run(["client", "train", "--id", 0], small)
    assert done.code == 7
    assert "manifest.json is damaged" in done.err
    assert not (small / "inbox/0/round-00000").exists()


@pytest.mark.parametrize("place", [-1, -40, 300])
def test_a_flipped_byte_of_what_a_client_keeps_is_a_violation(small, place):
    from support.federation import train_as

    restart(small, "scaffold")
    for client in range(3):
        train_as(client, small)
    Federation.open(small).server.aggregate()
    assert violations(small) == []
    (path,) = (small / "private/1/control").glob("round-*")
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert len(found := violations(small)) == 1
    assert str(path) in found[0]
    path.unlink()
    if not list(path.parent.iterdir()):
        path.parent.rmdir()


DIGITS = re.compile(rb"\d")


def test_a_flipped_digit_of_scores_or_of_their_items_is_noticed_by_table_report_and_verify(small):
    workspace = Workspace(small)
    keep(workspace, "round-00000", "fpb", {ACCURACY: [1.0, 0.0, 1.0, 1.0]})
    keep(workspace, "base", "fpb", {ACCURACY: [0.0, 0.0, 1.0, 1.0]})
    federation = Federation(workspace)
    assert federation.scores().cells
    path = workspace.scores("round-00000", "fpb")
    whole = path.read_bytes()
    for found in list(DIGITS.finditer(whole))[::3]:
        flipped = bytearray(whole)
        flipped[found.start()] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(IntegrityError):
            federation.scores()
        with pytest.raises(IntegrityError):
            federation.report(output=small / "report")
        assert str(path) in violations(small)[0]
    path.write_bytes(whole)
    items = path.with_suffix(".jsonl")
    items.write_bytes(items.read_bytes().replace(b"1.0", b"0.0", 1))
    with pytest.raises(IntegrityError, match="the hash differs"):
        federation.scores()
    assert "the hash differs" in violations(small)[0]


PARTS = {
    "no adapter": lambda folder: (folder / ADAPTER).unlink(),
    "no record": lambda folder: (folder / "update.json").unlink(),
    "nothing": lambda folder: [path.unlink() for path in folder.iterdir()],
    "rsync's name": lambda folder: (folder / ADAPTER).rename(folder / f".{ADAPTER}.a1B2c3"),
    "rsync's name beside a part": lambda folder: (
        shutil.copy(folder / ADAPTER, folder / f".{ADAPTER}.a1B2c3"),
        os.truncate(folder / ADAPTER, 500),
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_an_update_that_is_half_copied_is_waited_for_and_then_counted(small, tmp_path, part):
    all_take_part(small)
    update = small / "inbox/1/round-00000"
    whole = Path(shutil.copytree(update, tmp_path / "whole"))
    PARTS[part](update)
    federation = Federation.open(small)
    with pytest.raises(NotReadyError, match=r"arriving, with files still to come: 1|waits for 1 more"):
        federation.server.aggregate()
    shutil.rmtree(update)
    shutil.copytree(whole, update)
    federation.server.aggregate()
    assert [entry["client"] for entry in read_manifest(small, 1)["aggregation"]["counted"]] == [0, 1, 2]


def test_status_names_who_is_arriving_and_the_quorum_goes_on_without_them(small, monkeypatch, capsys):
    from fedcli.cli import main

    all_take_part(small)
    (small / "inbox/1/round-00000" / ADAPTER).unlink()
    monkeypatch.chdir(small)
    assert main(["status"]) == 0
    said = capsys.readouterr().out
    assert "answered   clients 0 and 2\n" in said
    assert "arriving   client 1: not all files are there yet" in said
    configure(small, "federation.quorum=0.6")
    assert main(["server", "aggregate"]) == 0
    aggregation = read_manifest(small, 1)["aggregation"]
    assert (aggregation["missing"], aggregation["refused"]) == ([1], [])


def test_of_a_scaffold_update_one_of_two_files_is_not_enough(small):
    restart(small, "scaffold")
    answer(small, 0)
    (small / "inbox/2/round-00000" / CONTROL_DELTA).unlink()
    with pytest.raises(NotReadyError, match="arriving, with files still to come: 2"):
        Federation.open(small).server.aggregate()


GROWING = """
import sys, time
source, target = sys.argv[1:]
data = open(source, "rb").read()
with open(target, "wb") as file:
    for at in range(0, len(data), 64):
        file.write(data[at : at + 64]); file.flush(); time.sleep(0.02)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [ADAPTER, "update.json"])
def test_a_file_that_grows_is_waited_for_and_one_that_stays_short_until_the_operator_refuses_it(small, tmp_path, name):
    all_take_part(small)
    path = small / "inbox/1/round-00000" / name
    whole = Path(shutil.copy(path, tmp_path / "whole"))
    path.write_bytes(whole.read_bytes()[:10])
    copying = subprocess.Popen([sys.executable, "-c", GROWING, whole, path])
    time.sleep(0.1)
    with pytest.raises(NotReadyError):
        Federation.open(small).server.aggregate()
    copying.wait()
    Federation.open(small).server.aggregate(dry_run=True)
    os.truncate(path, 50)
    with pytest.raises(NotReadyError):
        Federation.open(small).server.aggregate()
    Federation.open(small).server.aggregate(refuse_arriving=True)
    refused = read_manifest(small, 1)["aggregation"]["refused"]
    assert [(entry["client"], entry["code"]) for entry in refused] == [(1, "size" if name == ADAPTER else "json")]


def test_a_whole_file_with_another_hash_is_refused_at_once(small):
    all_take_part(small)
    path = small / "inbox/1/round-00000" / ADAPTER
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    Federation.open(small).server.aggregate()
    assert read_manifest(small, 1)["aggregation"]["refused"][0]["code"] == "hash"


def test_a_temporary_of_a_dead_process_goes_with_the_next_write_and_one_of_a_living_stays(tmp_path):
    dead = [publish.temporary_in(tmp_path) for _ in range(2)]
    dead[0].mkdir()
    (dead[0] / "half").touch()
    dead[1].touch()
    other_host = tmp_path / f".tmp-{'0' * 12}f{'1' * 19}"
    earlier_version = tmp_path / f".tmp-{'0' * 12}4{'1' * 19}"
    other_host.touch()
    earlier_version.touch()
    with publish.temporary_folder(tmp_path) as living:
        publish.publish_file(tmp_path / "file", b"contents")
        assert {path.name for path in tmp_path.iterdir()} == {
            "file", living.name, other_host.name, earlier_version.name,
        }  # fmt: skip
    for old in (other_host, earlier_version):
        os.utime(old, (time.time() - DAY - 1,) * 2)
    publish.publish_file(tmp_path / "file", b"contents")
    assert os.listdir(tmp_path) == ["file"]


def test_gc_removes_what_killed_processes_left_without_a_retention(small):
    left = [publish.temporary_in(small / folder) for folder in ("", "clients", "rounds")]
    (small / "eval/base").mkdir(parents=True)
    left.append(publish.temporary_in(small / "eval/base"))
    for path in left:
        path.mkdir()
    assert Federation(Workspace(small)).gc(dry_run=True) is None
    assert all(path.exists() for path in left)
    Federation(Workspace(small)).gc()
    assert not any(path.exists() for path in left)


COMMANDS = {
    "report": ["report"],
    "export": ["export", "out"],
    "export --merge": ["export", "out", "--merge"],
    "eval": ["eval", "run", "demo", "--limit", 2, "--base"],
    "train-alone": ["train-alone", "--id", 0],
    "data preview": ["data", "preview"],
    "slurm script": ["slurm", "script"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_what_kill_9_leaves_of_a_command_goes_when_it_runs_again_and_with_gc(small, name):
    arguments = COMMANDS[name]
    template = Path(shutil.copytree(small, small.parent / "template"))
    calls = faults.run(arguments, small).calls
    renames = [number for number, call in enumerate(calls, 1) if call[0] == "rename"]
    assert renames
    for cure in (arguments, ["gc"]):
        for position in {renames[0], renames[-1]}:
            faults.copied(template, small)
            done = faults.run(arguments, small, Fault(position, mode=faults.KILL_BEFORE))
            assert done.code == -signal.SIGKILL
            assert list(small.rglob(".tmp-*"))
            assert faults.run(cure, small).code == 0
            assert not list(small.rglob(".tmp-*")), (cure, position)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [faults.BEFORE, faults.AFTER])
def test_an_export_whose_rename_or_fsync_is_reported_as_failed_is_done_or_can_be_run_again(small, mode):
    template = Path(shutil.copytree(small, small.parent / "template"))
    calls = faults.run(["export", "out"], small).calls
    last = max(number for number, call in enumerate(calls, 1) if call[0] == "rename")
    for position in (last, last + 1, last + 2):  # the rename, then the parent's opening and its fsync
        faults.copied(template, small)
        done = faults.run(["export", "out"], small, Fault(position, errno.EIO, mode))
        if done.code != 0:
            assert done.code == 4
            assert faults.run(["export", "out"], small).code == 0
        else:
            assert (mode, position) == (faults.AFTER, last)
        assert sorted(os.listdir(small / "out")) == ["README.md", "adapter_config.json", ADAPTER]
        assert not list(small.glob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["ten days ahead", "ten days behind", "before 1970"])
def test_a_clock_that_is_wrong_at_opening_stops_nothing_and_is_told(small, wrong):
    ahead = {"ten days ahead": 10 * DAY, "ten days behind": -10 * DAY}.get(wrong, -int(time.time()) - 5 * DAY)
    shutil.rmtree(small / "rounds")
    configure(small, "federation.deadline=1h")
    fault = Fault(clock=ahead)
    assert faults.run(["server", "open"], small, fault).code == 0
    for arguments in (["status"], ["client", "train", "--id", 0], ["report"], ["verify"]):
        done = faults.run(arguments, small, fault)
        assert (done.code, "Traceback" in done.err) == (0, False), done.err
    doctor = faults.run(["doctor", "--json"], small, fault)
    (clock,) = [finding for finding in json.loads(doctor.out)["findings"] if finding["name"] == "clock"]
    assert (clock["state"], "the file system's" in clock["detail"]) == ("warning", True)
    if ahead > 0 or read_manifest(small, 0)["opened"] == 0:
        assert "\nclock      " in faults.run(["status"], small).out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["EIO", "ESTALE", "ETIMEDOUT", "EACCES", "ENOTCONN"])
def test_a_disk_that_fails_where_the_workspace_is_looked_for_is_exit_4(small, kind):
    done = faults.run(["status", "-w", small], small, Fault(1, getattr(errno, kind), sticky=True))
    assert done.code == 4, done.err
    assert str(small) in done.err
    assert "Traceback" not in done.err


def test_of_a_lower_layer_of_an_overlay_temporaries_are_swept(tmp_path, monkeypatch):
    """As overlayfs has it: no directory of a lower layer is renamed."""
    left = publish.temporary_in(tmp_path)
    (left / "deep").mkdir(parents=True)
    rename = os.rename

    def refusing(source, target):
        if Path(source).is_dir():
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refusing)
    DirectoryStore(tmp_path).sweep("")
    assert not left.exists()
