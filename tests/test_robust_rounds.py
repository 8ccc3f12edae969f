"""Aggregation rules in real rounds: what is published, recorded, refused, shown and computed again."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import scaffold_client
from protocol_client import take_part
from safetensors.numpy import load_file, save_file
from support.federation import (
    ADAPTER,
    NUM_SAMPLES,
    all_take_part,
    configure,
    noisy,
    read_adapter,
    read_manifest,
    read_update,
    restart,
    stored_hashes,
)
from support.formulas import Formulas

from fedcli import Federation
from fedcli.algos import rules
from fedcli.cli import main
from fedcli.errors import ConfigError, NotReadyError
from fedcli.workspace.history import read_round
from fedcli.workspace.inbox import drop_update
from fedcli.workspace.layout import Workspace
from fedcli.workspace.records import UpdateRecord, file_entry

CLIENTS = 7


@pytest.fixture
def here(small: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small workspace, of three clients, as the current folder."""
    monkeypatch.chdir(small)
    return small


@pytest.fixture(scope="module")
def seven_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of seven clients; tests must not change it."""
    settings = {
        "data.source": None,
        "federation.signatures": "off",
        "federation.clients": CLIENTS,
        "federation.rounds": 3,
        "adapter.rank": 2,
    }
    return Path(Federation.create(tmp_path_factory.mktemp("seven"), preset="demo", settings=settings).path)


@pytest.fixture
def seven(seven_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current folder."""
    copy = Path(shutil.copytree(seven_template, tmp_path / "seven"))
    monkeypatch.chdir(copy)
    return copy


def answer(workspace: Path, hostile: int | None = None, scale: float = -1000.0) -> None:
    """Let all seven clients answer with noise of their own, one of them with a huge one."""
    for client in range(CLIENTS):
        change = noisy(client)
        if client == hostile:
            take_part(workspace, client, lambda x, change=change: x + scale * (change(x) - x), 10 + client)
        else:
            take_part(workspace, client, change, 10 + client)


def vectors(workspace: Path, number: int, clients: list[int]) -> np.ndarray:
    """Return the differences of clients' updates from a round's adapter, a row for each."""
    start = read_adapter(workspace, number)
    rows = [read_update(workspace, number, client) for client in clients]
    return np.array([np.concatenate([(row[name] - start[name]).ravel() for name in sorted(start)]) for row in rows])


def step(workspace: Path, number: int) -> np.ndarray:
    """Return what a merge added to a round's adapter."""
    before, after = read_adapter(workspace, number), read_adapter(workspace, number + 1)
    return np.concatenate([(after[name].astype(float) - before[name]).ravel() for name in sorted(before)])


def expected(rule: str, rows: np.ndarray) -> np.ndarray:
    """Return what a rule makes of rows by formulas in the direct form."""
    norms = np.linalg.norm(rows, axis=1)
    distances = ((rows[:, None] - rows[None]) ** 2).sum(axis=2)
    scores = np.sort(distances, axis=1)[:, 1 : len(rows) - 2].sum(axis=1)  # n - f - 2 = n - 3, behind itself
    match rule:
        case "median":
            return np.median(rows, axis=0)
        case "trimmed_mean":
            return np.sort(rows, axis=0)[1:-1].mean(axis=0)
        case "krum":
            return rows[np.argmin(scores)]
        case "multi_krum":
            return rows[np.argsort(scores)[:-1]].mean(axis=0)
        case "norm_clip":
            return (rows * np.minimum(1, np.median(norms) / norms)[:, None]).mean(axis=0)
    raise AssertionError(rule)


