"""Rewritten histories that need no signature to be seen through; and what a client can do later, which is none."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save
from support.federation import ADAPTER, all_take_part, configure
from support.rewriting import ATTACKS
from support.rewriting import HEAD as HEAD_NUMBER

from fedcli import Federation
from fedcli.cli import main
from fedcli.workspace.records import file_entry

UPDATE = "inbox/1/round-00000"
HEAD = "rounds/00001"


@pytest.fixture(scope="module")
def merged_template(small_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation whose first round was merged without client 1's update, which lies there; tests must not change."""
    folder = Path(shutil.copytree(small_template, tmp_path_factory.mktemp("history") / "workspace"))
    all_take_part(folder)
    aside = (folder / UPDATE).rename(folder.parent / "aside")
    Federation.open(folder).server.aggregate(partial=True)
    aside.rename(folder / UPDATE)
    return folder


@pytest.fixture
def merged(merged_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, as the current folder."""
    folder = Path(shutil.copytree(merged_template, tmp_path / "workspace"))
    monkeypatch.chdir(folder)
    return folder


def edit(workspace: Path, change: Callable[[dict], object], where: str = HEAD) -> None:
    """Change a manifest; it names no checksum then, as one of an earlier version."""
    path = workspace / where / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest.pop("checksum", None)
    change(manifest)
    path.write_text(json.dumps(manifest))


def refuse(code: str, **more: object) -> Callable[[dict], object]:
    """Say that client 1 was refused, and make the sums of bytes fit."""

    def change(manifest: dict) -> None:
        aggregation = manifest["aggregation"]
        aggregation["missing"].remove(1)
        aggregation["refused"] = [{"client": 1, "code": code, "reason": "x", **more}]
        cost = manifest["cost"]
        cost["total_bytes_down"] = cost["client_bytes_down"] * 3

    return change


def verified(capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str], list[str]]:
    """Return the exit code of `verify`, and its violations and remarks."""
    capsys.readouterr()
    code = main(["verify", "--json"])
    document = json.loads(capsys.readouterr().out)
    return code, *([each["problem"] for each in document[kind]] for kind in ("violations", "remarks"))


@pytest.mark.parametrize(
    "code", ["json", "duplicate", "protocol", "workspace", "wrong_round", "wrong_base", "header", "schema", "nonfinite"]
)
def test_a_valid_update_that_is_recorded_as_refused_for_its_bytes_is_a_violation(
    merged: Path, capsys: pytest.CaptureFixture[str], code: str
) -> None:
    edit(merged, refuse(code))
    found = verified(capsys)
    assert found[0] == 7
    assert any(f"was refused ({code}), and is valid" in problem for problem in found[1])


@pytest.mark.parametrize("code", ["size", "hash", "not_regular", "symlink", "owner", "samples", "unknown_client"])
def test_an_update_that_its_client_can_have_mended_since_is_a_remark(
    merged: Path, capsys: pytest.CaptureFixture[str], code: str
) -> None:
    edit(merged, refuse(code))
    _, _, remarks = verified(capsys)
    assert [f"was refused ({code}), and is valid now" in remark for remark in remarks] == [True]


def test_another_update_than_the_one_that_was_refused_is_a_remark(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(merged, refuse("json", update="0" * 64))
    _, violations, remarks = verified(capsys)
    assert not any("refused" in problem for problem in violations)
    assert len(remarks) == 1


def test_a_valid_update_that_is_recorded_as_missing_is_a_remark(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verified(capsys) == (0, [], ["was not counted: it came late, or the round does not tell the truth of it"])


def test_a_refusal_is_recorded_with_the_hash_of_what_was_refused(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small)
    all_take_part(small)
    path = small / UPDATE / "update.json"
    record = json.loads(path.read_bytes())
    record.pop("checksum", None)
    path.write_text(json.dumps(record | {"round": 7}))
    digest = file_entry(path.read_bytes()).sha256
    Federation.open(small).server.aggregate()
    (refused,) = json.loads((small / HEAD / "manifest.json").read_bytes())["aggregation"]["refused"]
    assert (refused["code"], refused["update"]) == ("wrong_round", digest)
    assert main(["verify"]) == 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m.update(cohort=[0, 1]), "another cohort"),
        (lambda m: m.update(cohort=[0, 1, 2, 3]), "draws 4 of 3 clients"),
        (lambda m: m.update(selection={"order": [0, 1, 2], "count": 2}), "another order"),
        (lambda m: m["train"].update(seed=99), "the seed 99"),
        (lambda m: m["train"].update(learning_rate=m["train"]["learning_rate"] * 2), "learning_rate"),
        (lambda m: m["train"]["schedule"].update(rounds=9), "learning_rate"),
    ],
    ids=["fewer", "more", "another order", "seed", "rate", "schedule"],
)
def test_what_the_seed_and_the_schedule_give_cannot_be_changed_in_the_head(
    merged: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict], object], problem: str
) -> None:
    edit(merged, change)
    code, violations, _ = verified(capsys)
    assert code == 7
    assert any(problem in found for found in violations)


@pytest.fixture(scope="module")
def open_template(small_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation without signatures whose round 2 is open; tests must not change it."""
    folder = Path(shutil.copytree(small_template, tmp_path_factory.mktemp("open") / "workspace"))
    configure(folder, "federation.rounds=4")
    for _ in range(HEAD_NUMBER):
        all_take_part(folder)
        Federation.open(folder).server.aggregate()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_a_past_that_is_rewritten_with_consistent_hashes_is_named_where_files_can_tell(
    open_template: Path, tmp_path: Path, name: str
) -> None:
    """What only signatures can tell is listed there, and in docs/PROTOCOL.md."""
    workspace = Path(shutil.copytree(open_template, tmp_path / "workspace"))
    attack, problem = ATTACKS[name]
    attack(workspace)
    found = [violation.problem for violation in Federation.open(workspace).verify().violations]
    assert any(problem in each for each in found) if problem else found == [], found


def forge_head(workspace: Path) -> None:
    """Replace the last round's adapter, with its hash in the manifest."""
    head = "rounds/00002"
    path = workspace / head / "adapter" / ADAPTER
    contents = save({name: array + np.float32(1) for name, array in load_file(path).items()}, {"format": "pt"})
    path.write_bytes(contents)
    entry = file_entry(contents).model_dump()
    edit(workspace, lambda manifest: manifest["files"].update({f"adapter/{ADAPTER}": entry}), head)


def test_a_forged_head_is_found_though_the_round_before_says_that_it_was_pruned(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    all_take_part(merged)
    Federation.open(merged).server.aggregate()
    files = json.loads((merged / HEAD / "manifest.json").read_bytes())["files"]
    listed = {name: entry for name, entry in files.items() if name.endswith(".safetensors")}
    (merged / HEAD / "PRUNED.json").write_text(json.dumps({"protocol": 1, "round": 1, "files": listed}))
    assert verified(capsys)[0] == 0
    forge_head(merged)
    assert verified(capsys)[:2] == (7, ["is not what the counted updates give"])
    (merged / "inbox/1/round-00001" / ADAPTER).unlink()  # then it cannot be told, and is said
    code, _, remarks = verified(capsys)
    assert code == 0
    assert any("files of it are gone; its hash is recorded" in remark for remark in remarks)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder_for_file(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def file_for_folder(update: Path) -> None:
    shutil.rmtree(update)
    update.write_bytes(b"")


GONE = {
    "all of it": shutil.rmtree,
    "a file in its place": file_for_folder,
    "a link in its place": lambda update: link(update),
    "its record": lambda update: (update / "update.json").unlink(),
    "its adapter": lambda update: (update / ADAPTER).unlink(),
    "a FIFO as its record": lambda update: fifo(update / "update.json"),
    "a FIFO as its adapter": lambda update: fifo(update / ADAPTER),
    "a link as its record": lambda update: link(update / "update.json"),
    "a link as its adapter": lambda update: link(update / ADAPTER),
    "a folder as its record": lambda update: folder_for_file(update / "update.json"),
    "a folder as its adapter": lambda update: folder_for_file(update / ADAPTER),
}


@pytest.mark.parametrize("what", GONE)
def test_whatever_a_client_makes_of_its_counted_update_but_another_one_is_told_and_no_violation(
    merged: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    GONE[what](merged / "inbox/0/round-00000")
    code, violations, remarks = verified(capsys)
    assert (code, violations) == (0, [])
    assert any("its hash is recorded: " in remark for remark in remarks)


def test_a_party_checks_its_own_counted_update_though_the_others_inboxes_are_closed_to_it(
    merged: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("verify_merge", "updates_again"):
        monkeypatch.setattr(f"fedcli.server.{module}.is_hidden", lambda _, client: client != 2)
    assert verified(capsys)[:2] == (0, [])
    changes = ({"update": "0" * 64}, {"num_samples": 1}, {"train_loss": 0.5}, {"bytes": 1})
    for change in changes:
        edit(merged, lambda manifest, change=change: manifest["aggregation"]["counted"][-1].update(change))
        code, violations, _ = verified(capsys)
        assert code == 7
        assert any("was counted" in problem for problem in violations), change
