"""Switching algorithms between rounds, and whose control variates are current whatever became of an update."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from protocol_client import take_part
from safetensors.numpy import load_file, save_file
from support.federation import ADAPTER, configure, own, read_adapter, read_manifest, stored_hashes
from support.formulas import OTHER, Formulas, drop, drop_all, random_update
from support.processes import ENVIRONMENT, SMALL, command, fedcli, settings

from fedcli import Federation
from fedcli.algos.scaffold import Scaffold
from fedcli.cli import main
from fedcli.workspace.layout import Workspace

DELTA = "control_delta.safetensors"
YOGI = {"name": "fedyogi", "eta": 1e-3, "tau": 1e-3, "beta1": 0.9, "beta2": 0.99, "second_moment": "momentum"}


@pytest.fixture
def here(small: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small workspace as the current folder, with rounds enough."""
    configure(small, "federation.rounds=9")
    monkeypatch.chdir(small)
    return small


def merge(workspace: Path, *options: str) -> tuple[dict, dict]:
    """Let the open round's clients drop random updates and merge them; return these and the next manifest."""
    number = len(list((workspace / "rounds").iterdir())) - 1
    updates = drop_all(workspace, number)
    assert main(["server", "aggregate", *options]) == 0
    return updates, read_manifest(workspace, number + 1)


def test_an_override_starts_afresh_goes_on_and_is_forgotten_by_another_algorithm(here):
    updates = drop_all(here, 0)
    done = fedcli("server", "aggregate", "--algo", "fedyogi", cwd=here)
    assert done.returncode == 0, done.stderr
    formulas = Formulas(read_adapter(here, 0), **YOGI)
    formulas.step(updates)
    formulas.check(here, 1)
    manifest = read_manifest(here, 1)
    assert (manifest["aggregation"]["algorithm"], manifest["algorithm"]) == (YOGI, {"name": "fedavg"})
    formulas.step(merge(here, "--algo", "fedyogi")[0])
    formulas.check(here, 2)  # m and v of the round before went in
    for number, algorithm in ((2, {"name": "fedavg"}), (3, YOGI), (4, {**YOGI, "name": "fedadam"}), (5, YOGI)):
        formulas = Formulas(read_adapter(here, number), **algorithm)
        updates, manifest = merge(here, "--algo", algorithm["name"])
        formulas.step(updates)
        formulas.check(here, number + 1)
        assert manifest["aggregation"]["algorithm"] == algorithm
    assert Federation(Workspace(here)).verify().violations == []


def test_an_override_takes_its_hyperparameters_from_fedcli_yaml_where_that_names_it(here):
    configure(here, "algorithm.name=fedyogi", *(f"algorithm.{key}={value}" for key, value in OTHER.items()))
    formulas = Formulas(read_adapter(here, 0), **YOGI | OTHER)
    updates, manifest = merge(here, "--algo", "fedyogi")
    formulas.step(updates)
    formulas.check(here, 1)
    assert manifest["aggregation"]["algorithm"] == manifest["algorithm"] == YOGI | OTHER
    formulas.step(merge(here)[0])  # the round's own algorithm goes on with the state
    formulas.check(here, 2)


@pytest.mark.parametrize("algorithm", ["scaffold", "fedprox"])
def test_what_clients_did_not_do_cannot_be_merged_and_the_cure_is_named(here, capsys, algorithm):
    drop_all(here, 0)
    before = stored_hashes(here)
    assert main(["server", "aggregate", "--algo", algorithm]) == 2
    error = capsys.readouterr().err
    assert f"--algo {algorithm}: it changes how clients train, too, and those of round 0 train for fedavg" in error
    assert f"set algorithm.name to {algorithm} in fedcli.yaml and aggregate without --algo" in error
    assert stored_hashes(here) == before
    configure(here, f"algorithm.name={algorithm}")
    assert main(["server", "aggregate"]) == 0
    assert read_manifest(here, 1)["algorithm"]["name"] == algorithm
    merge(here, "--algo", algorithm)  # the round's own may be named


