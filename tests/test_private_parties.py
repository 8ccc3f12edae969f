"""Parties where privacy has a unit: what their cards do not tell, what they refuse, and what they count themselves."""

import json
import shutil
from pathlib import Path

import pytest
from protocol_client import take_part
from support.federation import NUM_SAMPLES, configure, noisy, read_manifest, restart, stored_hashes, train_as
from support.processes import SMALL, Run, initialised, runner, settings
from support.warm import write_rows

from fedcli import Federation
from fedcli.errors import ConfigError, FedError, IntegrityError
from fedcli.privacy.accounting import gaussian_epsilon
from fedcli.workspace.floors import USUAL_FLOORS, Asked, check_floors, parse_floors
from fedcli.workspace.history import read_identity
from fedcli.workspace.layout import Workspace, default_home
from fedcli.workspace.privacy_records import PrivacyRecord, TargetRecord
from fedcli.workspace.records import UpdateRecord, parse_update_record

slow = pytest.mark.slow
CLIENT = "privacy={unit: client, clip: 0.5, noise: 1.5}"


@pytest.fixture(scope="module")
def template(small_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of unit client that waits for parties, without signatures; tests must not change it."""
    folder = tmp_path_factory.mktemp("parties") / "W"
    shutil.copytree(small_template, folder, ignore=shutil.ignore_patterns("data"))
    configure(folder, "data.source=null", "federation.signatures=off", CLIENT)
    workspace = Workspace(folder)
    identity = read_identity(workspace).model_copy(update={"simulation": False})
    workspace.identity.write_bytes(identity.to_bytes())
    restart(folder, "fedavg")
    return folder


@pytest.fixture
def workspace(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current folder; homes lie beside it."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "homes"))
    folder = Path(shutil.copytree(template, tmp_path / "W"))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Run:
    return runner(capsys)


def join(workspace: Path, client: int, num_rows: int, *floors: str) -> None:
    """Join with so many rows."""
    rows = [{"instruction": f"say {number}", "output": f"{number}"} for number in range(num_rows)]
    source = write_rows(workspace.parent / f"rows-{client}.jsonl", rows)
    Federation.open(workspace).client(client).join(source, share="full", floors=floors).commit()


def test_the_number_of_rows_stays_at_home_and_is_checked_there(workspace: Path) -> None:
    join(workspace, 0, NUM_SAMPLES[0])
    card = json.loads((workspace / "clients/0.json").read_bytes())
    assert card["data"] == {"format": "alpaca"}
    home = default_home(card["workspace"], 0)
    assert json.loads(home.party.read_bytes())["num_rows"] == NUM_SAMPLES[0]
    train_as(0, workspace)
    record = parse_update_record((workspace / "inbox/0/round-00000/update.json").read_bytes())
    assert record.num_samples == NUM_SAMPLES[0]
    assert record.salt is not None
    assert Federation.open(workspace).server.aggregate(partial=True).published
    assert b"num_rows" not in (workspace / "clients/0.json").read_bytes()


def test_more_rows_change_nothing_that_others_see(workspace: Path) -> None:
    join(workspace, 0, 3)
    write_rows(workspace.parent / "rows-0.jsonl", [{"instruction": "say", "output": f"{n}"} for n in range(9)])
    before = stored_hashes(workspace)
    modified = (workspace / "clients/0.json").stat().st_mtime_ns
    assert Federation.open(workspace).client(0).refresh() == (3, 9)
    assert (stored_hashes(workspace), (workspace / "clients/0.json").stat().st_mtime_ns) == (before, modified)
    assert Federation.open(workspace).client(0).refresh() is None


@slow
def test_two_updates_of_the_same_rows_have_unlike_hashes(workspace: Path) -> None:
    join(workspace, 0, NUM_SAMPLES[0])
    train_as(0, workspace)
    first = (workspace / "inbox/0/round-00000/update.json").read_bytes()
    shutil.rmtree(workspace / "inbox/0/round-00000")
    train_as(0, workspace)
    again = (workspace / "inbox/0/round-00000/update.json").read_bytes()
    salts = {json.loads(contents).pop("salt") for contents in (first, again)}
    assert len(salts) == 2


@slow
def test_a_card_without_a_number_weighs_nothing_where_rows_weigh(workspace: Path) -> None:
    join(workspace, 0, 3)
    configure(workspace, "privacy={}")
    restart(workspace, "fedavg")
    take_part(workspace, 0, noisy(0), 2**50)
    with pytest.raises(FedError, match="no valid update"):
        Federation.open(workspace).server.aggregate(partial=True)


@slow
def test_a_party_whose_number_is_nowhere_is_not_taken_for_a_simulated_one(workspace: Path) -> None:
    join(workspace, 0, 3)
    party = default_home(json.loads((workspace / "workspace.json").read_bytes())["id"], 0).party
    party.write_text(
        json.dumps({key: value for key, value in json.loads(party.read_bytes()).items() if key != "num_rows"})
    )
    with pytest.raises(IntegrityError, match="does not tell how many rows"):
        train_as(0, workspace)


NOISY = PrivacyRecord(unit="client", clip=0.5, noise=1.5, delta=1e-5, expected=3, max_epsilon=4.0)
ROWS = PrivacyRecord(unit="row", clip=0.5, delta=1e-5, target=TargetRecord(epsilon=2.0, delta=1e-5))
SECURE = PrivacyRecord(secure_aggregation="pairwise")


@pytest.mark.parametrize(
    ("floor", "privacy", "told"),
    [
        ("noise=1.5", NOISY, None),
        ("noise=1.6", NOISY, "asks for noise 1.5, and your floor is at least 1.6"),
        ("noise=1", None, "asks for no privacy, and your floor is noise at least 1"),
        ("noise=1", SECURE, "asks for no privacy"),
        ("noise=1", ROWS, None),
        ("clip=0.5", NOISY, None),
        ("clip=0.4", NOISY, "asks for clip 0.5, and your floor is at most 0.4"),
        ("clip=0.4", None, "asks for no privacy"),
        ("max_epsilon=4", NOISY, None),
        ("max_epsilon=3", NOISY, "asks for max_epsilon 4, and your floor is at most 3"),
        ("max_epsilon=3", NOISY.model_copy(update={"max_epsilon": None}), "sets no max_epsilon, and your floor is"),
        ("max_epsilon=3", None, "asks for no privacy"),
        ("max_epsilon=3", ROWS, None),
    ],
)
def test_a_floor_of_privacy_refuses_a_round_that_promises_less(
    small: Path, floor: str, privacy: PrivacyRecord | None, told: str | None
) -> None:
    manifest = Federation.open(small).round().manifest.model_copy(update={"privacy": privacy})
    own, asked = parse_floors([floor], USUAL_FLOORS), Asked.by(manifest, 50)
    if told is None:
        check_floors(own, asked, 0)
        return
    with pytest.raises(ConfigError, match=told) as raised:
        check_floors(own, asked, 0)
    assert raised.value.exit_code == 3
    allowed = [part.split()[0].rstrip("`.") for part in raised.value.hint.split("--floor ")[1:]]
    check_floors(parse_floors(allowed, own), asked, 0)


def test_a_server_that_drops_its_promise_gets_no_update(workspace: Path, run: Run) -> None:
    join(workspace, 0, 3, "noise=1.5")
    train_as(0, workspace)
    assert Federation.open(workspace).server.aggregate(partial=True).published
    path = workspace / "rounds/00001/manifest.json"
    manifest = json.loads(path.read_bytes())
    path.write_text(json.dumps({key: value for key, value in manifest.items() if key not in ("privacy", "checksum")}))
    code, _, err = run("client", "train", "--id", 0)
    assert code == 3
    assert "asks for no privacy, and your floor is noise at least 1.5" in err
    assert not (workspace / "inbox/0/round-00001").exists()


@slow
def test_a_party_counts_the_rounds_itself_and_stops(workspace: Path, run: Run) -> None:
    limit = gaussian_epsilon(1.5, 1e-5, 1) * 1.05
    configure(workspace, f"privacy={{unit: client, clip: 0.5, noise: 1.5, max_epsilon: {limit}}}")
    restart(workspace, "fedavg")
    join(workspace, 0, 3, f"max_epsilon={limit}")
    train_as(0, workspace)
    assert Federation.open(workspace).server.aggregate(partial=True).published
    code, _, err = run("client", "train", "--id", 0)
    assert (code, "client 0 has spent" in err) == (6, True)
    join(workspace, 1, 50, f"max_epsilon={limit}")
    path = workspace / "rounds/00001/manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["privacy"]["delta"] = 0.9  # at which epsilon is 0
    path.write_text(json.dumps({key: value for key, value in manifest.items() if key != "checksum"}))
    code, _, err = run("client", "train", "--id", 1)
    assert (code, "asks for delta 0.9, and your floor is at most 1e-05" in err) == (3, True)


def test_the_column_of_groups_counts_as_used_where_rows_are_split_or_joined(
    workspace: Path, tmp_path: Path, run: Run
) -> None:
    rows = [{"instruction": f"say {n}", "output": f"{n}", "patient": f"p{n % 9}", "ward": "A"} for n in range(40)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    group = "privacy={unit: group, group_by: patient, clip: 0.5, noise: 1.0}"
    configure(workspace, group)
    restart(workspace, "fedavg")
    joining = Federation.open(workspace).client(0).join(source, share="minimal")
    assert "not used: ward (40)" in joining.remarks
    own = (f"data.source={source}", "data.partition=iid", "federation.clients=2", group)
    code, out, err = run("init", tmp_path / "S", *settings(*SMALL, *own))
    assert (code, "ward (40)" in out, "patient" in out) == (0, True, False), err
    write_rows(source, [*rows, {"instruction": "say no", "output": "no"}])
    code, _, err = run("init", tmp_path / "T", *settings(*SMALL, *own))
    assert (code, "line 41: column 'patient' is missing" in err) == (3, True)


def test_what_is_withheld_leaves_no_gap_in_a_sentence(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "homes"))
    workspace = initialised(tmp_path / "W", *SMALL, "data.source=null", CLIENT)
    monkeypatch.chdir(workspace)
    source = write_rows(tmp_path / "rows.jsonl", [{"instruction": f"say {n}", "output": f"{n}"} for n in range(9)])
    code, out, err = run("client", "join", "--id", 0, "--data", source, "--share", "minimal", "--yes")
    assert code == 0, err
    assert "the workspace learns nothing of your rows, not even how many there are" in out + err
    code, _, err = run("server", "enrol", "--id", 0)
    assert code == 2
    assert "client 0 does not tell how many rows it has; its keys have the fingerprint " in err
    said = [run("status")[1], run("doctor")[1], run("client", "status", "--id", 0)[1]]
    assert [text for text in said if "None" in text] == []


@slow
def test_what_would_publish_figures_of_own_rows_is_refused_with_the_reason(workspace: Path, run: Run) -> None:
    join(workspace, 0, 3)
    code, _, err = run("train-alone", "--id", 0)
    assert (code, "would be published in baselines/ without noise" in err) == (3, True)
    code, _, err = run("eval", "rows", "--data", workspace.parent / "rows-0.jsonl", "--base")
    assert (code, "eval/ would tell everybody of them exactly" in err) == (3, True)


@slow
def test_the_keys_of_the_noise_lie_outside_of_the_workspace(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    join(workspace, 0, 3)
    train_as(0, workspace)
    with monkeypatch.context() as patch:
        patch.setenv("FEDCLI_SERVER_HOME", str(workspace / "server"))
        with pytest.raises(FedError, match="where everybody could see the keys of the noise"):
            Federation.open(workspace).server.aggregate(partial=True)
    assert Federation.open(workspace).server.aggregate(partial=True).published
    assert len([*workspace.parent.glob("homes/fedcli/*/server/noise/*.key")]) == 1
    assert [*workspace.rglob("*.key")] == []


def test_a_claim_of_rows_is_carried_by_the_chain(workspace: Path, run: Run) -> None:
    configure(workspace, "privacy={unit: row, clip: 0.5, noise: 1.0}")
    restart(workspace, "fedavg")
    for client in (0, 1):
        take_part(workspace, client, noisy(client), NUM_SAMPLES[client])
    path = workspace / "inbox/0/round-00000/update.json"
    claim = {"unit": "row", "epsilon": 1.25, "delta": 1e-5}
    told = {"privacy": claim, "num_samples": 1, "train_loss": None}
    record = UpdateRecord.model_validate(json.loads(path.read_bytes()) | told)
    path.write_bytes(record.to_bytes())
    assert Federation.open(workspace).server.aggregate(partial=True).published
    counted = read_manifest(workspace, 1)["aggregation"]["counted"]
    assert [entry.get("privacy") for entry in counted] == [claim]
    refused = read_manifest(workspace, 1)["aggregation"]["refused"]
    assert [(entry["client"], entry["code"]) for entry in refused] == [(1, "privacy")]
    assert {entry["num_samples"] for entry in counted} == {None}
    out = run("privacy")[1]
    assert "client 0: claims epsilon 1.25 at delta 1e-05, unit row, of 1 round (round 0)" in out
    assert "client 1" not in out
    assert Federation.open(workspace).verify().violations == []
