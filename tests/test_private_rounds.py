"""Privacy of rows and groups at the party, in real rounds: the ledger of steps, the budget, the claim, refusals."""

import json
import shutil
import stat
from pathlib import Path

import pytest
from protocol_client import take_part
from support.federation import NUM_SAMPLES, configure, read_manifest, train_as
from support.processes import SMALL, fedcli, settings

from fedcli import Federation
from fedcli.errors import ConfigError, IntegrityError, NotReadyError
from fedcli.privacy.accounting import poisson_epsilon
from fedcli.workspace.inbox import read_update
from fedcli.workspace.layout import Home, Workspace
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.step_ledger import StepsRecord, charge, read_steps, spent

PRIVATE = (*SMALL, "privacy.unit=row", "privacy.clip=0.5", "privacy.noise=1.5", "privacy.delta=1e-4")
"""Two rounds of two steps, batches of 4 rows."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulation whose parties protect rows, with round 0 open."""
    folder = tmp_path_factory.mktemp("private")
    done = fedcli("init", *settings(*PRIVATE), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def private(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "workspace"))


def record(number: int, **changes: object) -> StepsRecord:
    values = {
        **{"time": 1.0, "round": number, "manifest": f"{number:064x}", "unit": "row", "group_by": None},
        **{"num_units": 40, "q": 0.1, "clip": 0.5, "noise": 1.5, "steps": 2},
    }
    return StepsRecord.model_validate(values | changes)


def rewrite(workspace: Path, client: int, **changes: object) -> None:
    """Change update.json of a client's update of round 0."""
    path = workspace / "inbox" / str(client) / "round-00000" / "update.json"
    document = json.loads(path.read_bytes()) | {"num_samples": 1} | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value != "absent"}))


# The ledger


def test_a_line_that_a_kill_cut_short_is_none_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    assert (read_steps(home), spent(home, 1e-4)) == ([], None)
    charge(home, record(0))
    with home.steps.open("ab") as file:
        file.write(b'{"clip": 0.5, "gro')
    assert read_steps(home) == [record(0)]
    charge(home, record(1))
    assert read_steps(home) == [record(0), record(1)]
    assert stat.S_IMODE(home.steps.stat().st_mode) == 0o600
    lines = home.steps.read_bytes().splitlines(keepends=True)
    home.steps.write_bytes(lines[0][:30] + b"\n" + lines[1])
    with pytest.raises(IntegrityError, match="line 1, is no record"):
        read_steps(home)


def test_steps_of_two_units_are_not_added_up(tmp_path: Path) -> None:
    home = Home(tmp_path)
    charge(home, record(0))
    charge(home, record(1, unit="group", group_by="patient"))
    with pytest.raises(IntegrityError, match="the unit row, and now it is group by patient"):
        spent(home, 1e-5)


# Refusals


CLAIM = {"unit": "row", "epsilon": 2.0, "delta": 1e-4}


def test_an_update_without_the_claim_that_its_round_asks_for_is_refused(private: Path) -> None:
    manifest = json.loads((private / "rounds/00000/manifest.json").read_bytes())
    assert (manifest["privacy"]["unit"], manifest["privacy"]["delta"]) == ("row", 1e-4)
    for client in NUM_SAMPLES:
        take_part(private, client)
    faults = [
        ({}, "claims no privacy"),
        ({"privacy": CLAIM | {"unit": "group"}}, "claims unit group"),
        ({"privacy": CLAIM | {"delta": 1e-3}}, "at delta 0.001"),
        ({"privacy": CLAIM, "num_samples": 7}, "how many rows"),
        ({"privacy": CLAIM, "train_loss": 1.25}, "its loss"),
        ({"privacy": CLAIM | {"epsilon": -1.0}}, "privacy.epsilon"),
        ({"privacy": CLAIM | {"epsilon": "2"}}, "privacy.epsilon"),
    ]
    head = Federation.open(private).state.head
    for changes, reason in faults:
        rewrite(private, 1, **{"privacy": "absent", **changes})
        with pytest.raises(Refusal, match=reason) as caught:
            read_update(head, 1)
        assert caught.value.code == ("json" if "epsilon" in reason else "privacy")
    rewrite(private, 0, privacy=CLAIM)
    rewrite(private, 1, privacy="absent")
    rewrite(private, 2, privacy=CLAIM)
    Federation.open(private).server.aggregate()
    merged = read_manifest(private, 1)["aggregation"]
    assert [(entry["client"], entry["weight"]) for entry in merged["counted"]] == [(0, 0.5), (2, 0.5)]
    assert [(entry["client"], entry["code"]) for entry in merged["refused"]] == [(1, "privacy")]


# The budget


def test_the_budget_stops_a_client_before_it_trains_and_what_it_spent_stays(private: Path) -> None:
    """Client 1 has 50 rows: q = 4 / 50, two steps a round."""
    first, second = (poisson_epsilon([(4 / 50, 1.5, steps)], 1e-4) for steps in (2, 4))
    configure(private, f"privacy.max_epsilon={(first + second) / 2}")
    shutil.rmtree(private / "rounds")
    Federation(Workspace(private)).server.open()
    train_as(1, private)
    update = json.loads((private / "inbox/1/round-00000/update.json").read_bytes())
    assert (update["num_samples"], update["train_loss"], update["steps"]) == (1, None, 2)
    assert (update["privacy"]["unit"], update["privacy"]["delta"]) == ("row", 1e-4)
    assert first <= update["privacy"]["epsilon"] <= 1.1 * first
    home = Workspace(private).private(1)
    assert spent(home, 1e-4).epsilon == pytest.approx(first, rel=1e-9)
    Federation.open(private).server.aggregate(partial=True)
    before = home.steps.read_bytes()
    with pytest.raises(NotReadyError) as caught:
        train_as(1, private)
    assert caught.value.exit_code == 6
    told = f"have spent epsilon {first:.4g} of {(first + second) / 2:.4g}"
    assert told in caught.value.message
    assert f"{(second - first) / 2:.4g} is left, and the round costs {second - first:.4g}" in caught.value.message
    assert home.steps.read_bytes() == before
    assert not (private / "inbox/1/round-00001").exists()


def test_a_counted_update_that_the_ledger_does_not_have_stops_the_party(private: Path) -> None:
    train_as(1, private)
    Federation.open(private).server.aggregate(partial=True)
    Workspace(private).private(1).steps.unlink()
    with pytest.raises(IntegrityError, match="steps of round 0, whose update was counted"):
        train_as(1, private)


def test_rounds_without_privacy_before_are_not_forgotten(small: Path) -> None:
    train_as(1, small)
    Federation.open(small).server.aggregate(partial=True)
    configure(small, "privacy.unit=row", "privacy.clip=1.0", "privacy.noise=2.0")
    manifest = small / "rounds/00001"
    shutil.rmtree(manifest)
    Federation.open(small).server.aggregate(partial=True)
    with pytest.raises(ConfigError, match="round 0 was made without noise at the party"):
        train_as(1, small)
