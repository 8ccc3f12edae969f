"""What status and aggregate do grows with the cohort, not with the federation or its history: calls are counted."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from protocol_client import take_part
from support.federation import all_take_part, configure, read_manifest

from fedcli import Federation
from fedcli.workspace.history import read_identity
from fedcli.workspace.layout import Workspace
from fedcli.workspace.registrations import DataCard, Registration, joined_clients, register


def num_calls(work: Callable[[], object]) -> int:
    """Return how many functions are called, Python's and C's, in the second of two runs."""
    count = 0

    def hook(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    work()
    sys.setprofile(hook)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def calls(workspace: Path) -> dict[str, int]:
    """Return how much each command does; the cohort has answered."""
    number = max(int(path.name) for path in (workspace / "rounds").iterdir())
    for client in read_manifest(workspace, number)["cohort"]:
        take_part(workspace, client)
    here = Workspace(workspace)
    return {
        "status": num_calls(lambda: Federation(here).status()),
        "client status": num_calls(lambda: Federation(here).client(0).status()),
        "aggregate": num_calls(lambda: Federation(here).server.aggregate(dry_run=True)),
    }


@pytest.fixture
def small_calls(small: Path) -> dict[str, int]:
    """What the commands do in round 1 of three clients."""
    configure(small, "federation.rounds=20")
    all_take_part(small)
    Federation.open(small).server.aggregate()
    return calls(small)


def test_it_does_not_grow_with_the_history(small, small_calls):
    for _ in range(12):
        Federation.open(small).server.aggregate()
        all_take_part(small)
    found = calls(small)
    assert all(found[name] < 1.05 * small_calls[name] + 100 for name in found), (found, small_calls)


def test_it_does_not_grow_with_the_number_of_clients(small, small_calls, tmp_path):
    large = Path(shutil.copytree(small, tmp_path / "large"))
    identity = json.loads((large / "workspace.json").read_bytes())
    identity["fixed"]["federation.clients"] = 50_000
    (large / "workspace.json").write_text(json.dumps(identity))
    configure(large, "federation.clients=50000", "federation.per_round=3")
    Federation.open(large).server.aggregate()
    assert max(read_manifest(large, 2)["cohort"]) > 3
    found = calls(large)
    assert all(found[name] < 1.05 * small_calls[name] + 100 for name in found), (found, small_calls)


def test_the_joined_are_those_with_a_registration_of_their_own_id(small):
    workspace = Workspace(small)
    for client in (0, 2):
        own = Registration(workspace=read_identity(workspace).id, client=client, data=DataCard(num_rows=1))
        register(workspace, own)
    for name in ("1.json", "01.json", "3.json", "x.json", "1", ".1.json", "-1.json", "\u0661.json"):
        (small / "clients" / name).touch()
    assert [*joined_clients(workspace, 3)] == [0, 2]
