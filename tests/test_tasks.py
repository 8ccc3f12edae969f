"""Both tasks with all seven algorithms, and the pooled baseline, through the commands."""

import hashlib
import json
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.processes import ENVIRONMENT, SMALL, command, fedcli, settings

from fedcli import Federation, Observer
from fedcli.algos import ALGORITHMS
from fedcli.cli import main

ADAPTER = "adapter/adapter_model.safetensors"
PAIR = (*SMALL, "federation.clients=2")
PRESETS = {"sft": "demo", "dpo": "demo-dpo"}
STATE_FILES = {
    "fedavg": set(), "fedprox": set(), "scaffold": {"control.safetensors"}, "fedavgm": {"optimizer.safetensors"},
    "fedadagrad": {"optimizer.safetensors"}, "fedyogi": {"optimizer.safetensors"},
    "fedadam": {"optimizer.safetensors"}, "diloco": {"optimizer.safetensors"},
}  # fmt: skip
ALTERNATING = [(name, ("sft", "dpo")[position % 2]) for position, name in enumerate(ALGORITHMS)]


def run_ok(*arguments: object, cwd: Path) -> dict[str, Any]:
    """Run a real process with --json that must succeed quietly, and return its document."""
    done = fedcli(*arguments, "--json", cwd=cwd)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def train_round(workspace: Path) -> list[dict[str, Any]]:
    """Train the cohort in real processes at once, merge, and return what the clients said."""
    cohort = run_ok("status", cwd=workspace)["cohort"]
    with ThreadPoolExecutor(len(cohort)) as pool:
        done = list(pool.map(lambda client: run_ok("client", "train", "--id", client, cwd=workspace), cohort))
    assert run_ok("server", "aggregate", cwd=workspace)["status"] == "published"
    return done


def check_federation(workspace: Path, algorithm: str, task: str) -> None:
    """Check what two rounds left behind."""
    manifests = [json.loads((workspace / f"rounds/{n:05d}/manifest.json").read_text()) for n in range(3)]
    assert [manifest["state"] for manifest in manifests] == ["open", "open", "finished"]
    assert {manifest["task"] for manifest in manifests} == {task}
    assert {manifest["algorithm"]["name"] for manifest in manifests} == {algorithm}
    cohort_size = len(manifests[0]["cohort"])
    for manifest in manifests[1:]:
        assert len(manifest["aggregation"]["counted"]) == cohort_size
        assert manifest["aggregation"]["refused"] == []
        assert all(np.isfinite(entry["train_loss"]) for entry in manifest["aggregation"]["counted"])
    adapters = [load_file(workspace / f"rounds/{n:05d}" / ADAPTER) for n in range(3)]
    for before, after in ((0, 1), (1, 2)):
        assert all(np.isfinite(array).all() for array in adapters[after].values())
        assert any(not np.array_equal(adapters[before][name], adapters[after][name]) for name in adapters[0])
    assert all(array.any() for name, array in adapters[2].items() if ".lora_B." in name)
    for n in (1, 2):
        folder = workspace / f"rounds/{n:05d}"
        assert {path.name for path in folder.glob("*.safetensors")} == STATE_FILES[algorithm]
        for name in STATE_FILES[algorithm]:
            state = load_file(folder / name)
            assert {array.dtype for array in state.values()} == {np.dtype(np.float32)}
            assert any(array.any() for array in state.values())
    updates = {path.name for path in workspace.glob("inbox/*/round-*/*.safetensors")}
    assert ("control_delta.safetensors" in updates) == (algorithm == "scaffold")
    assert bool(list(workspace.glob("private/*/control/*.safetensors"))) == (algorithm == "scaffold")
    assert bool(list(workspace.glob("private/*/reference-*.safetensors"))) == (task == "dpo")