def test_the_median_of_three_takes_the_place_of_the_mean_and_verify_computes_it_again(here, capsys):
    configure(here, "aggregation.rule=median")
    all_take_part(here)
    assert main(["server", "aggregate"]) == 0
    rows = vectors(here, 0, [0, 1, 2])
    assert step(here, 0) == pytest.approx(np.median(rows, axis=0), abs=1e-6)
    aggregation = read_manifest(here, 1)["aggregation"]
    assert aggregation["rule"] == {"rule": "median", "tolerate": 1, "nearest_mixing": False, "weight_cap": None}
    mean = sum(NUM_SAMPLES[client] * rows[client] for client in range(3)) / 500
    for entry, row in zip(aggregation["counted"], rows, strict=True):
        assert entry["weight"] == pytest.approx(1 / 3)
        assert entry["delta_norm"] == pytest.approx(np.linalg.norm(row))
        assert entry["cosine"] == pytest.approx(row @ mean / np.linalg.norm(row) / np.linalg.norm(mean))
    assert main(["verify"]) == 0
    capsys.readouterr()
    assert main(["status"]) == 0
    shown = capsys.readouterr().out
    assert "rule       median (tolerate 1); weights 0: 0.333, 1: 0.333, 2: 0.333 (by client, round 0)" in shown
    assert main(["status", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [update["norm"] for update in document["last_updates"]] == pytest.approx(np.linalg.norm(rows, axis=1))


def test_the_section_with_its_defaults_gives_the_bytes_of_a_federation_without_it(here, tmp_path):
    all_take_part(here)
    other = Path(shutil.copytree(here, tmp_path / "other"))
    configure(other, "aggregation.rule=mean", "aggregation.weight_cap=null", "aggregation.tolerate=1")
    for workspace in (here, other):
        assert main(["server", "aggregate", "-w", str(workspace)]) == 0
    found = [stored_hashes(workspace) for workspace in (here, other)]
    for hashes in found:
        hashes.pop("fedcli.yaml")
    assert found[0] == found[1]
    assert "rule" not in read_manifest(here, 1)["aggregation"]
    assert {*read_manifest(here, 1)["aggregation"]["counted"][0]} == {
        *("client", "update", "weight", "num_samples", "train_loss", "delta_norm", "bytes")
    }


@pytest.mark.parametrize("value", [3e38, pytest.param(-1e10, marks=pytest.mark.slow)])
def test_finite_values_that_would_overflow_are_refused_by_name_and_the_round_goes_on(here, capsys, value):
    take_part(here, 0)
    take_part(here, 1, lambda array: np.full_like(array, value))
    take_part(here, 2)
    assert main(["server", "aggregate"]) == 0
    assert "refused client 1: nonfinite: " in capsys.readouterr().out
    assert [entry["client"] for entry in read_manifest(here, 1)["aggregation"]["counted"]] == [0, 2]
    assert all(np.abs(array).max() < 10 for array in read_adapter(here, 1).values())
    assert main(["verify"]) == 0


def register(workspace: Path, client: int, num_rows: int) -> None:
    """Let a party have joined with so many rows."""
    record = {"protocol": 1, "workspace": read_manifest(workspace, 0)["workspace"], "client": client}
    (workspace / f"clients/{client}.json").write_text(json.dumps(record | {"data": {"num_rows": num_rows}}))


@pytest.mark.parametrize("section", ["{}", pytest.param("{rule: median}", marks=pytest.mark.slow)])
def test_an_update_that_claims_more_rows_than_its_party_registered_is_refused(here, capsys, section):
    configure(here, f"aggregation={section}")
    for client, num_samples in ((0, 1000), (1, 2**53), (2, 999)):
        register(here, client, 1000)
        take_part(here, client, noisy(client), num_samples)
    assert main(["server", "aggregate"]) == 0
    assert (
        "refused client 1: samples: num_samples is 9007199254740992, and the client registered 1000 rows"
        in capsys.readouterr().out
    )
    assert [entry["client"] for entry in read_manifest(here, 1)["aggregation"]["counted"]] == [0, 2]
    register(here, 0, 10)  # it joins again with fewer: what was counted stays counted
    assert main(["verify"]) == 0


@pytest.mark.slow
def test_a_damaged_registration_lets_nobody_claim_any_number_of_rows(here, capsys):
    (here / "clients/1.json").write_text("{")
    all_take_part(here)
    assert main(["server", "aggregate", "--refuse-arriving"]) == 0
    assert "refused client 1: samples: it claims 50 rows, and " in capsys.readouterr().out


@pytest.mark.slow
def test_no_client_weighs_more_than_the_cap_times_the_median(here):
    configure(here, "aggregation.weight_cap=2")
    for client, num_samples in ((0, 10), (1, 20), (2, 2**53)):
        take_part(here, client, noisy(client), num_samples)
    assert main(["server", "aggregate"]) == 0
    weights = [10 / 70, 20 / 70, 40 / 70]
    assert [entry["weight"] for entry in read_manifest(here, 1)["aggregation"]["counted"]] == pytest.approx(weights)
    assert step(here, 0) == pytest.approx(np.array(weights) @ vectors(here, 0, [0, 1, 2]), abs=1e-6)
    assert main(["verify"]) == 0


@pytest.mark.slow
def test_a_weight_or_a_cosine_that_the_rule_does_not_give_is_found(here, capsys):
    configure(here, "aggregation.rule=geometric_median")
    all_take_part(here)
    assert main(["server", "aggregate"]) == 0
    path = here / "rounds/00001/manifest.json"
    manifest = json.loads(path.read_bytes())
    for key, value in (("weight", 0.9), ("cosine", 0.123)):
        changed = json.loads(path.read_bytes())
        changed["aggregation"]["counted"][0][key] = value
        changed.pop("checksum", None)
        path.write_text(json.dumps(changed))
        capsys.readouterr()
        assert main(["verify"]) == 7
        assert "records other weights, losses or norms than the counted updates give" in capsys.readouterr().out
        path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["aggregation.rule=krum"], "aggregation.tolerate is 1: krum then needs 5 updates a round, and 3 count"),
        (["aggregation.rule=median", "aggregation.tolerate=2"], "median then needs 5 updates a round"),
        (["aggregation.nearest_mixing=true", "aggregation.tolerate=2"], "mean with nearest_mixing then needs 5"),
        (["aggregation.rule=krum", "aggregation.weight_cap=3"], "weight_cap is set, and krum takes no account of rows"),
        (["aggregation.rule=medain"], "unknown rule 'medain'. Did you mean median"),
        (["aggregation.weight_cap=0.5"], "aggregation.weight_cap"),
    ],
)
def test_a_setting_that_cannot_hold_is_refused_with_its_key(here, settings, message):
    configure(here, *settings)
    with pytest.raises(ConfigError) as caught:
        Federation.open(here)
    assert message in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.slow
