"""An audit of federations with privacy: lower bounds stand beside what the ledger promises for as many units."""

import json
from pathlib import Path

import pytest
from support.federation import configure
from support.processes import SMALL, run_ok, settings

from fedcli import Federation
from fedcli.operations.audit_models import Promise

MEASURE = ("audit", "measure", "--fillings", 4, "--rows", 8, "--no-plot", "--id")
ROW = ("privacy.unit=row", "privacy.clip=1.0", "privacy.target={epsilon: 1, delta: 1.0e-5}")


def promised(workspace: Path, *more: str) -> dict[str, dict]:
    """Let client 0 train on canaries, of which some have two copies, in one round; return its models' figures."""
    run_ok("init", "W", *settings(*SMALL, *more), cwd=workspace)
    run_ok("audit", "plant", "--id", 0, "--canaries", 12, "--repeat", "1,2", cwd=workspace / "W")
    run_ok("run", "--rounds", 1, cwd=workspace / "W")
    measured = run_ok(*MEASURE, 0, cwd=workspace / "W")
    return {model["name"]: model for model in measured["models"]}


def test_a_group_of_copies_is_one_unit_and_two_rows_are_two() -> None:
    assert Promise("group", 1.0, 1e-5).of_rows(16) == (1.0, 1e-5)
    assert Promise("row", 1.0, 1e-9).of_rows(2)[0] == 2.0


@pytest.mark.slow
def test_of_rows_the_partys_claim_is_the_upper_bound_of_update_and_aggregate(tmp_path: Path) -> None:
    found = promised(tmp_path, *ROW)
    claim = json.loads((tmp_path / "W/inbox/0/round-00000/update.json").read_bytes())["privacy"]
    assert found["own"]["promise"] == found["aggregate"]["promise"] == claim
    one, two, together = found["own"]["canaries"]
    assert one["promised"][0] == claim["epsilon"]
    assert two["promised"][0] == together["promised"][0] == 2 * claim["epsilon"]
    assert one["bound"]["epsilon"] <= one["promised"][0]


@pytest.mark.slow
def test_of_groups_a_canary_with_all_its_copies_is_one(tmp_path: Path) -> None:
    found = promised(tmp_path, *ROW[1:], "privacy.unit=group", "privacy.group_by=topic")
    claim = json.loads((tmp_path / "W/inbox/0/round-00000/update.json").read_bytes())["privacy"]
    assert [figures["promised"][0] for figures in found["own"]["canaries"]] == [claim["epsilon"]] * 3


@pytest.mark.slow
def test_of_clients_the_ledger_promises_something_of_the_aggregate_alone(tmp_path: Path) -> None:
    found = promised(tmp_path, "privacy.unit=client", "privacy.clip=1.0", "privacy.noise=2.0")
    assert found["own"]["promise"] is None
    spent = run_ok("privacy", "--id", 0, cwd=tmp_path / "W")
    assert found["aggregate"]["promise"]["unit"] == "client"
    assert json.dumps(found["aggregate"]["promise"]["epsilon"]) in json.dumps(spent)
    assert found["aggregate"]["canaries"][0]["promised"][0] == 2 * found["aggregate"]["promise"]["epsilon"]


@pytest.mark.slow
def test_a_round_without_noise_leaves_nothing_promised(tmp_path: Path) -> None:
    run_ok("init", "W", *settings(*SMALL), cwd=tmp_path)
    workspace = tmp_path / "W"
    run_ok("audit", "plant", "--id", 0, "--canaries", 4, "--repeat", "1", cwd=workspace)
    run_ok("run", "--rounds", 1, cwd=workspace)
    configure(workspace, "privacy.unit=client", "privacy.clip=1.0", "privacy.noise=2.0")
    run_ok("run", cwd=workspace)
    assert Federation.open(workspace).round().number == 2
    models = {model["name"]: model for model in run_ok(*MEASURE, 0, cwd=workspace)["models"]}
    assert models["aggregate"]["promise"] is None