def test_control_variates_start_afresh_after_another_algorithm(here):
    configure(here, "algorithm.name=scaffold")
    merge(here)
    formulas = Formulas(read_adapter(here, 1), name="scaffold")
    for number in (1, 2):
        formulas.step(merge(here)[0])
        formulas.check(here, number + 1)
    updates, manifest = merge(here, "--algo", "fedavg")
    formulas = Formulas(read_adapter(here, 3), name="fedavg")
    formulas.step(updates)
    formulas.check(here, 4)  # among others: no control.safetensors
    assert (manifest["algorithm"], manifest["update_files"]) == ({"name": "scaffold"}, [ADAPTER, DELTA])
    assert all(own(here, client) == {} for client in range(3))
    formulas = Formulas(read_adapter(here, 4), name="scaffold")
    formulas.step(merge(here)[0])
    formulas.check(here, 5)
    assert Federation(Workspace(here)).verify().violations == []


def test_an_update_without_its_control_delta_or_with_a_bad_one_is_refused(here):
    configure(here, "algorithm.name=scaffold")
    merge(here)
    num_samples, adapter, control = random_update(here, 1, 0)
    name = next(iter(control))
    drop(here, 1, 0, (num_samples, adapter, control | {name: np.full_like(control[name], np.nan)}))
    drop(here, 1, 1, (num_samples, adapter, {other: array for other, array in control.items() if other != name}))
    drop(here, 1, 2, random_update(here, 1, 2))
    assert main(["server", "aggregate"]) == 0
    refused = [(entry["client"], entry["code"]) for entry in read_manifest(here, 2)["aggregation"]["refused"]]
    assert refused == [(0, "nonfinite"), (1, "schema")]
    drop_all(here, 2)
    record = here / "inbox" / "0" / "round-00002" / "update.json"
    document = json.loads(record.read_bytes())
    del document["files"][DELTA]
    record.write_text(json.dumps(document))
    assert main(["server", "aggregate"]) == 0
    refused = [(entry["client"], entry["code"]) for entry in read_manifest(here, 3)["aggregation"]["refused"]]
    assert refused == [(0, "json")]


def test_an_edit_of_the_algorithm_shapes_the_next_round_and_the_history_tells(here, capsys):
    for number, following in enumerate(["scaffold", "scaffold", "fedyogi", "fedprox", "fedavg"]):
        before = read_manifest(here, number)["algorithm"]
        configure(here, f"algorithm.name={following}")
        manifest = merge(here)[1]
        assert manifest["aggregation"]["algorithm"] == before
        assert manifest["algorithm"]["name"] == following
        assert manifest["update_files"] == [ADAPTER, DELTA][: 2 if following == "scaffold" else 1]
    capsys.readouterr()
    assert main(["status", "--json"]) == 0
    history = [
        {"round": 0, "algorithm": {"name": "fedavg"}},
        {"round": 1, "algorithm": {"name": "scaffold"}},
        {"round": 3, "algorithm": YOGI},
        {"round": 4, "algorithm": {"name": "fedprox", "mu": 0.01}},
    ]
    assert json.loads(capsys.readouterr().out)["history"] == history
    assert main(["status"]) == 0
    merged = [line for line in capsys.readouterr().out.splitlines() if line.startswith("merged")]
    assert merged == [
        "merged     round 0 with fedavg",
        "merged     rounds 1 to 2 with scaffold",
        "merged     round 3 with fedyogi (beta1 0.9, beta2 0.99, eta 0.001, second_moment momentum, tau 0.001)",
        "merged     round 4 with fedprox (mu 0.01)",
    ]
    assert main(["verify"]) == 0