def test_a_refused_update_is_one_hostile_update_less_and_a_missing_one_is_not(here):
    configure(here, "aggregation.rule=trimmed_mean", "federation.quorum=0.5")
    take_part(here, 0, noisy(0))
    take_part(here, 2, noisy(2))
    with pytest.raises(NotReadyError, match="2 updates are valid, and trimmed_mean needs 3 to tolerate 1 hostile"):
        Federation.open(here).server.aggregate()
    take_part(here, 1, lambda array: np.full_like(array, np.nan))
    assert Federation.open(here).server.aggregate().published
    aggregation = read_manifest(here, 1)["aggregation"]
    assert (aggregation["rule"]["tolerate"], [entry["client"] for entry in aggregation["counted"]]) == (0, [0, 2])
    assert main(["verify"]) == 0


@pytest.mark.slow
def test_an_update_whose_tensors_lie_in_an_order_of_their_own_counts_as_any_other(here):
    configure(here, "aggregation.rule=median")
    all_take_part(here)
    other = here / "inbox/1/round-00000"
    arrays = load_file(other / ADAPTER)
    header = {}
    blob = b""
    for name in sorted(arrays, reverse=True):
        data = arrays[name].tobytes()
        header[name] = {"dtype": "F32", "shape": arrays[name].shape, "data_offsets": [len(blob), len(blob) + len(data)]}
        blob += data
    text = json.dumps(header).encode()
    contents = len(text).to_bytes(8, "little") + text + blob
    shutil.rmtree(other)
    drop_file(here, 1, contents)
    assert main(["server", "aggregate"]) == 0
    assert step(here, 0) == pytest.approx(np.median(vectors(here, 0, [0, 1, 2]), axis=0), abs=1e-6)
    assert main(["verify"]) == 0


