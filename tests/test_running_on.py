"""Clients that fail: `run`, its workers, `client train --any` and `--id` go on with the others, and say who and why."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.federation import adapter_hashes, configure, read_manifest
from support.processes import ENVIRONMENT, SMALL, command, fedcli, run_ok, settings
from support.warm import Place, write_rows

SERIAL, WORKERS = (), ("--workers", 2)


def rows_of(workspace: Path, client: int) -> Path:
    return workspace / "data" / f"client-{client}.jsonl"


def too_long(workspace: Path, client: int) -> str:
    write_rows(rows_of(workspace, client), [{"instruction": "word " * 3000, "input": "", "output": "red"}] * 3)
    return "none of its 3 rows is usable at max_length 128 (3 too long)"


def cut_off(workspace: Path, client: int) -> str:
    rows_of(workspace, client).write_text('{"instruction": "cut')
    return "line 1 is"


def gone(workspace: Path, client: int) -> str:
    rows_of(workspace, client).unlink()
    return f"client {client} has no rows"


def make(folder: Path, *overrides: str) -> Path:
    """Return a new workspace."""
    folder.mkdir()
    done = fedcli("init", *settings(*SMALL, *overrides), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def by_hand(workspace: Path, folder: Path, clients: list[list[int]]) -> list[str]:
    """Let these clients alone take part in each round, by separate commands; return the rounds' adapters' hashes."""
    copy = Path(shutil.copytree(workspace, folder))
    for cohort in clients:
        for client in cohort:
            run_ok("client", "train", "--id", client, cwd=copy)
        run_ok("server", "aggregate", cwd=copy)
    return adapter_hashes(copy)


@pytest.mark.parametrize(
    ("break_rows", "failing", "options"),
    [
        (too_long, 1, SERIAL),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((too_long, 0, SERIAL), (gone, 2, SERIAL), (too_long, 1, WORKERS), (cut_off, 0, WORKERS))
        ),
    ],
)
def test_a_round_is_merged_by_its_quorum_without_the_client_that_fails(
    break_rows: Callable, failing: int, options: tuple, small: Path, tmp_path: Path
) -> None:
    configure(small, "federation.quorum=.6")
    others = [client for client in range(3) if client != failing]
    expected = by_hand(small, tmp_path / "others", [others, others])
    reason = break_rows(small, failing)
    done = fedcli("run", *options, cwd=small, timeout=120) if options else fedcli("run", cwd=small)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(reason) == 1, "named once"
    assert f"client {failing} failed in round 0: " in done.stderr
    assert f"client {failing} failed in round 1, again" in done.stderr, "it is tried again in the next round"
    assert "merged 2 rounds; round 2 is finished" in done.stdout
    assert adapter_hashes(small) == expected
    for number in (1, 2):
        assert read_manifest(small, number)["aggregation"]["missing"] == [failing]
    assert run_ok("verify", cwd=small)["violations"] == []


@pytest.mark.slow
@pytest.mark.parametrize("options", [SERIAL, WORKERS])
def test_a_round_that_cannot_close_ends_the_run_with_the_clients_code_once_the_others_are_trained(
    options: tuple, small: Path
) -> None:
    reason = too_long(small, 0)
    done = fedcli("run", *options, "--json", cwd=small, timeout=120) if options else fedcli("run", "--json", cwd=small)
    assert done.returncode == 3
    document = json.loads(done.stdout)
    assert document["error"]["exit_code"] == 3
    assert "round 0 cannot close: 3 of its 3 clients must answer, 2 have, and client 0 failed" in done.stderr
    (failure,) = document["failed"]
    assert (failure["client"], failure["round"], failure["exit_code"]) == (0, 0, 3)
    assert reason in failure["message"]
    assert "raise train.max_length" in failure["hint"]
    assert run_ok("status", cwd=small)["answered"] == [1, 2]
    shutil.copy(rows_of(small, 1), rows_of(small, 0))
    assert run_ok("run", cwd=small)["state"] == "finished", "mended, it goes on"


@pytest.mark.slow
@pytest.mark.parametrize("options", [SERIAL, WORKERS])
def test_two_of_five_may_fail_where_three_are_enough_and_three_may_not(tmp_path: Path, options: tuple) -> None:
    workspace = make(tmp_path / "W", "federation.clients=5", "federation.quorum=.6", "federation.rounds=1")
    expected = by_hand(workspace, tmp_path / "others", [[0, 2, 3]])
    too_long(workspace, 1)
    gone(workspace, 4)
    third = Path(shutil.copytree(workspace, tmp_path / "third"))
    document = json.loads(fedcli("run", "--json", *options, cwd=workspace, timeout=120).stdout)
    assert document["state"] == "finished"
    assert sorted(each["client"] for each in document["failed"]) == [1, 4]
    assert adapter_hashes(workspace) == expected
    cut_off(third, 0)
    done = fedcli("run", *options, cwd=third, timeout=120)
    assert done.returncode == 3
    assert run_ok("status", cwd=third)["answered"] == [2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("options", [SERIAL, WORKERS])
def test_where_all_fail_the_run_ends_with_each_of_them_named(small: Path, options: tuple) -> None:
    for client in range(3):
        too_long(small, client)
    done = fedcli("run", *options, cwd=small, timeout=120)
    assert done.returncode == 3
    for client in range(3):
        assert done.stderr.count(f"client {client} failed in round 0: ") == 1
    assert "0 have, and clients 0, 1 and 2 failed" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("options", [SERIAL, WORKERS])
def test_another_client_of_the_cohort_takes_the_place_of_one_that_fails(tmp_path: Path, options: tuple) -> None:
    workspace = make(
        tmp_path / "W", "federation.per_round=2", "federation.select=3", "federation.rounds=1", "federation.quorum=1"
    )
    drawn = fedcli("status", "--json", cwd=workspace)
    assert json.loads(drawn.stdout)["num_counted"] == 2
    assert sorted(json.loads(drawn.stdout)["cohort"]) == [0, 1, 2]
    undisturbed = Path(shutil.copytree(workspace, tmp_path / "undisturbed"))
    run_ok("run", cwd=undisturbed)
    first = read_manifest(undisturbed, 1)["aggregation"]["counted"][0]["client"]
    rest = sorted({0, 1, 2} - {first})
    expected = by_hand(workspace, tmp_path / "others", [rest])
    too_long(workspace, first)
    done = fedcli("run", *options, cwd=workspace, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(each["client"] for each in read_manifest(workspace, 1)["aggregation"]["counted"]) == rest
    assert adapter_hashes(workspace) == expected


@pytest.mark.slow
@pytest.mark.parametrize("options", [SERIAL, WORKERS])
def test_a_client_that_failed_in_one_round_only_takes_part_in_the_next(small: Path, options: tuple) -> None:
    configure(small, "federation.quorum=.6")
    rows = rows_of(small, 2).read_bytes()
    gone(small, 2)
    assert fedcli("run", *options, "--rounds", 1, cwd=small, timeout=120).returncode == 0
    rows_of(small, 2).write_bytes(rows)
    done = fedcli("run", *options, cwd=small, timeout=120)
    assert done.returncode == 0
    assert "failed" not in done.stderr
    counted = [sorted(e["client"] for e in read_manifest(small, n)["aggregation"]["counted"]) for n in (1, 2)]
    assert counted == [[0, 1], [0, 1, 2]]


@pytest.mark.slow
def test_a_client_whose_workers_are_killed_again_and_again_is_left_out(small: Path, tmp_path: Path) -> None:
    configure(small, "federation.quorum=.6", "federation.rounds=1")
    expected = by_hand(small, tmp_path / "others", [[0, 2]])
    running = subprocess.Popen(
        command("run", "--workers", 2), cwd=small, env=ENVIRONMENT, stdout=-1, stderr=subprocess.PIPE, text=True
    )
    lock = small / "private/1/lock"
    killed: set[int] = set()
    while running.poll() is None:
        try:
            pid = json.loads(lock.read_text())["pid"]
            if pid not in killed and b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                killed.add(pid)
                os.kill(pid, signal.SIGKILL)
        except (OSError, ValueError, KeyError):
            time.sleep(0.005)
    _, err = running.communicate()
    if len(killed) >= 3:  # it was caught in each of its tries
        assert "the worker that trains it died 3 times, the last time by signal 9" in err
        assert adapter_hashes(small) == expected
    assert running.returncode == 0, err


@pytest.mark.slow
@pytest.mark.parametrize("options", [SERIAL, WORKERS])
def test_a_bug_in_one_clients_training_loses_nothing_of_the_others(small: Path, tmp_path: Path, options: tuple) -> None:
    """A package's algorithm raises for the client with an id that it does not like."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "picky.py").write_text(
        """
from dataclasses import dataclass
from typing import Literal
from fedcli.algos import Algorithm

@dataclass(frozen=True, kw_only=True)
class Picky(Algorithm):
    name: Literal["picky"] = "picky"

    def client_step(self, adapter, values, state, own, *, steps, learning_rate):
        if any(abs(array).sum() for array in values.values()) and Picky.turns.pop(0):
            raise KeyError("a bug")
        return super().client_step(adapter, values, state, own, steps=steps, learning_rate=learning_rate)

Picky.turns = [True] + [False] * 99
"""
    )
    info = package / "picky-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: picky\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[fedcli.algorithms]\npicky = picky:Picky\n")
    environment = ENVIRONMENT | {"PYTHONPATH": str(package)}

    def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
        return subprocess.run(
            command(*arguments), cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    workspace = tmp_path / "W"
    workspace.mkdir()
    made = run("init", *settings(*SMALL, "algorithm.name=picky", "federation.quorum=.3"), cwd=workspace)
    assert made.returncode == 0, made.stderr
    done = run("run", *options, "--rounds", 1, "--debug", cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert "failed in round 0: internal error: KeyError: 'a bug'" in done.stderr
    assert "This is a bug." in done.stderr
    assert "Traceback" in done.stderr, "--debug shows where it was"


@pytest.mark.slow
def test_any_names_who_failed_prints_what_the_others_did_and_ends_with_that_code(small: Path) -> None:
    reason = too_long(small, 0)
    done = fedcli("client", "train", "--any", cwd=small)
    assert done.returncode == 3
    assert done.stderr.count(reason) == 1
    assert "client 1: trained in round 0" in done.stdout
    assert "client 2: trained in round 0" in done.stdout
    again = fedcli("client", "train", "--any", "--json", cwd=small)
    assert again.returncode == 3, "a cron job notices each time"
    document = json.loads(again.stdout)
    assert document["status"] == "failed"
    assert document["clients"] == []
    assert [(each["client"], each["exit_code"]) for each in document["failed"]] == [(0, 3)]
    assert document["error"]["message"] == "client 0 could not be trained"


def test_any_fails_for_a_simulated_client_whose_rows_are_gone_and_does_not_call_that_nothing(small: Path) -> None:
    for client in (1, 2):
        (small / f"inbox/{client}/round-00000").mkdir(parents=True)
    gone(small, 0)
    done = fedcli("client", "train", "--any", cwd=small)
    assert done.returncode == 3
    assert "client 0 failed in round 0: client 0 has no rows" in done.stderr


@pytest.mark.slow
def test_a_run_without_a_terminal_writes_a_line_a_round_and_now_and_then_one_of_its_steps(small: Path) -> None:
    done = fedcli("run", cwd=small)
    lines = done.stderr.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["round 0", "round 1"]
    assert "3 clients" in lines[0]
    code = (
        "from fedcli.commands import output; output.SILENCE = 0; from fedcli.cli import main; raise SystemExit(main())"
    )
    again = make(small.parent / "again", "federation.rounds=1")
    told = subprocess.run(
        [sys.executable, "-c", code, "run"], cwd=again, env=ENVIRONMENT, capture_output=True, text=True, check=True
    ).stderr
    for client in range(3):
        assert f"round 0/1, client {client}: step 2, loss " in told


def test_status_names_clients_and_not_numbers(small: Path) -> None:
    run_ok("client", "train", "--id", 0, cwd=small)
    said = fedcli("status", cwd=small).stdout
    assert "answered   client 0\n" in said
    assert "missing    clients 1 and 2\n" in said


@pytest.mark.slow
def test_several_ids_are_trained_though_the_first_fails(small: Path) -> None:
    gone(small, 2)
    done = fedcli("client", "train", "--id", "2,1,0", "--json", cwd=small)
    assert done.returncode == 3
    document = json.loads(done.stdout)
    assert [(each["client"], each["status"]) for each in document["clients"]] == [(1, "submitted"), (0, "submitted")]
    assert [each["client"] for each in document["failed"]] == [2]


@pytest.mark.slow
def test_a_joined_party_whose_rows_or_base_are_gone_is_left_out(tmp_path: Path) -> None:
    from support.processes import warm

    place = Place(tmp_path, warm())
    place(
        "init",
        "W",
        *settings(
            *SMALL, "data.source=null", "federation.signatures=off", "federation.quorum=.3", "federation.rounds=1"
        ),
    )
    for client in range(3):
        place.join(client, place.rows(f"rows-{client}.jsonl", 20, f"w{client}"), at_default=True)
    (tmp_path / "rows-1.jsonl").unlink()
    write_rows(tmp_path / "rows-2.jsonl", [{"instruction": "say", "output": "another"}])
    done = place("run", "-w", "W")
    assert "client 1 failed in round 0: " in done.stderr
    assert "client 2 failed in round 0: client 2 joined with 20 rows, and now has 1" in done.stderr
    assert [each["client"] for each in read_manifest(tmp_path / "W", 1)["aggregation"]["counted"]] == [0]


@pytest.mark.slow
@pytest.mark.parametrize("options", [SERIAL, WORKERS])
def test_a_client_for_which_memory_is_too_small_is_left_out(small: Path, options: tuple) -> None:
    """What PyTorch's allocator raises is raised in its place, for the rows of one client."""
    configure(small, "federation.quorum=.6", "federation.rounds=1")
    code = """
import sys
import fedcli.client.runtime as runtime
train = runtime.Runtime.train
def scarce(self, adapter, settings, *, party, **rest):
    with runtime._enough_memory():
        if party.client == 1:
            import torch
            torch.empty(2**60, dtype=torch.uint8)
    return train(self, adapter, settings, party=party, **rest)
runtime.Runtime.train = scarce
if __name__ == "__main__":
    from fedcli.cli import main
    sys.exit(main(sys.argv[1:]))
"""
    (small / "scarce.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "scarce.py", "run", *map(str, options)],
        cwd=small, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "client 1 failed in round 0: this machine's memory is too small for this training" in done.stderr
    assert "train.micro_batch_size" in done.stderr
    assert [each["client"] for each in read_manifest(small, 1)["aggregation"]["counted"]] == [0, 2]


@pytest.mark.slow
@pytest.mark.parametrize("options", [SERIAL, WORKERS])
def test_an_interrupted_run_ends_at_once_and_trains_nobody_else(small: Path, options: tuple) -> None:
    configure(small, "train.steps=2000")
    too_long(small, 0)
    running = subprocess.Popen(
        command("run", *options), cwd=small, env=ENVIRONMENT, stdout=-1, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not (small / "private/1/lock").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    assert running.returncode == 130
    assert not list((small / "inbox").glob("*/round-*"))


@pytest.mark.slow
def test_a_round_with_a_deadline_waits_for_it_where_somebody_has_answered(tmp_path: Path) -> None:
    workspace = make(tmp_path / "W", "federation.deadline=20s", "federation.rounds=1")
    too_long(workspace, 1)
    document = json.loads(fedcli("run", "--json", cwd=workspace).stdout)
    assert document["state"] == "finished"
    assert [each["client"] for each in document["failed"]] == [1]