def test_an_update_whose_square_would_overflow_is_refused_by_name_and_the_round_goes_on_without_it(here):
    take_part(here, 0)
    take_part(here, 1, lambda array: np.full_like(array, 1e30))
    take_part(here, 2)
    done = fedcli("server", "aggregate", "--algo", "fedadagrad", cwd=here)
    assert done.returncode == 0, done.stderr
    aggregation = read_manifest(here, 1)["aggregation"]
    assert [entry["client"] for entry in aggregation["counted"]] == [0, 2]
    (refused,) = aggregation["refused"]
    assert (refused["client"], refused["code"]) == (1, "nonfinite")
    assert "holds 1e+30, and what is beyond 4.29e+09 overflows later" in refused["reason"]


def flat(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Return the numbers of named arrays in the order of their names, float64."""
    return np.concatenate([array.ravel().astype(np.float64) for _, array in sorted(arrays.items())])


def sum_of_counted(workspace: Path, client: int) -> tuple[list[int], np.ndarray]:
    """Return the rounds whose update of a client was counted since c began, and the sum of their control deltas."""
    rounds, total = [], flat(read_adapter(workspace, 0)) * 0
    for number in range(1, len(list((workspace / "rounds").iterdir()))):
        aggregation = read_manifest(workspace, number)["aggregation"]
        if aggregation["algorithm"]["name"] != "scaffold":
            rounds, total = [], total * 0
        elif client in [entry["client"] for entry in aggregation["counted"]]:
            rounds.append(number - 1)
            total = total + flat(load_file(workspace / "inbox" / str(client) / f"round-{number - 1:05d}" / DELTA))
    return rounds, total


def check_controls(workspace: Path, counted: dict[int, list[int]]) -> None:
    """Assert who was counted when, that each c_k is the sum of just these changes, and that c is the mean of all."""
    sums = []
    for client in range(3):
        rounds, total = sum_of_counted(workspace, client)
        assert rounds == counted.get(client, [])
        current = own(workspace, client)
        assert bool(current) == bool(rounds)
        if current:
            assert np.abs(total).max() > 0.1
            np.testing.assert_allclose(flat(current), total, rtol=0, atol=1e-6)
        sums.append(total)
    head = Federation.open(workspace).round()
    np.testing.assert_allclose(flat(head.state(Scaffold())), sum(sums) / 3, rtol=0, atol=1e-6)
    assert Federation(Workspace(workspace)).verify().violations == []


def candidates(workspace: Path, client: int) -> list[str]:
    """Return the rounds of the candidates that lie in a client's private folder."""
    return sorted(path.name[:11] for path in (workspace / "private" / str(client) / "control").iterdir())


def train(workspace: Path, *clients: int) -> None:
    """Let clients train with the command, in this process, which has loaded torch."""
    for client in clients:
        assert main(["client", "train", "--id", str(client), "-w", str(workspace)]) == 0


def train_as_process(workspace: Path, client: int) -> None:
    """Let a client train as a process of its own."""
    done = fedcli("client", "train", "--id", client, "--json", cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "submitted"


def close_round(workspace: Path, *options: str) -> None:
    """Merge what has come."""
    assert main(["server", "aggregate", "--partial", *options, "-w", str(workspace)]) == 0


@pytest.fixture(scope="module")
def begun_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SCAFFOLD federation in round 1: clients 0 and 1 were counted in round 0, client 2 never takes part."""
    folder = tmp_path_factory.mktemp("scaffold")
    assert main(["init", str(folder), *settings(*SMALL, "federation.rounds=6", "algorithm.name=scaffold")]) == 0
    train(folder, 0, 1)
    close_round(folder)
    return folder


@pytest.fixture
def begun(begun_template: Path, tmp_path: Path) -> Path:
    """A copy of that federation."""
    folder = Path(shutil.copytree(begun_template, tmp_path / "begun"))
    check_controls(folder, {0: [0], 1: [0]})
    return folder


def check_next_training(workspace: Path, number: int, client: int, counted_before: int) -> None:
    """Train, and assert that it began with the c_k of an earlier round, the only old candidate that is kept.

    What it sends is (x - y_k) / (K lr) - c.
    """
    before = flat(own(workspace, client))
    train(workspace, client)
    assert candidates(workspace, client) == [f"round-{counted_before:05d}", f"round-{number:05d}"]
    (candidate,) = (workspace / "private" / str(client) / "control").glob(f"round-{number:05d}-*")
    delta = flat(load_file(workspace / "inbox" / str(client) / f"round-{number:05d}" / DELTA))
    np.testing.assert_allclose(flat(load_file(candidate)) - delta, before, rtol=0, atol=1e-6)
    update, manifest = workspace / "inbox" / str(client) / f"round-{number:05d}", read_manifest(workspace, number)
    steps = json.loads((update / "update.json").read_bytes())["steps"]
    moved = flat(read_adapter(workspace, number)) - flat(load_file(update / ADAPTER))
    c = flat(load_file(workspace / "rounds" / f"{number:05d}" / "control.safetensors"))
    exact = moved / (steps * manifest["train"]["learning_rate"]) - c
    np.testing.assert_allclose(delta, exact, rtol=0, atol=1e-6)


def test_a_refused_updates_control_variate_never_becomes_current(begun):
    train_as_process(begun, 0)
    path = begun / "inbox" / "0" / "round-00001" / ADAPTER
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)
    train(begun, 1)
    close_round(begun)
    refused = read_manifest(begun, 2)["aggregation"]["refused"]
    assert [(entry["client"], entry["code"]) for entry in refused] == [(0, "hash")]
    check_controls(begun, {0: [0], 1: [0, 1]})
    assert candidates(begun, 0) == ["round-00000", "round-00001"]
    check_next_training(begun, 2, 0, counted_before=0)
    close_round(begun)
    check_controls(begun, {0: [0, 2], 1: [0, 1]})
    train(begun, 0)
    assert candidates(begun, 0) == ["round-00002", "round-00003"]


@pytest.mark.slow
def test_a_late_updates_control_variate_never_becomes_current(begun):
    late = subprocess.Popen(
        command("client", "train", "--id", 1),
        cwd=begun,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 300
        while "libtorch" not in Path(f"/proc/{late.pid}/maps").read_text():  # the round was read before torch is
            assert time.monotonic() < deadline
            time.sleep(0.01)
        late.send_signal(signal.SIGSTOP)
        train(begun, 0)
        close_round(begun)
        late.send_signal(signal.SIGCONT)
        output, said = late.communicate(timeout=60)
    finally:
        late.kill()
        late.wait()
    assert (late.returncode, output.splitlines()[0]) == (0, "client 1: trained in round 1 and dropped its update"), said
    assert (begun / "inbox" / "1" / "round-00001" / DELTA).exists()
    assert read_manifest(begun, 2)["aggregation"]["missing"] == [1, 2]
    assert candidates(begun, 1) == ["round-00000", "round-00001"]
    check_controls(begun, {0: [0, 1], 1: [0]})
    check_next_training(begun, 2, 1, counted_before=0)
    close_round(begun)
    check_controls(begun, {0: [0, 1], 1: [0, 2]})


KILLED_BEFORE_ITS_DROP = """
import os, signal, sys
from fedcli.workspace import publish
publish.publish_directory = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL)
from fedcli.cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_control_variate_whose_update_was_never_dropped_never_becomes_current(begun):
    done = subprocess.run(
        [sys.executable, "-c", KILLED_BEFORE_ITS_DROP, "client", "train", "--id", "0"], cwd=begun, env=ENVIRONMENT
    )
    assert done.returncode == -signal.SIGKILL
    assert candidates(begun, 0) == ["round-00000", "round-00001"]
    assert not (begun / "inbox" / "0" / "round-00001").exists()
    check_controls(begun, {0: [0], 1: [0]})
    rows = begun / "data" / "client-0.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[1:]))  # so that it sends another update now
    train_as_process(begun, 0)
    assert candidates(begun, 0) == ["round-00000", "round-00001", "round-00001"]
    close_round(begun)
    check_controls(begun, {0: [0, 1], 1: [0]})
    check_next_training(begun, 2, 0, counted_before=1)


def test_a_client_killed_before_its_drop_sends_the_very_same_update_when_it_runs_again(begun):
    undisturbed = Path(shutil.copytree(begun, begun.parent / "undisturbed"))
    train(undisturbed, 0)
    (candidate,) = (undisturbed / "private" / "0" / "control").glob("round-00001-*")
    shutil.copy(candidate, begun / "private" / "0" / "control")  # what the killed process had written
    train(begun, 0)
    assert stored_hashes(begun / "inbox") == stored_hashes(undisturbed / "inbox")
    assert candidates(begun, 0) == ["round-00000", "round-00001"]


def flipped(place: str, folder: Path) -> None:
    """Flip a bit of a candidate: of its last value, of its first, or of its digest."""
    (path,) = folder.iterdir()
    contents = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(contents[:8], "little")
    contents[{"last": -1, "first": header, "digest": contents.index(b"sha256") + 12}[place]] ^= 1
    path.write_bytes(contents)


DAMAGES = [
    shutil.rmtree,
    lambda folder: os.truncate(next(folder.iterdir()), 100),
    lambda folder: os.truncate(next(folder.iterdir()), 0),
    *(partial(flipped, place) for place in ("last", "first", "digest")),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_private_state_exits_7_and_nothing_is_sent(begun, capsys, damage):
    damage(begun / "private" / "0" / "control")
    before = stored_hashes(begun / "inbox")
    assert main(["client", "train", "--id", "0", "-w", str(begun)]) == 7
    error = capsys.readouterr().err
    assert f"client 0's private state of scaffold is gone or damaged: {begun}/private/0/control/round-00000-" in error
    assert stored_hashes(begun / "inbox") == before


def test_a_control_variate_of_a_version_without_digests_still_counts(begun):
    undisturbed = Path(shutil.copytree(begun, begun.parent / "undisturbed"))
    (candidate,) = (begun / "private" / "0" / "control").iterdir()
    assert b'"sha256"' in candidate.read_bytes()[:200]
    arrays = load_file(candidate)
    save_file(arrays, candidate, metadata={"format": "pt"})
    assert own(begun, 0).keys() == arrays.keys()
    for workspace in (begun, undisturbed):
        train(workspace, 0)
    assert stored_hashes(begun / "inbox") == stored_hashes(undisturbed / "inbox")


def test_a_lost_control_variate_exits_7_and_the_cure_works(begun, capsys):
    shutil.rmtree(begun / "private" / "0" / "control")
    before = stored_hashes(begun / "inbox")
    assert main(["client", "train", "--id", "0", "-w", str(begun)]) == 7
    error = capsys.readouterr().err
    assert f"client 0's private state of scaffold is gone or damaged: {begun}/private/0/control/round-00000-" in error
    assert "`server aggregate --partial --algo fedavg`" in error
    assert stored_hashes(begun / "inbox") == before
    train(begun, 1)
    close_round(begun, "--algo", "fedavg")
    assert not (begun / "rounds" / "00002" / "control.safetensors").exists()
    train(begun, 0, 1)
    close_round(begun)
    check_controls(begun, {0: [2], 1: [2]})


def test_a_control_variate_of_other_tensors_is_damaged(begun, capsys):
    (candidate,) = (begun / "private" / "0" / "control").iterdir()
    save_file({"w": np.zeros(3, np.float32)}, candidate)
    assert main(["client", "train", "--id", "0", "-w", str(begun)]) == 7
    assert str(candidate) in capsys.readouterr().err