def drop_file(workspace: Path, client: int, contents: bytes) -> None:
    """Drop an update of round 0 whose adapter has these bytes."""
    base = read_round(Workspace(workspace), 0)
    record = UpdateRecord(
        protocol=1,
        workspace=base.manifest.workspace,
        round=0,
        base=base.sha256,
        client=client,
        num_samples=10,
        steps=1,
        train_loss=None,
        files={ADAPTER: file_entry(contents)},
    )
    assert drop_update(base, client, [(ADAPTER, contents), ("update.json", record.to_bytes())])


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "byte", "nan", "header"])
def test_a_damaged_update_is_refused_with_the_code_that_the_mean_gives(here, capsys, damage):
    all_take_part(here)
    path = here / "inbox/1/round-00000" / ADAPTER
    contents = path.read_bytes()
    if damage == "nan":
        arrays = load_file(path)
        next(iter(arrays.values())).flat[-1] = np.nan
        shutil.rmtree(path.parent)
        save_file(arrays, here / "nan")
        drop_file(here, 1, (here / "nan").read_bytes())
        os.remove(here / "nan")
    else:
        changed = {
            "cut": contents[:-4],
            "byte": contents[:-1] + bytes([contents[-1] ^ 1]),
            "header": b"\xff" * 8 + contents[8:],
        }
        path.write_bytes(changed[damage])
    codes = {}
    for section in ("{}", "{rule: median}"):
        configure(here, f"aggregation={section}")
        assert main(["server", "aggregate", "--refuse-arriving"]) == 0
        aggregation = read_manifest(here, 1)["aggregation"]
        codes[section] = [(entry["client"], entry["code"]) for entry in aggregation["refused"]]
        assert [entry["client"] for entry in aggregation["counted"]] == [0, 2]
        assert main(["verify"]) == 0
        shutil.rmtree(here / "rounds/00001")
    assert codes["{}"] == codes["{rule: median}"] != []


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["norm_clip", "median", "trimmed_mean", "krum", "multi_krum"])
def test_each_rule_publishes_what_its_formula_gives(seven, rule):
    configure(seven, f"aggregation.rule={rule}")
    answer(seven, hostile=3)
    assert main(["server", "aggregate"]) == 0
    assert step(seven, 0) == pytest.approx(expected(rule, vectors(seven, 0, list(range(CLIENTS)))), abs=2e-5)
    weights = [entry["weight"] for entry in read_manifest(seven, 1)["aggregation"]["counted"]]
    assert (weights[3] < 0.01) == (rule in ("norm_clip", "krum", "multi_krum"))
    assert main(["verify"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["mean", *rules.BY_PRODUCTS, *rules.BLOCKWISE])
def test_each_rule_moves_fedyogis_state_and_is_computed_again(seven, rule):
    restart(seven, "fedyogi")
    configure(seven, f"aggregation.rule={rule}", "aggregation.nearest_mixing=true")
    for number in range(2):
        before = read_adapter(seven, number)
        for client in range(CLIENTS):
            take_part(seven, client, noisy(100 * number + client), 10 + client)
        assert main(["server", "aggregate"]) == 0
        after = read_adapter(seven, number + 1)
        assert all(np.isfinite(after[name]).all() and (after[name] != before[name]).any() for name in before)
    assert main(["verify"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["median", "krum", "geometric_median", "centred_clip"])
def test_equal_updates_give_with_every_rule_and_fedyogi_what_the_mean_gives(seven, rule):
    restart(seven, "fedyogi")
    oracle = Formulas(read_adapter(seven, 0), name="fedyogi", num_clients=CLIENTS)
    configure(seven, f"aggregation.rule={rule}")
    for number in range(2):
        for client in range(CLIENTS):
            take_part(seven, client, noisy(number), 10)
        sent = read_update(seven, number, 0)
        assert main(["server", "aggregate"]) == 0
        oracle.step({0: (10, sent, {})})
        oracle.check(seven, number + 1)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["median", "multi_krum"])
def test_scaffolds_controls_are_merged_by_the_rule_on_their_own(seven, rule):
    restart(seven, "scaffold")
    configure(seven, f"aggregation.rule={rule}")
    for client in range(CLIENTS):
        scaffold_client.take_part(seven, client, f"{seven}/home/{client}", 0.1 * client, 10)
    poisoned = seven / "inbox/5/round-00000"
    record = json.loads((poisoned / "update.json").read_bytes())
    control = {name: 1e6 + 0 * array for name, array in load_file(poisoned / "control_delta.safetensors").items()}
    save_file(control, poisoned / "control_delta.safetensors")
    entry = file_entry((poisoned / "control_delta.safetensors").read_bytes())
    record["files"]["control_delta.safetensors"] = {"sha256": entry.sha256, "bytes": entry.bytes}
    record.pop("checksum", None)
    (poisoned / "update.json").write_text(json.dumps(record))
    assert main(["server", "aggregate"]) == 0
    deltas = [load_file(seven / f"inbox/{k}/round-00000/control_delta.safetensors") for k in range(CLIENTS)]
    rows = np.array([np.concatenate([each[name].ravel() for name in sorted(each)]) for each in deltas], float)
    control = load_file(seven / "rounds/00001/control.safetensors")
    found = np.concatenate([control[name].ravel() for name in sorted(control)])
    assert found == pytest.approx(expected(rule, rows), abs=1e-4, rel=1e-5)
    counted = read_manifest(seven, 1)["aggregation"]["counted"]
    if rule == "multi_krum":
        assert counted[5]["file_weights"] == {"control_delta.safetensors": 0.0}
        assert counted[5]["weight"] > 0  # its adapter is as good as any
    assert main(["verify"]) == 0


@pytest.mark.slow
def test_with_a_selection_the_first_valid_updates_of_the_draw_count(seven):
    configure(seven, "federation.per_round=5", "federation.select=7", "aggregation.rule=multi_krum")
    restart(seven, "fedavg")
    order = read_manifest(seven, 0)["selection"]["order"]
    for client in range(CLIENTS):
        broken = client == order[1]
        take_part(seven, client, (lambda x: np.full_like(x, np.inf)) if broken else noisy(client), 10)
    assert main(["server", "aggregate"]) == 0
    aggregation = read_manifest(seven, 1)["aggregation"]
    assert [entry["client"] for entry in aggregation["counted"]] == sorted([order[0], *order[2:6]])
    assert [entry["client"] for entry in aggregation["refused"]] == [order[1]]
    assert aggregation["surplus"] == [order[6]]
    assert aggregation["rule"]["tolerate"] == 0
    assert main(["verify"]) == 0


@pytest.mark.slow
def test_status_and_report_mark_an_update_that_is_unlike_the_others(seven, capsys):
    answer(seven, hostile=3)
    assert main(["server", "aggregate"]) == 0
    capsys.readouterr()
    assert main(["status"]) == 0
    assert "unusual    client 3 in round 0: norm " in capsys.readouterr().out
    assert main(["status", "--json"]) == 0
    assert [entry["unusual"] for entry in json.loads(capsys.readouterr().out)["last_updates"]] == [
        ["norm"] if client == 3 else [] for client in range(CLIENTS)
    ]
    assert main(["report"]) == 0
    page = (seven / "report/report.html").read_text()
    assert "cosine to the mean" in page
    assert "change without it" in page
    assert "norm, cosine, change" in page


@pytest.mark.slow
def test_random_updates_by_a_rule_are_merged_to_the_same_bytes_whatever_the_order_of_arrival(seven):
    answer(seven)
    configure(seven, "aggregation.rule=geometric_median")
    assert main(["server", "aggregate"]) == 0
    first = stored_hashes(seven / "rounds/00001")
    shutil.rmtree(seven / "rounds/00001")
    for client in reversed(range(CLIENTS)):
        os.utime(seven / f"inbox/{client}/round-00000")
    assert main(["server", "aggregate"]) == 0
    assert stored_hashes(seven / "rounds/00001") == first
