"""`client train` for several ids and for --any: what cron on several hosts runs."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.processes import ENVIRONMENT, SMALL, command, fedcli, run_ok, settings

from fedcli.workspace.idle import glance
from fedcli.workspace.layout import Workspace
from fedcli.workspace.locks import hold


@pytest.mark.slow
def test_several_ids_are_trained_one_after_another(small: Path) -> None:
    first = run_ok("client", "train", "--id", "2,0,2", cwd=small)["clients"]
    assert [(each["client"], each["status"]) for each in first] == [(2, "submitted"), (0, "submitted")]
    again = run_ok("client", "train", "--id", "0,1", cwd=small)["clients"]
    assert [(each["client"], each["status"]) for each in again] == [(0, "already_submitted"), (1, "submitted")]
    assert run_ok("server", "aggregate", cwd=small)["round"] == 1


@pytest.mark.slow
def test_any_takes_every_client_that_nobody_trains(small: Path) -> None:
    with hold(small / "private" / "1" / "lock", "client 1"):
        taken = run_ok("client", "train", "--any", cwd=small)
        assert taken["status"] == "submitted"
        assert [(each["client"], each["status"]) for each in taken["clients"]] == [(0, "submitted"), (2, "submitted")]
        assert run_ok("client", "train", "--any", cwd=small) == {"status": "nothing_due", "clients": []}
    assert [each["client"] for each in run_ok("client", "train", "--any", cwd=small)["clients"]] == [1]
    idle = fedcli("client", "train", "--any", cwd=small)
    assert "nothing to do: no client of the open round is here, missing and unclaimed" in idle.stdout


@pytest.mark.slow
def test_any_tells_a_finished_federation_and_a_damaged_round(small: Path) -> None:
    config = small / "fedcli.yaml"
    config.write_text(config.read_text().replace("rounds: 2", "rounds: 1"))
    assert run_ok("client", "train", "--any", cwd=small)["status"] == "submitted"
    run_ok("server", "aggregate", cwd=small)
    assert run_ok("client", "train", "--any", "--wait", 60, cwd=small) == {"status": "finished", "clients": []}
    manifest = small / "rounds" / "00001" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    assert fedcli("client", "train", "--any", cwd=small).returncode == 6  # as while it is copied
    manifest.write_bytes(b"[]")
    assert fedcli("client", "train", "--any", cwd=small).returncode == 7


def test_an_error_of_one_client_does_not_keep_the_others_from_their_turn(small: Path) -> None:
    (rows,) = (small / "data").glob("client-0*")
    rows.write_text('{"instruction": "cut')
    done = fedcli("client", "train", "--any", cwd=small)
    assert done.returncode == 3
    assert "client-0" in done.stderr
    assert run_ok("status", cwd=small)["answered"] == [1, 2]


def test_any_passes_over_clients_whose_rows_are_elsewhere(tmp_path: Path) -> None:
    fedcli("init", *settings(*SMALL, "data.source=null", "federation.signatures=off"), cwd=tmp_path)
    assert run_ok("client", "train", "--any", cwd=tmp_path) == {"status": "nothing_due", "clients": []}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "name clients with --id, or take --any"),
        (["--id", "1", "--any"], "name clients with --id, or take --any"),
        (["--id", "1,x"], "--id 1,x: not a client's id"),
        (["--id", "-1"], "--id -1: not a client's id"),
        (["--id", "1,"], "--id 1,: not a client's id"),
        (["--id", "1,2", "--home", "h"], "--home is one client's folder"),
        (["--any", "--home", "h"], "--home is one client's folder"),
        (["--id", "1,7"], "there is no client 7"),
    ],
)
def test_a_wrong_choice_of_clients_is_a_usage_error_before_any_work(
    small: Path, options: list[str], expected: str
) -> None:
    done = fedcli("client", "train", *options, cwd=small)
    assert done.returncode == 2
    assert expected in done.stderr
    assert not list((small / "inbox").glob("*/round-*"))


@pytest.mark.parametrize("options", [[], ["--wait", 0], ["--wait", 2]])
@pytest.mark.parametrize("due", [0, 2])
def test_any_trains_the_only_client_that_is_due(small: Path, due: int, options: list[object]) -> None:
    for client in {0, 1, 2} - {due}:
        (small / f"inbox/{client}/round-00000").mkdir(parents=True)
    seen = glance(Workspace(small))
    assert seen is not None
    assert seen.may_train
    taken = run_ok("client", "train", "--any", *options, cwd=small)
    assert [(each["client"], each["status"]) for each in taken["clients"]] == [(due, "submitted")]


@pytest.mark.parametrize("options", [["--any"], ["--id", "0"]])
def test_where_nothing_is_due_neither_torch_nor_numpy_nor_rich_is_loaded(small: Path, options: list[str]) -> None:
    run_ok("client", "train", "--any", cwd=small)
    code = f"import sys; from fedcli.cli import main; main(['client', 'train', *{options}]); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=small, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert "nothing to do" in done.stdout
    assert loaded & {"torch", "numpy", "transformers", "rich", "safetensors", "pyarrow"} == set()


@pytest.mark.slow
def test_six_cron_like_loops_hammer_a_workspace_while_rounds_advance_without_an_error(small: Path) -> None:
    """FEDCLI_HAMMER_SECONDS=120 for the long form."""
    config = small / "fedcli.yaml"
    config.write_text(config.read_text().replace("rounds: 2", "rounds: 500"))
    end = time.monotonic() + float(os.environ.get("FEDCLI_HAMMER_SECONDS", "25"))

    def loop(allowed: set[int], *arguments: object) -> list[dict]:
        documents = []
        while time.monotonic() < end or not (small / "rounds" / "00002").exists():
            line = command(*arguments, "--json")
            done = subprocess.run(line, cwd=small, env=ENVIRONMENT, capture_output=True, text=True, check=False)
            assert done.returncode in allowed, done.stderr
            documents.append(json.loads(done.stdout))
            time.sleep(0.5)
        return documents

    with ThreadPoolExecutor(7) as pool:
        server = pool.submit(loop, {0, 5, 6}, "server", "aggregate")
        trainers = [pool.submit(loop, {0}, "client", "train", "--any", "--wait", 0) for _ in range(6)]
        trained = [each for trainer in trainers for document in trainer.result() for each in document["clients"]]
    head = run_ok("status", cwd=small)["round"]
    assert head == sum(document.get("status") == "published" for document in server.result())
    who = [(each["round"], each["client"]) for each in trained]
    assert len(set(who)) == len(who), "nobody trains what another one does"
    assert {(number, client) for number in range(head) for client in range(3)} <= set(who)
    assert run_ok("verify", cwd=small)["violations"] == []
