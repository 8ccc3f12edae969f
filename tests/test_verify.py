"""`fedcli verify` finds whatever is damaged in a finished federation; and no command but training loads torch."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save
from support.damage import LAST, edited, flipped, removed, replace_adapter, replace_file
from support.federation import ADAPTER, CONTROL_DELTA, all_take_part, answer, configure, restart, stored_hashes
from support.processes import ENVIRONMENT

from fedcli import Federation
from fedcli.cli import main
from fedcli.workspace.records import file_entry

ROUND = "rounds/00001"
UPDATE = "inbox/1/round-00000"
CONFIG = "adapter/adapter_config.json"
OPTIMIZER = "optimizer.safetensors"
CONTROL = "control.safetensors"


@pytest.fixture(scope="module")
def finished_template(small_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation that finished after two rounds; tests must not change it."""
    folder = Path(shutil.copytree(small_template, tmp_path_factory.mktemp("verify") / "workspace"))
    for _ in range(2):
        all_take_part(folder)
        Federation.open(folder).server.aggregate()
    return folder


@pytest.fixture
def finished(finished_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished federation, as the current folder."""
    folder = Path(shutil.copytree(finished_template, tmp_path / "workspace"))
    monkeypatch.chdir(folder)
    return folder


def added(name: str, workspace: Path) -> None:
    """Add a file."""
    (workspace / name).write_bytes(b"")


def linked(name: str, workspace: Path) -> None:
    """Replace a file by a symbolic link to the very same bytes."""
    moved = workspace / "moved"
    (workspace / name).rename(moved)
    (workspace / name).symlink_to(moved)


def counted_edited(edit: Callable[[list[dict]], object], workspace: Path) -> None:
    """Edit what the last round says of the updates that it counted."""
    edited(lambda manifest: edit(manifest["aggregation"]["counted"]), workspace)


def refuse_unknown(manifest: dict) -> None:
    """Say that the last client was refused, with a code that does not exist."""
    client = manifest["aggregation"]["counted"].pop()["client"]
    manifest["aggregation"]["refused"].append({"client": client, "code": "odd", "reason": "odd"})


def count_again(workspace: Path) -> None:
    """Let the last round count an update that the round before counted."""
    past = json.loads((workspace / ROUND / "manifest.json").read_bytes())["aggregation"]["counted"]
    counted_edited(lambda counted: counted[0].update(update=past[0]["update"]), workspace)


def rewritten(value: float, workspace: Path) -> None:
    """Replace the last adapter by another, and give the manifest its right size and hash."""
    path = workspace / LAST / "adapter" / ADAPTER
    arrays = load_file(path)
    name = min(arrays)
    arrays[name] = np.full_like(arrays[name], value)
    contents = save(arrays, {"format": "pt"})
    path.write_bytes(contents)
    entry = file_entry(contents).model_dump()
    edited(lambda manifest: manifest["files"].update({f"adapter/{ADAPTER}": entry}), workspace)


def config_rewritten(workspace: Path, **changes: object) -> None:
    """Change the last round's adapter_config.json, and give the manifest its right size and hash."""
    path = workspace / LAST / CONFIG
    contents = json.dumps(json.loads(path.read_bytes()) | changes).encode()
    path.write_bytes(contents)
    edited(lambda manifest: manifest["files"].update({CONFIG: file_entry(contents).model_dump()}), workspace)


def state_rewritten(name: str, workspace: Path) -> None:
    """Change the last value of a state file of the last round, and give the manifest its right hash."""
    path = workspace / LAST / name
    arrays = load_file(path)
    last = max(arrays)
    arrays[last] = arrays[last].copy()
    arrays[last].flat[-1] += 1e-3
    contents = save(arrays, {"format": "pt"})
    path.write_bytes(contents)
    edited(lambda manifest: manifest["files"].update({name: file_entry(contents).model_dump()}), workspace)


def state_forgotten(name: str, workspace: Path) -> None:
    """Remove a state file of the last round, and from the manifest's list."""
    removed(f"{LAST}/{name}", workspace)
    edited(lambda manifest: manifest["files"].pop(name), workspace)


def state_invented(name: str, workspace: Path) -> None:
    """Add a state file that no algorithm made to the last round, and to the manifest's list."""
    contents = (workspace / LAST / "adapter" / ADAPTER).read_bytes()
    (workspace / LAST / name).write_bytes(contents)
    edited(lambda manifest: manifest["files"].update({name: file_entry(contents).model_dump()}), workspace)


def control_delta_rewritten(workspace: Path) -> None:
    """Replace the control_delta of a counted update by a valid one of other values."""
    path = workspace / UPDATE / CONTROL_DELTA
    replace_file(path, lambda array: array + np.float32(1))


def update_rewritten(workspace: Path) -> None:
    """Replace a counted update by a valid one of other values."""
    path = workspace / UPDATE / ADAPTER
    replace_adapter(workspace / UPDATE, save({name: array + 1 for name, array in load_file(path).items()}))


def renamed_workspace(workspace: Path) -> None:
    """Give workspace.json another id."""
    identity = json.loads((workspace / "workspace.json").read_bytes()) | {"id": "another"}
    (workspace / "workspace.json").write_text(json.dumps(identity))


DAMAGES: list[tuple[str, str, Callable[[Path], object]]] = [
    ("a byte of an adapter", f"{ROUND}/adapter/{ADAPTER}", partial(flipped, f"{ROUND}/adapter/{ADAPTER}", -1)),
    ("a byte of a manifest", f"{ROUND}/manifest.json", partial(flipped, f"{ROUND}/manifest.json", 0)),
    ("a digit of a manifest", LAST, lambda w: (w / ROUND / "manifest.json").write_text(
        (w / ROUND / "manifest.json").read_text().replace('"max_length": 128', '"max_length": 129'))),
    ("no manifest", ROUND, partial(removed, f"{ROUND}/manifest.json")),
    ("no adapter", f"{ROUND}/adapter/{ADAPTER}", partial(removed, f"{ROUND}/adapter/{ADAPTER}")),
    ("a link as adapter", f"{ROUND}/adapter/{ADAPTER}", partial(linked, f"{ROUND}/adapter/{ADAPTER}")),
    ("no round in the middle", ROUND, partial(removed, ROUND)),
    ("no first round", "rounds/00000", partial(removed, "rounds/00000")),
    ("no rounds", "rounds", partial(removed, "rounds")),
    ("a byte of a counted update", UPDATE, partial(flipped, f"{UPDATE}/{ADAPTER}", -1)),
    ("another update", UPDATE, update_rewritten),
    ("another parent", LAST, partial(edited, lambda manifest: manifest.update(parent="0" * 64))),
    ("other tensors", LAST, partial(edited, lambda manifest: manifest["tensors"].popitem())),
    ("another model", LAST, partial(edited, lambda manifest: manifest["model"].update(fingerprint="0"))),
    ("a cohort at the end", LAST, partial(edited, lambda manifest: manifest.update(cohort=[0]))),
    ("no adapter in the list of files", LAST, partial(edited, lambda m: m["files"].pop(f"adapter/{ADAPTER}"))),
    ("another round's number", LAST, partial(edited, lambda manifest: manifest.update(round=3))),
    ("an unknown algorithm", LAST, partial(edited, lambda m: m["aggregation"].update(algorithm={"name": "odd"}))),
    ("an unknown code", LAST, partial(edited, refuse_unknown)),
    ("no aggregation", LAST, partial(edited, lambda manifest: manifest.update(aggregation=None))),
    ("a client twice", LAST, partial(counted_edited, lambda counted: counted.insert(0, counted[0]))),
    ("a client less", LAST, partial(counted_edited, lambda counted: counted.pop())),
    ("another weight", LAST, partial(counted_edited, lambda counted: counted[0].update(weight=0.5))),
    ("another norm", LAST, partial(counted_edited, lambda counted: counted[0].update(delta_norm=1.0))),
    ("another size", LAST, partial(counted_edited, lambda counted: counted[0].update(bytes=1))),
    ("another algorithm", f"{LAST}/adapter/{ADAPTER}", partial(
        edited, lambda m: m["aggregation"].update(algorithm={"name": "fedadagrad"}))),
    ("another cost", LAST, partial(edited, lambda manifest: manifest["cost"].update(total_bytes_up=1))),
    ("another history", LAST, partial(edited, lambda manifest: manifest.update(history=[]))),
    ("update_files of another algorithm", LAST, partial(
        edited, lambda manifest: manifest["update_files"].append(CONTROL_DELTA))),
    ("a merge for which nothing was sent", LAST, partial(
        edited, lambda m: m["aggregation"].update(algorithm={"name": "scaffold"}))),
    ("a state that nothing needs", f"{LAST}/{OPTIMIZER}", partial(state_invented, OPTIMIZER)),
    ("a control variate that nothing needs", f"{LAST}/{CONTROL}", partial(state_invented, CONTROL)),
    ("an update counted twice", LAST, count_again),
    ("another adapter, hashed", f"{LAST}/adapter/{ADAPTER}", partial(rewritten, 0.5)),
    ("an adapter of NaN, hashed", f"{LAST}/adapter/{ADAPTER}", partial(rewritten, np.nan)),
    ("a pattern in its config, hashed", f"{LAST}/{CONFIG}", partial(config_rewritten, target_modules="(a+)+$")),
    ("a key too many in its config, hashed", f"{LAST}/{CONFIG}", partial(config_rewritten, layer_replication=[[0, 2]])),
    ("another alpha in its config, hashed", LAST, partial(config_rewritten, lora_alpha=99)),
    ("a file too many", f"{ROUND}/notes.txt", partial(added, f"{ROUND}/notes.txt")),
    ("a foreign name", "rounds/latest", partial(added, "rounds/latest")),
    ("a second spelling", "rounds/000001", lambda w: shutil.copytree(w / ROUND, w / "rounds/000001")),
    ("a file as round", "rounds/00003", partial(added, "rounds/00003")),
    ("an empty round", "rounds/00003", lambda w: (w / "rounds/00003").mkdir()),
    ("a round after the end", "rounds/00003", lambda w: shutil.copytree(w / LAST, w / "rounds/00003")),
    ("another workspace's id", "rounds/00000", renamed_workspace),
]  # fmt: skip


def test_verify_says_what_it_checked_and_exits_0(finished, capsys):
    before = stored_hashes(finished)
    assert main(["verify"]) == 0
    assert capsys.readouterr().out == (
        "checked 3 rounds: 6 files by hash, 6 counted updates, 2 aggregates computed again, 0 baselines\nno violation\n"
    )
    assert main(["verify", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    counts = {
        "num_rounds": 3,
        "num_files": 6,
        "num_updates": 6,
        "num_recomputed": 2,
        "num_baselines": 0,
        "num_hidden": 0,
        "num_pruned": 0,
        "num_gone": 0,
        "num_relayed": 0,
        "num_signatures": 0,
        "noisy_rounds": [],
    }
    assert document == {**counts, "violations": [], "remarks": []}
    assert stored_hashes(finished) == before


def test_what_killed_processes_leave_is_no_violation(finished):
    for folder in ("rounds", "inbox", "inbox/1"):
        (finished / folder / ".tmp-0123").mkdir()
    assert main(["verify"]) == 0


def test_a_counted_update_that_its_client_deletes_is_told_and_no_violation(finished, capsys):
    deeds = [f"{UPDATE}/{ADAPTER}", f"{UPDATE}/update.json", UPDATE, "inbox/1", "inbox"]
    for name, num_gone in zip(deeds, [1, 1, 1, 2, 6], strict=True):
        removed(name, finished)
        assert main(["verify", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["num_gone"] == num_gone
        assert document["num_recomputed"] == {1: 1}.get(num_gone, 0)
        assert all("its hash is recorded" in remark["problem"] for remark in document["remarks"])
    assert main(["verify"]) == 0
    assert f"note: {finished / UPDATE}: was counted, and is gone; its hash is recorded: " in capsys.readouterr().out


def test_a_client_that_deletes_its_update_hides_no_damage_of_the_others(finished, capsys):
    removed(UPDATE, finished)
    flipped(f"inbox/0/round-00000/{ADAPTER}", -1, finished)
    assert main(["verify"]) == 7
    assert "inbox/0/round-00000: was counted, and is not valid any more: hash" in capsys.readouterr().out


@pytest.mark.parametrize(("where", "damage"), [damage[1:] for damage in DAMAGES], ids=[damage[0] for damage in DAMAGES])
def test_verify_exits_7_and_names_the_path_of_what_is_damaged(finished, capsys, where, damage):
    damage(finished)
    assert main(["verify"]) == 7
    output = capsys.readouterr()
    assert f"{finished / where}" in output.out
    assert "no violation" not in output.out
    assert "violation" in output.err


NOT_WHAT = "is not what the counted updates give"
STATE_DAMAGES: list[tuple[str, str, str, str, Callable[[Path], object]]] = [
    ("another state, hashed", "fedyogi", f"{LAST}/{OPTIMIZER}", NOT_WHAT, partial(state_rewritten, OPTIMIZER)),
    ("another m, hashed", "fedavgm", f"{LAST}/{OPTIMIZER}", NOT_WHAT, partial(state_rewritten, OPTIMIZER)),
    ("another c, hashed", "scaffold", f"{LAST}/{CONTROL}", NOT_WHAT, partial(state_rewritten, CONTROL)),
    ("a state forgotten", "fedyogi", f"{LAST}/{OPTIMIZER}", NOT_WHAT, partial(state_forgotten, OPTIMIZER)),
    ("a c forgotten", "scaffold", f"{LAST}/{CONTROL}", NOT_WHAT, partial(state_forgotten, CONTROL)),
    ("no state", "fedyogi", f"{LAST}/{OPTIMIZER}", "is missing", partial(removed, f"{LAST}/{OPTIMIZER}")),
    ("no c", "scaffold", f"{LAST}/{CONTROL}", "is missing", partial(removed, f"{LAST}/{CONTROL}")),
    ("no earlier state", "fedyogi", f"{ROUND}/{OPTIMIZER}", "is missing", partial(removed, f"{ROUND}/{OPTIMIZER}")),
    ("a byte of a state", "fedyogi", f"{ROUND}/{OPTIMIZER}", "hash", partial(flipped, f"{ROUND}/{OPTIMIZER}", -1)),
    ("a byte of c", "scaffold", f"{ROUND}/{CONTROL}", "hash", partial(flipped, f"{ROUND}/{CONTROL}", -1)),
    ("another update", "fedyogi", UPDATE, "was counted", update_rewritten),
    ("a byte of a change of c_k", "scaffold", UPDATE, "hash", partial(flipped, f"{UPDATE}/{CONTROL_DELTA}", -1)),
    ("another change of c_k", "scaffold", UPDATE, "is not the update that was counted", control_delta_rewritten),
    ("other hyperparameters", "fedyogi", LAST, NOT_WHAT, partial(
        edited, lambda m: m["aggregation"]["algorithm"].update(second_moment="delta"))),
    ("an unknown hyperparameter", "fedyogi", LAST, "does not know", partial(
        edited, lambda m: m["aggregation"]["algorithm"].update(beta3=0.5))),
]  # fmt: skip


@pytest.fixture(scope="module")
def finished_templates(small_template: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Federations of algorithms with a state that finished after two rounds; tests must not change them."""
    folder = tmp_path_factory.mktemp("states")
    templates = {}
    for algorithm in ("fedavgm", "fedyogi", "scaffold"):
        workspace = templates[algorithm] = Path(shutil.copytree(small_template, folder / algorithm))
        restart(workspace, algorithm)
        for number in range(2):
            if algorithm == "scaffold":
                assert answer(workspace, number) == [0, 1, 2]
            else:
                all_take_part(workspace)
            Federation.open(workspace).server.aggregate()
    return templates


@pytest.fixture(params=["fedavgm", "fedyogi", "scaffold"])
def finished_with_state(
    request: pytest.FixtureRequest, finished_templates: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A copy of a finished federation of an algorithm with a state, as the current folder."""
    folder = Path(shutil.copytree(finished_templates[request.param], tmp_path / "workspace"))
    monkeypatch.chdir(folder)
    return folder


def test_verify_computes_the_states_again(finished_with_state, capsys):
    assert main(["verify"]) == 0
    assert capsys.readouterr().out == (
        "checked 3 rounds: 8 files by hash, 6 counted updates, 2 aggregates computed again, 0 baselines\nno violation\n"
    )


@pytest.mark.parametrize(
    ("finished_with_state", "where", "says", "damage"),
    [damage[1:] for damage in STATE_DAMAGES],
    ids=[damage[0] for damage in STATE_DAMAGES],
    indirect=["finished_with_state"],
)
def test_verify_exits_7_and_names_the_state_that_is_damaged(finished_with_state, capsys, where, says, damage):
    damage(finished_with_state)
    assert main(["verify", "--json"]) == 7
    violations = json.loads(capsys.readouterr().out)["violations"]
    at_place = [each["problem"] for each in violations if each["path"].startswith(str(finished_with_state / where))]
    assert any(says in problem for problem in at_place), violations


def test_rounds_of_a_version_that_counted_no_bytes_are_no_violation(finished):
    """Some keys, such as `cost`, `history`, `checksum` and a counted update's `bytes`, came later than the protocol."""

    def strip(manifest: dict) -> None:
        del manifest["cost"], manifest["history"], manifest["checksum"]
        for entry in manifest["aggregation"]["counted"]:
            del entry["bytes"]

    edited(strip, finished)
    assert main(["verify"]) == 0


def test_the_json_document_lists_the_violations(finished, capsys):
    added(f"{ROUND}/notes.txt", finished)
    flipped(f"{UPDATE}/{ADAPTER}", -1, finished)
    assert main(["verify", "--json"]) == 7
    violations = json.loads(capsys.readouterr().out)["violations"]
    assert [(violation.keys(), violation["path"]) for violation in violations] == [
        ({"path", "problem"}, f"{finished / ROUND / 'notes.txt'}"),
        ({"path", "problem"}, f"{finished / UPDATE}"),
    ]


LIGHT = """
import sys
from fedcli.cli import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "peft", "trl", "datasets", "lm_eval", "accelerate"} & set(sys.modules)
sys.exit(f"loaded {heavy}" if heavy else code)
"""


def light(*arguments: str, cwd: Path) -> str:
    """Run a command in a process that fails where anything heavy is loaded; return its output."""
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *arguments], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", [["server", "aggregate"], ["server", "run"]])
def test_merging_loads_no_torch(small, command):
    configure(small, "federation.rounds=1")
    all_take_part(small)
    light(*command, cwd=small)
    assert sorted(os.listdir(small / "rounds")) == ["00000", "00001"]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["status"], "round      2 of 2, finished\n"),
        (["verify"], "no violation\n"),
        (["client", "status", "--id", "1"], "client 1: nothing to do, the federation has finished at round 2\n"),
        (["client", "train", "--id", "1"], "client 1: nothing to do, the federation has finished at round 2\n"),
        (["server", "aggregate"], "nothing to do: the federation has finished at round 2\n"),
        (["server", "discard", "--id", "1"], "client 1: has no update that may still count\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "says",
)
def test_looking_loads_no_torch(finished, command, says):
    assert says in light(*command, cwd=finished)


def test_a_client_that_has_answered_loads_no_torch(small):
    all_take_part(small)
    said = light("client", "train", "--id", "2", cwd=small)
    assert said == "client 2: nothing to do, its update of round 0 has been sent\n"
