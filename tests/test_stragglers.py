"""Clients that are slow: more are drawn than count, deadlines by the server's clock, updates that come too late."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from protocol_client import take_part
from support.damage import edited, tear
from support.federation import (
    NUM_SAMPLES,
    all_take_part,
    configure,
    noisy,
    own,
    read_adapter,
    read_manifest,
    read_update,
    stored_hashes,
    train_as,
)
from support.federation import restart as reopen
from support.processes import run_ok

from fedcli import Federation
from fedcli.cli import main
from fedcli.config import FederationConfig
from fedcli.workspace.layout import Workspace


@pytest.fixture
def selecting(small: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace whose round 0 has drawn three clients, of which two count, as the current folder."""
    configure(small, "federation.per_round=2", "federation.select=3", "federation.rounds=4")
    reopen(small, "fedavg")
    monkeypatch.chdir(small)
    return small


def order_of(workspace: Path, number: int = 0) -> list[int]:
    return read_manifest(workspace, number)["selection"]["order"]


def accounts(workspace: Path, number: int = 1) -> dict[str, list[int]]:
    """Return how the round before was accounted for: clients by kind, where there are any."""
    aggregation = read_manifest(workspace, number)["aggregation"]
    ids = {"counted": [entry["client"] for entry in aggregation["counted"]]}
    ids["refused"] = [entry["client"] for entry in aggregation["refused"]]
    return {kind: found for kind, found in (ids | {k: aggregation[k] for k in ("missing", "surplus")}).items() if found}


def test_a_manifest_says_who_was_drawn_in_which_order_and_how_many_count(selecting):
    manifest = read_manifest(selecting, 0)
    assert (manifest["cohort"], manifest["selection"]["count"]) == ([0, 1, 2], 2)
    assert sorted(manifest["selection"]["order"]) == [0, 1, 2]
    assert manifest["opened"] is None
    orders = set()
    for number in range(1, 4):
        for client in range(3):
            take_part(selecting, client)
        Federation.open(selecting).server.aggregate()
        orders.add(tuple(order_of(selecting, number)))
    assert len(orders) > 1


def test_run_trains_the_first_in_draw_order_and_no_more_than_count(selecting):
    first, second, last = order_of(selecting)
    run_ok("run", "--rounds", 1, cwd=selecting)
    assert accounts(selecting) == {"counted": sorted([first, second]), "missing": [last]}
    assert [folder.name for folder in sorted((selecting / "inbox").iterdir())] == sorted(map(str, (first, second)))


def test_run_trains_no_more_than_are_missing_where_others_have_answered(selecting):
    first, second, last = order_of(selecting)
    take_part(selecting, last)
    run_ok("run", "--rounds", 1, cwd=selecting)
    assert accounts(selecting) == {"counted": sorted([first, last]), "missing": [second]}


def test_the_first_in_draw_order_count_and_not_those_who_came_first(selecting, capsys):
    first, second, last = order_of(selecting)
    for client in (last, second, first):
        take_part(selecting, client, noisy(client), NUM_SAMPLES[client])
    assert main(["server", "aggregate"]) == 0
    assert f"not needed: {last}\n" in capsys.readouterr().out
    assert accounts(selecting) == {"counted": sorted([first, second]), "surplus": [last]}
    before, total = read_adapter(selecting, 0), NUM_SAMPLES[first] + NUM_SAMPLES[second]
    for name, array in read_adapter(selecting, 1).items():
        parts = [NUM_SAMPLES[client] * (read_update(selecting, 0, client)[name] - before[name])
                 for client in (first, second)]  # fmt: skip
        np.testing.assert_array_equal(array, (before[name] + (parts[0] + parts[1]) / total).astype(np.float32))
    assert main(["status"]) == 0
    assert f"updates of client {last} in round 0: they were not needed" in capsys.readouterr().out
    down = read_manifest(selecting, 0)["cost"]["client_bytes_down"]
    assert read_manifest(selecting, 1)["cost"]["total_bytes_down"] == 3 * down  # who was not needed has read it, too
    assert Federation(Workspace(selecting)).verify().violations == []


def test_the_next_takes_the_place_of_one_who_is_missing_or_refused(selecting):
    first, second, last = order_of(selecting)
    take_part(selecting, second)
    take_part(selecting, last)
    Federation.open(selecting).server.aggregate()
    assert accounts(selecting) == {"counted": sorted([second, last]), "missing": [first]}
    first, second, last = order_of(selecting, 1)
    for client in range(3):
        take_part(selecting, client)
    os.truncate(selecting / f"inbox/{second}/round-00001/adapter_model.safetensors", 100)
    Federation.open(selecting).server.aggregate(refuse_arriving=True)
    assert accounts(selecting, 2) == {"counted": sorted([first, last]), "refused": [second]}
    assert Federation(Workspace(selecting)).verify().violations == []


def test_the_quorum_is_of_those_who_count(selecting, capsys):
    take_part(selecting, 1)
    assert main(["server", "aggregate"]) == 6
    assert "round 0 waits for 1 more of its 3 clients; missing: 0, 2" in capsys.readouterr().err
    assert main(["status"]) == 0
    assert "cohort     clients 0, 1 and 2; 2 must answer, of which the first 2 count\n" in capsys.readouterr().out
    configure(selecting, "federation.quorum=0.5")
    assert main(["server", "aggregate"]) == 0
    assert accounts(selecting) == {"counted": [1], "missing": [0, 2]}


def count_the_surplus(manifest: dict) -> None:
    """Say that the one who was counted first was not needed."""
    aggregation = manifest["aggregation"]
    aggregation["surplus"] = [aggregation["counted"].pop(0)["client"]]