@pytest.mark.parametrize(("algorithm", "task"), ALTERNATING)
def test_every_algorithm_runs_two_rounds_and_verifies(algorithm: str, task: str, tmp_path: Path) -> None:
    """One client a round, in this process; the next test has them all, in processes of their own."""
    workspace = tmp_path / "workspace"
    overrides = settings(*PAIR, f"algorithm.name={algorithm}", "federation.per_round=1")
    assert main(["init", str(workspace), "--preset", PRESETS[task], *overrides]) == 0
    assert main(["run", "-w", str(workspace)]) == 0
    check_federation(workspace, algorithm, task)
    assert main(["verify", "-w", str(workspace)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("task", PRESETS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_and_task_runs_two_rounds_of_processes(algorithm: str, task: str, tmp_path: Path) -> None:
    run_ok("init", "--preset", PRESETS[task], *settings(*PAIR, f"algorithm.name={algorithm}"), cwd=tmp_path)
    for _ in range(2):
        done = train_round(tmp_path)
        assert [(result["status"], result["client"]) for result in done] == [("submitted", 0), ("submitted", 1)]
    check_federation(tmp_path, algorithm, task)
    assert run_ok("verify", cwd=tmp_path)["violations"] == []


def adapter_hashes(workspace: Path) -> list[str]:
    """Return the hash of every round's adapter."""
    folders = sorted((workspace / "rounds").iterdir())
    return [hashlib.sha256((folder / ADAPTER).read_bytes()).hexdigest() for folder in folders]


def compare_run_with_processes(tmp_path: Path, preset: str, *overrides: str) -> None:
    """Let `run` and separate processes go through the same configuration, and compare every byte that they agree on."""
    together, separate = tmp_path / "together", tmp_path / "separate"
    assert main(["init", str(together), "--preset", preset, *settings(*PAIR, *overrides)]) == 0
    separate.mkdir()
    shutil.copy(together / "fedcli.yaml", separate)
    assert main(["init", str(separate)]) == 0
    assert run_ok("run", cwd=together)["state"] == "finished"
    for _ in range(2):
        train_round(separate)
    assert adapter_hashes(together) == adapter_hashes(separate)
    assert len(set(adapter_hashes(together))) == 3
    assert json.loads((together / "workspace.json").read_text()) != json.loads(
        (separate / "workspace.json").read_text()
    )
    for name in ("control.safetensors", "optimizer.safetensors"):
        found = [(folder / "rounds/00002" / name) for folder in (together, separate)]
        assert found[0].exists() == found[1].exists()
        if found[0].exists():
            assert found[0].read_bytes() == found[1].read_bytes()


@pytest.mark.slow
def test_run_equals_processes_bit_for_bit_with_control_variates_preferences_and_dropout(tmp_path: Path) -> None:
    """All that a client keeps between rounds, c_k and the reference, is on disk and nowhere else."""
    compare_run_with_processes(tmp_path, "demo-dpo", "algorithm.name=scaffold", "adapter.dropout=0.1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("demo", ["algorithm.name=scaffold"]),
        ("demo-dpo", ["adapter.dropout=0.1"]),
        ("demo", ["algorithm.name=fedyogi"]),
    ],
)
def test_run_equals_processes_bit_for_bit(tmp_path: Path, preset: str, overrides: list[str]) -> None:
    compare_run_with_processes(tmp_path, preset, *overrides)


# The pooled baseline


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation of two clients with round 0 open."""
    folder = tmp_path_factory.mktemp("pooled") / "workspace"
    assert main(["init", str(folder), *settings(*PAIR, "adapter.dropout=0.1")]) == 0
    return folder


@pytest.fixture
def workspace(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "workspace"))


def results(capsys: pytest.CaptureFixture, *arguments: object) -> dict[str, Any]:
    """Run a command in this process, which must succeed quietly, and return its document."""
    capsys.readouterr()
    code = main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.mark.slow
@pytest.mark.parametrize("task", PRESETS)
def test_the_pooled_baseline_is_one_client_that_holds_all_rows(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Bit for bit: it draws as a client would whose id is the number of clients, from all rows one after another."""
    pooled, single = tmp_path / "pooled", tmp_path / "single"
    results(capsys, "init", pooled, "--preset", PRESETS[task], *settings(*PAIR))
    assert results(capsys, "train-pooled", "-w", pooled)["status"] == "trained"
    single.mkdir()
    (single / "data").mkdir()
    everything = b"".join((pooled / f"data/client-{client}.jsonl").read_bytes() for client in range(2))
    assert len(everything.splitlines()) == 1200
    (single / "data/client-2.jsonl").write_bytes(everything)
    overrides = settings(*SMALL, "data.source=null", "federation.signatures=off", "federation.clients=3")
    results(capsys, "init", single, "--preset", PRESETS[task], *overrides)
    results(capsys, "train-alone", "--id", 2, "-w", single)
    one, other = pooled / "baselines/pooled" / ADAPTER, single / "baselines/alone-2" / ADAPTER
    assert one.read_bytes() == other.read_bytes()
    assert one.read_bytes() != (pooled / "rounds/00000" / ADAPTER).read_bytes()
    assert (one.parent / "adapter_config.json").is_file()
    assert results(capsys, "train-pooled", "-w", pooled)["status"] == "exists"
    scores = results(capsys, "eval", "demo", "--pooled", "-w", pooled)["scores"]
    assert [score["target"] for score in scores] == ["pooled"]
    entry = scores[0]["scores"][{"sft": "exact_match", "dpo": "preference_accuracy"}[task]]
    assert entry["num_items"] == 360
    assert 0 <= entry["value"] <= 1
    assert results(capsys, "verify", "-w", pooled)["num_baselines"] == 1


@pytest.mark.slow
def test_the_pooled_baseline_goes_on_where_it_was_killed(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = workspace / "fedcli.yaml"  # long enough that it cannot finish before it is killed
    config.write_text(config.read_text().replace("rounds: 2", "rounds: 30"))
    other = Path(shutil.copytree(workspace, tmp_path / "other"))
    process = subprocess.Popen(command("train-pooled"), cwd=workspace, env=ENVIRONMENT)
    progress = workspace / "private/pooled/baseline.safetensors"
    deadline = time.monotonic() + 300
    while not progress.exists():
        assert time.monotonic() < deadline, "it never trained a round"
        time.sleep(0.01)
    process.kill()
    assert process.wait(60) == -9
    assert progress.exists()
    assert not (workspace / "baselines/pooled").exists()
    told: list[int] = []
    listener = Observer()
    listener.baseline_round = lambda number, *_: told.append(number)
    done = Federation.open(workspace).train_pooled(observer=listener)
    assert done.status == "trained"
    assert told == sorted(told)
    assert told[0] > 0  # what the killed process had finished is not made again
    assert told[-1] == 29
    results(capsys, "train-pooled", "-w", other)
    one, undisturbed = (folder / "baselines/pooled" / ADAPTER for folder in (workspace, other))
    assert one.read_bytes() == undisturbed.read_bytes()
    assert not progress.exists()


def test_a_missing_file_of_rows_is_an_error_that_names_it(workspace: Path, capsys: pytest.CaptureFixture) -> None:
    rows = workspace / "data/client-1.jsonl"
    rows.unlink()
    for arguments in (["train-pooled"], ["train-alone", "--id", "1"], ["client", "train", "--id", "1"], ["run"]):
        capsys.readouterr()
        assert main([*arguments, "-w", str(workspace)]) == 3
        out, err = capsys.readouterr()
        assert out == ""
        assert f"client 1 has no rows: {rows} is missing" in err
        assert "data.source" in err
    assert not (workspace / "baselines").exists()
    assert not (workspace / "inbox/1").exists() or not list((workspace / "inbox/1").iterdir())


def test_a_pooled_baseline_that_does_not_exist_is_not_scored(workspace: Path, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    assert main(["eval", "demo", "--pooled", "-w", str(workspace)]) == 2
    assert "fedcli train-pooled" in capsys.readouterr().err
