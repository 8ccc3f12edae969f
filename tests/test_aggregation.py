"""`server aggregate`, `server run` and `server discard`: when they go ahead, what they say, what they leave alone."""

import json
import os
import shutil
import subprocess
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from protocol_client import take_part
from safetensors.numpy import save
from support.damage import tear
from support.federation import ADAPTER, all_take_part, configure, noisy, read_manifest, stored_hashes
from support.processes import ENVIRONMENT, command

from fedcli import Federation
from fedcli.cli import main
from fedcli.config import FederationConfig
from fedcli.workspace.layout import Workspace
from fedcli.workspace.locks import hold
from fedcli.workspace.records import file_entry


@pytest.fixture
def here(small: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small workspace as the current folder."""
    monkeypatch.chdir(small)
    return small


def published(workspace: Path) -> list[str]:
    """Return the names in rounds/."""
    return sorted(os.listdir(workspace / "rounds"))


@pytest.mark.parametrize(
    ("quorum", "cohort", "needed"),
    [(1.0, 5, 5), (0.5, 3, 2), (0.5, 4, 2), (0.1, 30, 3), (0.07, 100, 7), (0.01, 5, 1), (0.001, 1, 1)],
)
def test_a_quorum_is_rounded_up_in_exact_arithmetic(quorum, cohort, needed):
    # In floating point 0.1 x 30 and 0.07 x 100 are a little more than 3 and 7, and would need 4 and 8.
    assert FederationConfig(quorum=quorum).needed_answers(cohort) == needed


def test_before_the_quorum_it_exits_6_and_names_the_missing_clients(here, capsys):
    take_part(here, 1)
    assert main(["server", "aggregate"]) == 6
    output = capsys.readouterr()
    assert "round 0 waits for 2 more of its 3 clients; missing: 0, 2" in output.err
    assert output.out == ""
    assert main(["server", "aggregate", "--json"]) == 6
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["exit_code"], "missing: 0, 2" in error["message"]) == (6, True)
    assert published(here) == ["00000"]


def test_half_of_three_clients_are_two(here):
    configure(here, "federation.quorum=0.5")
    take_part(here, 2)
    assert main(["server", "aggregate"]) == 6
    take_part(here, 0)
    assert main(["server", "aggregate"]) == 0
    aggregation = read_manifest(here, 1)["aggregation"]
    assert [entry["client"] for entry in aggregation["counted"]] == [0, 2]
    assert aggregation["missing"] == [1]


def test_partial_goes_ahead_with_one_update_but_not_with_none(here, capsys):
    assert main(["server", "aggregate", "--partial"]) == 6
    assert "missing: 0, 1, 2" in capsys.readouterr().err
    take_part(here, 1)
    tear(here, 1)
    refuse = ["server", "aggregate", "--partial", "--refuse-arriving"]
    assert main(refuse) == 6
    assert "client 1: size" in capsys.readouterr().err
    assert published(here) == ["00000"]
    take_part(here, 2)
    assert main(refuse) == 0
    aggregation = read_manifest(here, 1)["aggregation"]
    assert [(entry["client"], entry["weight"]) for entry in aggregation["counted"]] == [(2, 1.0)]
    assert [entry["client"] for entry in aggregation["refused"]] == [1]
    assert aggregation["missing"] == [0]


def test_a_round_of_which_all_updates_are_refused_is_not_merged(here, capsys):
    all_take_part(here)
    for client in range(3):
        tear(here, client)
    (here / "inbox" / "2" / "round-00000" / "update.json").write_bytes(b"[]")
    assert main(["server", "aggregate", "--refuse-arriving"]) == 6
    error = capsys.readouterr().err
    assert "round 0 has no valid update:\n  client 0: size\n  client 1: size\n  client 2: json\n" in error
    assert "fedcli server discard --id N" in error
    assert published(here) == ["00000"]


def test_one_update_is_told_in_the_singular(here, capsys):
    take_part(here, 1)
    assert main(["server", "aggregate", "--partial", "--dry-run"]) == 0
    assert capsys.readouterr().out == "would merge 1 update (client 1)\nmissing: 0, 2\n"


def test_a_dry_run_says_what_would_be_and_publishes_nothing(here, capsys):
    all_take_part(here)
    tear(here, 1)
    before = stored_hashes(here)
    assert main(["server", "aggregate", "--refuse-arriving", "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("would merge 2 updates (clients 0, 2)\nrefused client 1: size: ")
    assert main(["server", "aggregate", "--refuse-arriving", "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["status"], document["round"]) == ("dry_run", 0)
    assert stored_hashes(here) == before
    assert main(["server", "aggregate", "--refuse-arriving"]) == 0
    assert read_manifest(here, 1)["aggregation"] == document["aggregation"]


def test_wait_waits_for_a_client_that_is_late(here):
    take_part(here, 0)
    take_part(here, 1)
    late = threading.Timer(1.0, take_part, (here, 2))
    started = time.monotonic()
    late.start()
    assert main(["server", "aggregate", "--wait", "60"]) == 0
    assert 1.0 <= time.monotonic() - started < 30
    late.join()
    assert [entry["client"] for entry in read_manifest(here, 1)["aggregation"]["counted"]] == [0, 1, 2]


def test_wait_gives_up_when_its_time_is_over(here):
    started = time.monotonic()
    assert main(["server", "aggregate", "--wait", "1.2"]) == 6
    assert 0.5 <= time.monotonic() - started < 30


def test_an_unknown_algorithm_exits_2_with_the_nearest_name(here, capsys):
    all_take_part(here)
    assert main(["server", "aggregate", "--algo", "fedavgg"]) == 2
    assert "unknown algorithm 'fedavgg'\n  Did you mean fedavg or fedavgm?" in capsys.readouterr().err
    assert main(["server", "aggregate", "--algo", "fedyoga", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["message"], error["hint"]) == ("unknown algorithm 'fedyoga'", "Did you mean fedyogi or fedavg?")
    assert published(here) == ["00000"]


def test_an_unknown_algorithm_is_not_waited_for(here, capsys):
    assert main(["server", "aggregate", "--algo", "fedavgg", "--wait", "2"]) == 2  # nobody has answered
    assert "unknown algorithm 'fedavgg'" in capsys.readouterr().err


def test_the_algorithm_that_merged_a_round_is_recorded(here):
    all_take_part(here)
    assert main(["server", "aggregate", "--algo", "fedavg"]) == 0
    assert read_manifest(here, 1)["aggregation"]["algorithm"] == {"name": "fedavg"}


def test_the_order_of_arrival_does_not_change_a_bit(small, tmp_path):
    other = Path(shutil.copytree(small, tmp_path / "other"))
    for client in (0, 1, 2):
        take_part(small, client, noisy(client), 10**client)
    for client in (2, 0, 1):
        take_part(other, client, noisy(client), 10**client)
    for workspace in (small, other):
        Federation.open(workspace).server.aggregate(algorithm="fedavg")
    assert stored_hashes(small / "rounds") == stored_hashes(other / "rounds")


def test_a_client_whose_update_was_discarded_sends_again_and_is_counted(here, capsys):
    all_take_part(here)
    tear(here, 1)
    assert main(["server", "discard", "--id", "1"]) == 0
    assert capsys.readouterr().out == "client 1: its update is set aside\n"
    assert main(["server", "aggregate"]) == 6
    assert take_part(here, 1, num_samples=77)
    assert main(["server", "aggregate"]) == 0
    aggregation = read_manifest(here, 1)["aggregation"]
    assert [entry["num_samples"] for entry in aggregation["counted"]] == [3, 77, 447]
    assert aggregation["refused"] == []
    assert main(["verify"]) == 0


def test_only_an_update_of_the_open_round_can_be_discarded(here, capsys):
    all_take_part(here)
    assert main(["server", "aggregate"]) == 0
    before = stored_hashes(here)
    capsys.readouterr()
    assert main(["server", "discard", "--id", "1"]) == 0
    assert capsys.readouterr().out == "client 1: has no update that may still count\n"
    assert stored_hashes(here) == before


def test_server_run_merges_each_round_when_it_is_ready_and_ends_with_the_last(small):
    server = subprocess.Popen(
        command("server", "run"), cwd=small, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        for number in (1, 2):
            all_take_part(small)
            deadline = time.monotonic() + 300
            while not (small / "rounds" / f"{number:05d}").exists():
                assert time.monotonic() < deadline
                time.sleep(0.05)
        output, said = server.communicate(timeout=60)
    finally:
        server.kill()
        server.wait()
    assert (server.returncode, output) == (0, "the federation has finished at round 2\n"), said
    assert "round 1 is there\n" in said
    assert "round 2 is there\n" in said
    assert published(small) == ["00000", "00001", "00002"]
    assert Federation(Workspace(small)).verify().violations == []


def test_an_edit_of_the_training_shows_in_the_next_manifest_only(here):
    all_take_part(here)
    first = stored_hashes(here / "rounds")
    configure(here, "train.steps=7", "train.learning_rate=0.002")
    assert main(["server", "aggregate"]) == 0
    train = read_manifest(here, 1)["train"]
    assert (train["steps"], train["schedule"]["learning_rate"]) == (7, 0.002)
    assert read_manifest(here, 0)["train"]["steps"] == 2
    assert first.items() <= stored_hashes(here / "rounds").items()


@pytest.mark.parametrize("edit", ["federation.seed=1", "federation.clients=4", "adapter.rank=8", "model.revision=v2"])
def test_an_edit_of_what_init_fixed_exits_3_and_names_the_key(here, capsys, edit):
    all_take_part(here)
    configure(here, edit)
    assert main(["server", "aggregate"]) == 3
    key, value = edit.split("=")
    error = capsys.readouterr().err
    assert f"  {key}: was " in error
    assert f"is now {int(value) if value.isdigit() else value!r}\n" in error
    assert published(here) == ["00000"]


def test_while_another_process_aggregates_it_exits_5_and_says_who_that_is(here, capsys):
    all_take_part(here)
    with hold(Workspace(here).server_lock, "a test"):
        assert main(["server", "aggregate"]) == 5
    assert f"pid {os.getpid()} on " in capsys.readouterr().err
    assert published(here) == ["00000"]
    assert main(["server", "aggregate"]) == 0


def test_an_empty_directory_under_the_next_rounds_name_is_no_round(here):
    (here / "rounds" / "00001").mkdir()
    all_take_part(here)  # a client that reads the page finds round 0, the last that has a manifest
    assert main(["status"]) == 0
    assert main(["server", "aggregate"]) == 0
    assert main(["verify"]) == 0


@pytest.mark.parametrize("command", [["status"], ["server", "aggregate"]])
def test_a_file_under_the_next_rounds_name_exits_7_and_is_named(here, capsys, command):
    (here / "rounds" / "00001").write_bytes(b"")
    all_take_part(here)
    assert main(command) == 7
    assert f"{here / 'rounds' / '00001'}" in capsys.readouterr().err


def test_what_is_refused_leaves_no_trace_in_the_sums(small, tmp_path):
    other = Path(shutil.copytree(small, tmp_path / "other"))
    configure(other, "federation.quorum=0.5")
    for client in (0, 2):
        take_part(small, client, noisy(client))
        take_part(other, client, noisy(client))

    def end_with_nan(array: np.ndarray) -> np.ndarray:
        array = array + 1.0
        array.flat[-1] = np.nan
        return array

    take_part(small, 1, end_with_nan)
    for workspace in (small, other):
        Federation.open(workspace).server.aggregate()
    assert read_manifest(small, 1)["aggregation"]["refused"][0]["code"] == "nonfinite"
    assert read_manifest(other, 1)["aggregation"]["missing"] == [1]
    assert read_manifest(small, 1)["files"] == read_manifest(other, 1)["files"]


def enlarge(workspace: Path, side: int, clients: int) -> int:
    """Give a fresh workspace one square tensor as adapter and more clients; return the adapter's size in bytes."""
    folder = workspace / "rounds" / "00000"
    contents = save({"w": np.zeros((side, side), np.float32)})
    (folder / "adapter" / ADAPTER).write_bytes(contents)
    manifest = read_manifest(workspace, 0) | {"cohort": list(range(clients))}
    manifest["files"][f"adapter/{ADAPTER}"] = file_entry(contents).model_dump()
    manifest["tensors"] = {"w": {"shape": [side, side], "dtype": "F32"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    identity = json.loads((workspace / "workspace.json").read_bytes())
    identity["fixed"]["federation.clients"] = clients
    (workspace / "workspace.json").write_text(json.dumps(identity))
    configure(workspace, f"federation.clients={clients}")
    return len(contents)


def test_memory_does_not_grow_with_the_number_of_updates(small):
    size = enlarge(small, 1024, 12)
    peaks = {}
    for answered in (2, 12):
        for client in range(12 - answered, 12):
            take_part(small, client)
        tracemalloc.start()
        try:
            result = Federation.open(small).server.aggregate(partial=True, dry_run=True)
            peaks[answered] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(result.aggregation.counted) == answered
    assert size > 4_000_000
    assert peaks[12] - peaks[2] < size
    # x and two updates in F32 and the sums in float64; then x, their mean, and the float64 that a tensor's step needs:
    # the one tensor is all of the adapter here.
    assert size < peaks[12] < 10 * size