def test_verify_finds_a_selection_that_was_not_kept_to(small, monkeypatch, capsys):
    monkeypatch.chdir(small)
    for _ in range(2):
        all_take_part(small)
        Federation.open(small).server.aggregate()
    edited(lambda manifest: manifest.update(selection={"order": [0, 1], "count": 2}), small)
    assert main(["verify"]) == 7
    assert "has a selection that is not of its cohort" in capsys.readouterr().out
    edited(lambda manifest: manifest.update(selection=None), small)
    assert main(["verify"]) == 0
    edited(count_the_surplus, small)
    assert main(["verify"]) == 7
    assert "does not count the first 3 valid updates in draw order" in capsys.readouterr().out


def test_past_the_deadline_one_update_is_enough_and_before_it_the_quorum_holds(small, monkeypatch, capsys):
    configure(small, "federation.deadline=2h")
    reopen(small, "fedavg")
    monkeypatch.chdir(small)
    assert time.time() - 60 < read_manifest(small, 0)["opened"] <= time.time()
    take_part(small, 2)
    assert main(["server", "aggregate"]) == 6
    assert re.search(r"The deadline is in (2 h|1 h 59 min); then one valid update is enough\.", capsys.readouterr().err)
    assert main(["status"]) == 0
    assert re.search(r"deadline   in (2 h|1 h 59 min): then one answer is enough\n", capsys.readouterr().out)
    configure(small, "federation.deadline=0.001")
    assert main(["status", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["needed"], status["seconds_left"] < 0) == (1, True)
    assert status["deadline"] == read_manifest(small, 0)["opened"] + 0.001
    assert main(["server", "aggregate"]) == 0
    assert accounts(small) == {"counted": [2], "missing": [0, 1]}
    assert main(["server", "aggregate"]) == 6  # not with none
    error = capsys.readouterr().err
    assert "round 1 waits for 1 more of its 3 clients" in error
    assert " ago: one valid update is enough." in error


def test_a_round_that_was_opened_without_a_deadline_has_none(small, monkeypatch):
    monkeypatch.chdir(small)
    configure(small, "federation.deadline=0.001")
    take_part(small, 0)
    assert main(["server", "aggregate"]) == 6
    assert Federation.open(small).status().deadline is None


def test_a_late_update_is_shown_and_changes_nothing(small, monkeypatch, capsys):
    monkeypatch.chdir(small)
    take_part(small, 0)
    take_part(small, 1)
    update = small / "inbox/1/round-00000"
    update.rename(small / "late")
    assert main(["server", "aggregate", "--partial"]) == 0
    published = stored_hashes(small / "rounds")
    assert Federation.open(small).status().last_late == []
    (small / "late").rename(update)
    status = Federation.open(small).status()
    assert (status.last_missing, status.last_late, status.answered) == ([1, 2], [1], [])
    capsys.readouterr()
    assert main(["status"]) == 0
    assert "updates of client 1 in round 0: they came too late" in capsys.readouterr().out
    assert stored_hashes(small / "rounds") == published
    assert Federation(Workspace(small)).verify().violations == []


def test_the_control_variate_of_who_was_not_needed_or_late_never_becomes_current(selecting):
    reopen(selecting, "scaffold")
    (selecting / "data").mkdir(exist_ok=True)
    for client in range(3):
        (selecting / "data" / f"client-{client}.jsonl").touch()
        train_as(client, selecting)
    Federation.open(selecting).server.aggregate()
    assert {client for client in range(3) if not own(selecting, client)} == {order_of(selecting)[-1]}
    before = {client: own(selecting, client) for client in range(3)}
    late = order_of(selecting, 1)[0]
    for client in range(3):
        train_as(client, selecting)
    update = selecting / f"inbox/{late}/round-00001"
    update.rename(selecting / "late")
    Federation.open(selecting).server.aggregate()
    (selecting / "late").rename(update)
    assert Federation.open(selecting).status().last_late == [late]
    assert len(list((selecting / f"private/{late}/control").glob("round-00001-*"))) == 1
    after = own(selecting, late)
    assert after.keys() == before[late].keys()
    assert all(np.array_equal(after[name], before[late][name]) for name in after)
    assert Federation(Workspace(selecting)).verify().violations == []


def test_a_manifest_of_a_version_that_knew_no_selection_is_merged(small):
    path = small / "rounds/00000/manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["selection"], manifest["opened"]
    path.write_text(json.dumps(manifest))
    shutil.rmtree(small / "inbox", ignore_errors=True)
    for client in range(3):
        take_part(small, client)
    tear(small, 1)
    Federation.open(small).server.aggregate(refuse_arriving=True)
    assert accounts(small) == {"counted": [0, 2], "refused": [1]}


@pytest.mark.parametrize(
    ("text", "seconds"), [(90, 90.0), (0.5, 0.5), ("90s", 90.0), ("30m", 1800.0), ("1.5 h", 5400.0), ("2d", 172800.0)]
)
def test_a_deadline_is_a_number_of_seconds_or_has_a_unit(text, seconds):
    assert FederationConfig(deadline=text).deadline == seconds


@pytest.mark.parametrize("text", ["soon", "2 weeks", "h", "-1h", 0, "0s"])
def test_what_is_no_length_of_time_is_no_deadline(text):
    with pytest.raises(ValueError, match="deadline"):
        FederationConfig(deadline=text)


@pytest.mark.parametrize(("per_round", "select"), [(3, 2), (2, 6), (None, 4)])
def test_select_lies_between_per_round_and_all_clients(per_round, select):
    with pytest.raises(ValueError, match="select is"):
        FederationConfig(clients=5, per_round=per_round, select=select)
