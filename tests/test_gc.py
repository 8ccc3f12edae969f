"""`fedcli gc` removes what nothing refers to; `verify` accepts that, and finds all else that is gone or changed."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from protocol_client import take_part
from support.damage import flipped, removed
from support.federation import ADAPTER, all_take_part, configure, restart, stored_hashes
from support.kills import copies_killed_at_every_call
from support.scores import ACCURACY, LOSS, keep

from fedcli import Federation
from fedcli.cli import main
from fedcli.errors import WorkspaceError
from fedcli.scoring.targets import Targets, find_targets
from fedcli.workspace.history import read_round
from fedcli.workspace.layout import Workspace
from fedcli.workspace.locks import hold

OPTIMIZER = "optimizer.safetensors"


def history(small_template: Path, folder: Path, rounds: int) -> Path:
    """Make a workspace of FedYogi with so many rounds behind it, and an update of the open one."""
    workspace = Path(shutil.copytree(small_template, folder / "workspace"))
    configure(workspace, f"federation.rounds={rounds + 1}")
    restart(workspace, "fedyogi")
    for _ in range(rounds):
        all_take_part(workspace)
        Federation.open(workspace).server.aggregate()
    take_part(workspace, 0)
    return workspace


@pytest.fixture(scope="module")
def long_template(small_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose round 8 is open; tests must not change it."""
    return history(small_template, tmp_path_factory.mktemp("long"), 8)


