"""`fedcli run --workers W`: the same bytes as one process makes, and workers that die."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import time
from multiprocessing import active_children
from pathlib import Path

import pytest
from support.federation import adapter_hashes
from support.processes import ENVIRONMENT, command, run_ok

from fedcli.errors import ConfigError
from fedcli.operations.pool import visible_gpus
from fedcli.operations.workers import Workers
from fedcli.workspace.layout import Workspace


def workers_of(process: subprocess.Popen) -> list[int]:
    """Return the pids of a `run`'s workers that are at work."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_for(condition, seconds: float = 300):
    """Wait until a condition holds, and return what it gave."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def start(workspace: Path, *options: object) -> subprocess.Popen:
    return subprocess.Popen(
        command("run", "--workers", 2, *options),
        cwd=workspace,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.slow
def test_workers_make_the_bytes_of_one_process_though_one_of_them_is_killed(small: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(small, tmp_path / "alone"))
    expected = run_ok("run", cwd=alone)
    running = start(small)
    first = wait_for(lambda: workers_of(running))[0]
    # its client's lock is held: it is in the middle of its work
    wait_for(lambda: any(f'"pid": {first},' in lock.read_text() for lock in small.glob("private/*/lock")))
    os.kill(first, signal.SIGKILL)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert "died (-9); another one tries again" in err
    assert "merged 2 rounds; round 2 is finished" in out
    assert adapter_hashes(small) == adapter_hashes(alone)
    assert expected["num_merged"] == 2
    assert run_ok("verify", cwd=small)["violations"] == []


@pytest.mark.slow
def test_a_client_whose_workers_die_again_and_again_ends_the_run_with_the_cure(small: Path) -> None:
    running = start(small, "--json")
    while running.poll() is None:
        for worker in workers_of(running):
            os.kill(worker, signal.SIGKILL)
        time.sleep(0.05)
    out, err = running.communicate()
    assert running.returncode == 8, err
    document = json.loads(out)
    assert "round 0 cannot close" in document["error"]["message"]
    assert sorted(each["client"] for each in document["failed"]) == [0, 1, 2]
    for failure in document["failed"]:
        assert (failure["exit_code"], failure["round"]) == (8, 0)
        assert "died 3 times, the last time by signal 9" in failure["message"]
        assert "fewer --workers" in failure["hint"]


@pytest.mark.slow
def test_what_a_worker_raises_is_the_error_of_the_command(small: Path) -> None:
    next((small / "data").glob("client-1*")).unlink()
    running = start(small)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 3
    assert "client 1 failed in round 0: client 1 has no rows" in err
    assert "Traceback" not in err
    assert run_ok("status", cwd=small)["missing"] == [1], "the others' work is kept"


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_no_worker_and_loses_nothing(small: Path, sent: signal.Signals) -> None:
    running = start(small)
    workers = wait_for(lambda: workers_of(running))
    running.send_signal(sent)
    running.communicate(timeout=60)
    assert running.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[sent]
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    assert run_ok("run", cwd=small)["state"] == "finished"
    assert run_ok("verify", cwd=small)["violations"] == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [("0,3", ["0", "3"]), ("GPU-aa,MIG-bb", ["GPU-aa", "MIG-bb"]), ("", []), ("-1", []), (" 2 ", ["2"])],
)
def test_workers_share_the_gpus_that_the_command_was_given(
    monkeypatch: pytest.MonkeyPatch, given: str, expected: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_gpus() == expected


def test_an_error_travels_between_processes_with_its_hint() -> None:
    error = pickle.loads(pickle.dumps(ConfigError("what", hint="cure", is_reported=True)))
    assert (type(error), error.message, error.hint, error.is_reported) == (ConfigError, "what", "cure", True)


@pytest.mark.slow
def test_a_worker_that_dies_while_it_has_nothing_to_do_is_replaced(small: Path) -> None:
    class Silent:
        def __getattr__(self, _name: str):
            return lambda *_: None

    with Workers(Workspace(small), 1) as workers:
        assert [result.client for result in workers.train([0], 0, Silent())] == [0]
        (idle,) = active_children()
        os.kill(idle.pid, signal.SIGKILL)
        idle.join()
        assert [result.client for result in workers.train([1], 0, Silent())] == [1]
    assert not active_children()
