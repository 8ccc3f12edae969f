"""Workspaces that an earlier version began go on: earlier_versions.tar.xz holds two of the last one before signatures.

Both are in the middle of round 1: round 0 was merged by that version, and its client 0 has answered round 1. `parties`
is a federation of three joined parties by scaffold, with their homes (`xdg`) and rows; `simulation` one by fedyogi,
with a score of round 1. Locks and the simulation's token caches are left out, and HERE stands for the folder.
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from protocol_client import take_part
from safetensors.numpy import load_file
from support.federation import (
    ADAPTER,
    CONTROL_DELTA,
    configure,
    read_adapter,
    read_manifest,
    read_update,
    stored_hashes,
)
from support.processes import warm
from support.warm import Place

pytestmark = pytest.mark.slow


def unpacked(kind: str, folder: Path) -> Place:
    """Unpack a workspace of the earlier version, which is this user's."""
    with tarfile.open(Path(__file__).with_name("earlier_versions.tar.xz")) as archive:
        archive.extractall(folder, filter="data")
    for path in (folder / kind).rglob("xdg/fedcli/*/*"):
        path.chmod(0o700)
        record = path / "party.json"
        record.write_text(record.read_text().replace("HERE", str(folder / kind)))
    return Place(folder / kind, warm())


def look(place: Place) -> None:
    """All that only looks at a workspace succeeds, and tells of no damage."""
    assert json.loads(place("verify", "--json").stdout)["violations"] == []
    for command in (["status"], ["status", "--json"], ["client", "status", "--id", 1]):
        place(*command)
    place("report")
    head = json.loads(place("status", "--json").stdout)["round"]
    place("export", f"export-{head}")


def test_parties_of_an_earlier_version_go_on_under_this_one(tmp_path: Path) -> None:
    place = unpacked("parties", tmp_path)
    before = stored_hashes(place.workspace)
    look(place)
    assert "missing    clients 1 and 2" in place("status").stdout
    place("client", "train", "--any")
    place("server", "aggregate")
    after = stored_hashes(place.workspace)
    assert {name: after[name] for name in before} == before  # nothing of before was touched
    following = read_manifest(place.workspace, 2)
    assert [entry["client"] for entry in following["aggregation"]["counted"]] == [0, 1, 2]
    assert not {"enrolment", "fedcli"} & following.keys()
    start, rows = read_adapter(place.workspace, 1), {0: 6, 1: 7, 2: 8}
    for name, merged in read_adapter(place.workspace, 2).items():
        sent = [rows[client] / 21 * (read_update(place.workspace, 1, client)[name] - start[name]) for client in rows]
        assert merged == pytest.approx(start[name] + sum(sent), abs=1e-7)
    old = load_file(place.workspace / "rounds/00001/control.safetensors")
    deltas = [load_file(place.workspace / f"inbox/{client}/round-00001/{CONTROL_DELTA}") for client in rows]
    for name, control in load_file(place.workspace / "rounds/00002/control.safetensors").items():
        assert control == pytest.approx(old[name] + sum(delta[name] for delta in deltas) / 3, abs=1e-5)
    look(place)
    place("client", "train", "--id", "0,1,2", "--refresh")  # c_k of the earlier version's round is found
    place("server", "aggregate")
    place.rows("rows-2.jsonl", 9)
    assert "registered anew with 9 rows, before 8" in place("client", "train", "--any", "--refresh").stderr
    place("server", "aggregate")
    assert read_manifest(place.workspace, 4)["state"] == "finished"
    look(place)


def test_signatures_stay_off_in_a_workspace_of_an_earlier_version_and_the_error_says_so(tmp_path: Path) -> None:
    place = unpacked("parties", tmp_path)
    identity = json.loads((place.workspace / "workspace.json").read_bytes())
    assert "signatures" not in identity
    for command in (
        ["server", "enrol", "--id", 1],
        ["server", "revoke", "--id", 1],
        ["keys", "rotate"],
        ["keys", "show"],
    ):
        assert "signatures are off" in place(*command, code=2).stderr
    assert "signatures are off" in place("client", "leave", "--id", 1, code=2).stderr
    configure(place.workspace, "federation.signatures=required")
    assert "sets federation.signatures to required: `fedcli init` fixed them as off" in place("status", code=3).stderr


def test_a_simulation_of_an_earlier_version_goes_on_under_this_one(tmp_path: Path) -> None:
    place = unpacked("simulation", tmp_path)
    before = stored_hashes(place.workspace)
    look(place)
    assert "\nnext " not in place("status").stdout  # fedcli.yaml's algorithm is the round's
    assert "round-00001" in place("eval", "table").stdout
    place("run")
    after = stored_hashes(place.workspace)
    changed = {name for name in before if after.get(name) != before[name]}
    assert {name for name in changed if not name.startswith("report/")} == set()
    head = read_manifest(place.workspace, 4)
    assert (head["state"], [entry["client"] for entry in head["aggregation"]["counted"]]) == ("finished", [0, 1, 2])
    assert {"round": 0, "algorithm": head["algorithm"]} in head["history"]
    assert not {"enrolment", "fedcli"} & head.keys()
    look(place)
    assert "simulation" in place("status").stdout


@pytest.mark.parametrize("rule", ["mean", "median", "multi_krum"])
def test_settings_of_this_version_take_effect_with_the_next_merge_of_a_workspace_of_an_earlier_one(
    tmp_path: Path, rule: str
) -> None:
    place = unpacked("simulation", tmp_path)
    configure(place.workspace, f"aggregation.rule={rule}", "aggregation.tolerate=0", "algorithm.name=fedavg")
    place("client", "train", "--id", 1)  # this version's, beside client 0's of the earlier one
    assert take_part(place.workspace, 2, lambda array: array + 0.01, 400)  # and one that was written from the page
    place("server", "aggregate")
    manifest = read_manifest(place.workspace, 2)
    assert [entry["client"] for entry in manifest["aggregation"]["counted"]] == [0, 1, 2]
    assert ("rule" in manifest["aggregation"]) == (rule != "mean")
    sent = [read_update(place.workspace, 1, client) for client in range(3)]
    assert all((array != read_adapter(place.workspace, 1)[name]).any() for name, array in sent[0].items())
    assert json.loads(place("verify", "--json").stdout)["violations"] == []
    assert np.isfinite(load_file(place.workspace / "rounds/00002/adapter" / ADAPTER)[min(sent[0])]).all()