@pytest.fixture(scope="module")
def short_template(small_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose round 3 is open and whose rounds 1 and 2 may go; tests must not change it."""
    workspace = history(small_template, tmp_path_factory.mktemp("short"), 3)
    configure(workspace, "retention.keep_last=1")
    return workspace


@pytest.fixture
def long(long_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workspace whose round 8 is open, as the current folder."""
    folder = Path(shutil.copytree(long_template, tmp_path / "workspace"))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def pruned(short_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workspace whose round 3 is open, without rounds 1 and 2's weights, as the current folder."""
    folder = Path(shutil.copytree(short_template, tmp_path / "workspace"))
    monkeypatch.chdir(folder)
    Federation.open(folder).gc()
    return folder


def sizes(workspace: Path) -> dict[str, int]:
    """Return the size of every file but locks."""
    files = (path for path in workspace.rglob("*") if path.is_file() and not path.name.endswith("lock"))
    return {str(path.relative_to(workspace)): path.stat().st_size for path in files}


def of_round(number: int, *, names: tuple[str, ...] = (f"adapter/{ADAPTER}", OPTIMIZER)) -> set[str]:
    """Return what goes with a round: its arrays, and those of its three updates."""
    return {f"rounds/{number:05d}/{name}" for name in names} | {
        f"inbox/{client}/round-{number:05d}/{ADAPTER}" for client in range(3)
    }


def test_without_retention_nothing_is_removed_and_it_says_what_to_set(long, capsys):
    before = stored_hashes(long)
    assert main(["gc"]) == 0
    output = capsys.readouterr()
    assert output.out == "nothing removed: fedcli.yaml says of no round that it may go\n"
    assert "retention.keep_last" in output.err
    assert main(["gc", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"status": "no_retention"}
    assert stored_hashes(long) == before


def test_what_goes_are_the_weights_of_old_rounds_and_of_their_updates_and_nothing_else(long, capsys):
    configure(long, "retention.keep_last=2", "retention.keep_every=4")
    before = sizes(long)
    assert main(["gc", "--dry-run", "--json"]) == 0
    foreseen = json.loads(capsys.readouterr().out)
    assert sizes(long) == before
    assert main(["gc", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == foreseen | {"is_dry_run": False}
    after = sizes(long)
    gone = set().union(*map(of_round, (1, 2, 3, 5, 6)))
    assert before.keys() - after.keys() == gone
    assert after.keys() - before.keys() == {f"rounds/{number:05d}/PRUNED.json" for number in (1, 2, 3, 5, 6)}
    assert document["rounds"] == [1, 2, 3, 5, 6]
    assert document["num_files"] == len(gone) == 25
    assert document["num_bytes"] == sum(before[name] for name in gone)
    kept = {"0": "the start", "4": "kept by keep_every", "7": "kept by keep_last", "8": "the latest"}
    assert document["kept"] == kept
    record = json.loads((long / "rounds/00003/PRUNED.json").read_bytes())
    manifest = json.loads((long / "rounds/00003/manifest.json").read_bytes())
    names = (f"adapter/{ADAPTER}", OPTIMIZER)
    assert record == {"protocol": 1, "round": 3, "files": {name: manifest["files"][name] for name in names}}
    assert main(["gc"]) == 0
    assert capsys.readouterr().out.startswith("removed: 0 files of 0 rounds, 0 bytes\n")
    assert sizes(long) == after


def test_verify_accepts_it_and_says_how_much_it_could_not_compute_again(long, capsys):
    configure(long, "retention.keep_last=2", "retention.keep_every=4")
    assert main(["gc"]) == 0
    capsys.readouterr()
    assert main(["verify"]) == 0
    output = capsys.readouterr().out
    assert "9 counted updates, 3 aggregates computed again" in output  # of rounds 0, 4 and 7
    assert "5 aggregates not computed again: `fedcli gc` has removed what they were made of\n" in output


def test_a_federation_goes_on_after_it_as_it_would_have_without(long, tmp_path):
    other = Path(shutil.copytree(long, tmp_path / "other"))
    configure(long, "retention.keep_last=1")
    Federation.open(long).gc()
    configure(other, "retention.keep_last=1")
    for workspace in (long, other):
        all_take_part(workspace)
        assert Federation.open(workspace).server.aggregate().state == "finished"
    assert stored_hashes(long / "rounds/00009") == stored_hashes(other / "rounds/00009")
    assert Federation(Workspace(long)).verify().violations == []


def test_the_best_rounds_and_those_whose_scores_are_not_finished_stay_whole(long):
    workspace = Workspace(long)
    configure(long, "retention.keep_last=1")
    for number in range(1, 8):
        keep(workspace, f"round-{number:05d}", "fpb", {ACCURACY: [number == 3, 0, 0, 1]})
        keep(workspace, f"round-{number:05d}", "task", {LOSS: [1.0 + abs(number - 5)]})
    keep(workspace, "round-00001", "vicuna", {}, awaits="judge")
    (workspace.eval / "round-00002/mmlu.answers.jsonl").write_text("{}\n")  # and no scores: it was interrupted
    with hold(workspace.eval_lock("round-00006", "fpb"), "a test"):
        result = Federation(workspace).gc()
    assert result.kept == {
        0: "the start",
        1: "its scores are not finished",
        2: "its scores are not finished",
        3: f"the best in fpb.{ACCURACY.name}",
        5: "the best in task.loss",
        6: "its scores are not finished",
        8: "the latest",
    }
    assert result.rounds == [4, 7]
    assert Federation(workspace).gc().rounds == [6]


def test_updates_that_were_not_counted_go_whole(long):
    discarded = long / "inbox/2/.discarded-round-00003-0123abcd"
    late = long / "inbox/1/round-00004"
    shutil.copytree(long / "inbox/2/round-00003", discarded)
    manifest = json.loads((long / "rounds/00005/manifest.json").read_bytes())
    aggregation = manifest["aggregation"]
    aggregation["missing"] = [aggregation["counted"].pop(1)["client"]]
    (long / "rounds/00005/manifest.json").write_text(json.dumps(manifest))
    outside = long / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    (late / "link").symlink_to(outside)
    configure(long, "retention.keep_last=4")
    Federation.open(long).gc()
    assert not discarded.exists()
    assert not late.exists()
    assert (outside / "precious").exists()
    assert (long / "inbox/0/round-00004/update.json").exists()


def test_the_open_rounds_updates_stay_whatever_they_are(long):
    shutil.copytree(long / "inbox/0/round-00008", long / "inbox/0/.discarded-round-00008-0123abcd")
    configure(long, "retention.keep_last=1")
    before = stored_hashes(long / "rounds/00008")
    open_round = {name for name in sizes(long) if "round-00008" in name}
    Federation.open(long).gc()
    assert {name for name in sizes(long) if "round-00008" in name} == open_round
    assert len(open_round) == 4
    assert stored_hashes(long / "rounds/00008") == before


def test_whoever_needs_what_was_removed_is_told_so(pruned, capsys):
    current = read_round(Workspace(pruned), 1)
    with pytest.raises(WorkspaceError, match=r"round 1's adapter/adapter_model.safetensors was removed by `fedcli gc`"):
        current.adapter()
    (target,) = find_targets(Federation.open(pruned).state, Targets(rounds=("2",)))
    with pytest.raises(WorkspaceError, match=r"round 2's .* was removed by `fedcli gc`"):
        target.arrays()
    with pytest.raises(WorkspaceError, match="client 1's update of round 2 was removed by `fedcli gc`"):
        find_targets(Federation.open(pruned).state, Targets(clients=(1,)))
    (target,) = find_targets(Federation.open(pruned).state, Targets(clients=(0,)))
    assert target.name == "client-0-round-00003"


def listed(edit: Callable[[dict], object], workspace: Path) -> None:
    """Change what round 1's PRUNED.json lists."""
    path = workspace / "rounds/00001/PRUNED.json"
    record = json.loads(path.read_bytes())
    edit(record["files"])
    path.write_text(json.dumps(record))


def copied(number: int, workspace: Path) -> None:
    """Let a round that others need say that its weights were removed, and remove them."""
    folder = workspace / "rounds" / f"{number:05d}"
    record = json.loads((workspace / "rounds/00001/PRUNED.json").read_bytes()) | {"round": number}
    (folder / "PRUNED.json").write_text(json.dumps(record))
    (folder / "adapter" / ADAPTER).unlink()


DAMAGES: list[tuple[str, str, str, Callable[[Path], object]]] = [
    ("no PRUNED.json", f"rounds/00001/adapter/{ADAPTER}", "is missing", partial(removed, "rounds/00001/PRUNED.json")),
    ("a torn PRUNED.json", "rounds/00001/PRUNED.json", "damaged",
     lambda w: os.truncate(w / "rounds/00001/PRUNED.json", 20)),
    ("a state that is not listed", f"rounds/00001/{OPTIMIZER}", "is missing",
     partial(listed, lambda files: files.pop(OPTIMIZER))),
    ("another hash", "rounds/00001/PRUNED.json", "lists other files than the manifest",
     partial(listed, lambda files: files[OPTIMIZER].update(sha256="0" * 64))),
    ("a file that must stay", "rounds/00001/PRUNED.json", "removes what may not be removed",
     partial(listed, lambda files: files.update({"adapter/adapter_config.json": {"sha256": "0" * 64, "bytes": 1}}))),
    ("a file beside it", "rounds/00001/adapter/adapter_config.json", "hash",
     partial(flipped, "rounds/00001/adapter/adapter_config.json", 0)),
    ("the start", "rounds/00000/PRUNED.json", "removes what may not be removed", partial(copied, 0)),
    ("the latest", "rounds/00003/PRUNED.json", "removes what may not be removed", partial(copied, 3)),
    ("an update.json", "inbox/1/round-00001", "is not the update that was counted",
     lambda w: (w / "inbox/1/round-00001/update.json").write_text("{}")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("where", "what", "damage"), [damage[1:] for damage in DAMAGES], ids=[damage[0] for damage in DAMAGES]
)
def test_verify_finds_what_is_not_as_gc_left_it(pruned, capsys, where, what, damage):
    assert main(["verify"]) == 0
    capsys.readouterr()
    damage(pruned)
    assert main(["verify"]) == 7
    assert any(str(pruned / where) in line and what in line for line in capsys.readouterr().out.splitlines())


def test_gc_removes_nothing_beside_a_record_that_is_damaged(pruned, capsys):
    (pruned / "rounds/00002" / OPTIMIZER).touch()
    os.truncate(pruned / "rounds/00002/PRUNED.json", 20)
    assert main(["gc"]) == 7
    assert "PRUNED.json is damaged" in capsys.readouterr().err
    assert (pruned / "rounds/00002" / OPTIMIZER).exists()


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_gc_killed_at_any_system_call_leaves_a_sound_workspace_and_the_next_goes_on(short_template, tmp_path, after):
    undisturbed = Path(shutil.copytree(short_template, tmp_path / "undisturbed"))
    Federation.open(undisturbed).gc()
    points = halves = 0
    for workspace in copies_killed_at_every_call(short_template, lambda found: Federation.open(found).gc(), after):
        points += 1
        assert Federation(Workspace(workspace)).verify().violations == []
        halves += 0 < len(list(workspace.glob("inbox/*/round-00002/*.safetensors"))) < 3
        Federation.open(workspace).gc()
        assert stored_hashes(workspace) == stored_hashes(undisturbed)
    assert points > 20
    assert halves >= 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
def test_what_belongs_to_another_user_is_left_and_counted(pruned, capsys):
    theirs = pruned / "inbox/1"
    (theirs / "round-00001" / ADAPTER).touch()
    for path in (theirs, *theirs.rglob("*")):
        os.chown(path, 12345, -1)
    assert main(["gc"]) == 0
    assert "1 update is left, which belongs to other users\n" in capsys.readouterr().out
    assert (theirs / "round-00001" / ADAPTER).exists()


@pytest.mark.parametrize(
    ("settings", "what"),
    [("{keep_every: 5}", "keep_every is set, and keep_last is not"), ("{keep_last: 0}", "retention.keep_last")],
)
def test_a_retention_that_cannot_be_meant_exits_3(long, capsys, settings, what):
    with (long / "fedcli.yaml").open("a") as file:
        file.write(f"retention: {settings}\n")
    assert main(["gc"]) == 3
    assert what in capsys.readouterr().err
