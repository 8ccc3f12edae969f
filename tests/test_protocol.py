"""docs/PROTOCOL.md is enough: clients of 40 lines, written from it, and a real server agree."""

import ast
import errno
import hashlib
import json
import math
import re
import shutil
import sys
import textwrap
import types
from dataclasses import asdict
from pathlib import Path

import numpy as np
import protocol_client
import pytest
import scaffold_client
from protocol_client import take_part
from safetensors import safe_open
from safetensors.numpy import load_file, save
from support.damage import as_bfloat16, replace_adapter, replace_file
from support.federation import (
    ADAPTER,
    CONTROL_DELTA,
    NUM_SAMPLES,
    all_take_part,
    answer,
    configure,
    noisy,
    read_adapter,
    read_manifest,
    read_update,
    stored_hashes,
)
from support.processes import SMALL, fedcli, settings

from fedcli import Federation
from fedcli.algos import ALGORITHMS
from fedcli.model.base import find_base
from fedcli.randomness import draw_cohort
from fedcli.workspace.inbox import drop_update
from fedcli.workspace.layout import Workspace

PAGE = Path(__file__).parent.parent / "docs" / "PROTOCOL.md"


def test_the_protocol_client_is_short_and_has_nothing_of_fedcli():
    source = Path(protocol_client.__file__).read_text()
    assert len(source.splitlines()) <= 40
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported == {"json", "hashlib", "numpy", "safetensors", "os"}
    assert "fedcli" not in re.sub('""".*?"""', "", Path(scaffold_client.__file__).read_text(), flags=re.DOTALL)


def test_the_server_merges_what_protocol_clients_drop(small):
    all_take_part(small)
    done = fedcli("server", "aggregate", cwd=small)
    assert done.returncode == 0, done.stderr
    aggregation = read_manifest(small, 1)["aggregation"]
    assert [entry["client"] for entry in aggregation["counted"]] == [0, 1, 2]
    assert (aggregation["refused"], aggregation["missing"]) == ([], [])
    merged = read_adapter(small, 1)
    updates = {client: read_update(small, 0, client) for client in NUM_SAMPLES}
    for name, array in merged.items():
        mean = sum(n * updates[client][name] for client, n in NUM_SAMPLES.items()) / 500
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, mean, rtol=0, atol=1e-7)


def test_half_precision_updates_are_counted_and_the_global_adapter_stays_float32(small):
    all_take_part(small)
    exact = {client: read_update(small, 0, client) for client in NUM_SAMPLES}
    halves = {name: array.astype(np.float16) for name, array in exact[0].items()}
    replace_adapter(small / "inbox" / "0" / "round-00000", save(halves))
    replace_adapter(small / "inbox" / "1" / "round-00000", as_bfloat16(exact[1]))
    assert fedcli("server", "aggregate", cwd=small).returncode == 0
    manifest = read_manifest(small, 1)
    assert [entry["client"] for entry in manifest["aggregation"]["counted"]] == [0, 1, 2]
    assert {entry["dtype"] for entry in manifest["tensors"].values()} == {"F32"}
    for name, array in read_adapter(small, 1).items():
        # Cutting 16 bits off a float32 of sign, exponent and 23 bits leaves 7 bits: the remainder is dropped.
        cut = exact[1][name].astype(np.float32)
        cut = (cut.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
        mean = (3 * halves[name].astype(np.float64) + 50 * cut + 447 * exact[2][name]) / 500
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, mean, rtol=0, atol=1e-7)
    assert Federation(Workspace(small)).verify().violations == []


def test_the_manifest_has_every_key_of_the_page_with_its_value(small):
    section = PAGE.read_text().split("## manifest.json\n")[1].split("\n\n")[0]
    documented = re.findall(r"^    ([a-z_]+) ", section, re.MULTILINE)
    pieces = dict(zip(documented, re.split(r"^    [a-z_]+ ", section, flags=re.MULTILINE)[1:], strict=True))
    all_take_part(small)
    Federation.open(small).server.aggregate()
    manifest = read_manifest(small, 1)
    # of updates that carry a part, of signatures, of privacy, of regions, and of clusters
    optional = {"update_tensors", "share", "private", "enrolment", "fedcli", "privacy", "relay", "clusters"}
    assert set(documented) - optional == set(manifest)
    assert len(documented) == len(manifest) + 8 == 28
    for key in ("model", "cost"):
        assert set(re.findall('"([a-z_]+)"', pieces[key])) - {"none", "int8", "nf4"} == manifest[key].keys()
    names = re.sub(r"\([^)]*\)", "", pieces["train"].partition(":")[2]).partition(".")[0]
    assert {name.strip() for name in re.split("[,;]", names)} - {"else null"} == manifest["train"].keys()
    first = small / "rounds" / "00000" / "manifest.json"
    tensors = {name: {"shape": list(array.shape), "dtype": "F32"} for name, array in read_adapter(small, 1).items()}
    expected = {
        "protocol": 1,
        "workspace": json.loads((small / "workspace.json").read_bytes())["id"],
        "round": 1,
        "rounds": 2,
        "state": "open",
        "parent": hashlib.sha256(first.read_bytes()).hexdigest(),
        "task": "sft",
        "algorithm": {"name": "fedavg"},
        "cohort": [0, 1, 2],
        "update_files": [ADAPTER],
        "model": read_manifest(small, 0)["model"],
        "tensors": tensors,
        "history": [{"round": 0, "algorithm": {"name": "fedavg"}}],
    }
    assert {key: manifest[key] for key in expected} == expected
    assert manifest["model"].keys() == {"base", "revision", "fingerprint", "quantization", "num_parameters"}
    assert (manifest["model"]["base"], manifest["model"]["num_parameters"]) == ("builtin:tiny", 158_272)
    assert read_manifest(small, 0)["history"] == []
    assert read_manifest(small, 0)["parent"] is None
    assert read_manifest(small, 0)["aggregation"] is None


def test_the_manifest_says_what_a_client_must_obey(small):
    all_take_part(small)
    Federation.open(small).server.aggregate()
    train = read_manifest(small, 1)["train"]
    assert math.isclose(train.pop("learning_rate"), 0.0022, rel_tol=1e-12)  # half of the cosine: the mean of both ends
    schedule = {"name": "cosine", "learning_rate": 0.004, "learning_rate_min": 0.0004, "rounds": 2}
    assert train == {
        "steps": 2,
        "batch_size": 4,
        "micro_batch_size": None,
        "max_length": 128,
        "schedule": schedule,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "beta": None,
        "gradient_checkpointing": False,
        "template": "alpaca",
        "seed": 0,
    }


def test_beta_is_for_dpo_only(tmp_path):
    done = fedcli("init", *settings(*SMALL, "train.beta=0.3"), "--preset", "demo-dpo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path, 0)
    assert (manifest["task"], manifest["train"]["beta"]) == ("dpo", 0.3)


def test_the_manifest_gives_the_hash_of_every_file_beside_it(small):
    all_take_part(small)
    Federation.open(small).server.aggregate()
    for number in (0, 1):
        folder = small / "rounds" / f"{number:05d}"
        contents = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        del contents["manifest.json"]
        entries = {n: {"sha256": hashlib.sha256(c).hexdigest(), "bytes": len(c)} for n, c in contents.items()}
        assert read_manifest(small, number)["files"] == entries


def test_the_manifest_accounts_for_each_client_once_with_its_share_and_norm(small):
    configure(small, "federation.quorum=0.5")
    take_part(small, 2, noisy(2), 30)
    take_part(small, 0, noisy(0), 10)
    Federation.open(small).server.aggregate()
    aggregation = read_manifest(small, 1)["aggregation"]
    assert aggregation.keys() == {"algorithm", "counted", "refused", "missing", "surplus"}
    assert (aggregation["algorithm"], aggregation["refused"]) == ({"name": "fedavg"}, [])
    assert aggregation["missing"] == [1]
    counted = aggregation["counted"]
    assert [(entry["client"], entry["weight"], entry["num_samples"]) for entry in counted] == [
        (0, 0.25, 10),
        (2, 0.75, 30),
    ]
    before = read_adapter(small, 0)
    for entry in counted:
        assert entry.keys() == {"client", "update", "weight", "num_samples", "train_loss", "delta_norm", "bytes"}
        assert entry["train_loss"] is None
        record = small / "inbox" / str(entry["client"]) / "round-00000" / "update.json"
        assert entry["bytes"] == sizes(record.parent, "update.json", ADAPTER)
        assert entry["update"] == hashlib.sha256(record.read_bytes()).hexdigest()
        update = read_update(small, 0, entry["client"])
        delta = np.concatenate([(array - before[name]).ravel() for name, array in update.items()])
        assert math.isclose(entry["delta_norm"], np.linalg.norm(delta), rel_tol=1e-12)


def sizes(folder: Path, *names: str) -> int:
    """Return how many bytes some files of a folder have together."""
    return sum((folder / name).stat().st_size for name in names)


def test_the_cost_is_what_lies_on_disk(small):
    """Three clients, of which one is refused in round 0 and one is missing in round 1."""
    weights = find_base("builtin:tiny", revision=None, root=small) / "model.safetensors"
    with safe_open(weights, framework="numpy") as file:
        base = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  # it is no dict
    trainable = sum(array.size for array in read_adapter(small, 0).values())
    assert (base, trainable) == (158_272, 2 * 2 * 2 * 4 * 64)
    down = sizes(small / "rounds/00000/adapter", ADAPTER, "adapter_config.json")
    up = (small / "rounds/00000/adapter" / ADAPTER).stat().st_size
    fixed = {"base_parameters": 158_272, "trainable_parameters": trainable, "communicated_parameters": trainable}
    fixed |= {"client_bytes_down": down, "client_bytes_up": up}
    assert read_manifest(small, 0)["cost"] == fixed | {"total_bytes_down": 0, "total_bytes_up": 0}

    all_take_part(small)
    (small / "inbox/1/round-00000/update.json").write_bytes(b"[]")
    Federation.open(small).server.aggregate()
    counted = [small / "inbox" / str(client) / "round-00000" for client in (0, 2)]
    total_up = sum(sizes(folder, "update.json", ADAPTER) for folder in counted)
    assert read_manifest(small, 1)["cost"] == fixed | {"total_bytes_down": 3 * down, "total_bytes_up": total_up}

    take_part(small, 0)
    take_part(small, 1)
    halves = {name: array.astype(np.float16) for name, array in read_update(small, 1, 1).items()}
    replace_adapter(small / "inbox/1/round-00001", save(halves))
    Federation.open(small).server.aggregate(partial=True)
    counted += [small / "inbox" / str(client) / "round-00001" for client in (0, 1)]
    total_up = sum(sizes(folder, "update.json", ADAPTER) for folder in counted)
    assert sizes(counted[-1], ADAPTER) < up
    assert read_manifest(small, 2)["cost"] == fixed | {"total_bytes_down": 5 * down, "total_bytes_up": total_up}
    done = fedcli("status", "--json", cwd=small)
    assert json.loads(done.stdout)["cost"] == read_manifest(small, 2)["cost"]


def test_the_page_lists_every_algorithm_with_its_hyperparameters_and_defaults():
    table = PAGE.read_text().split("| name | hyperparameters | server |")[1].split("\n\n")[0]
    rows = {cells[0].strip("` "): cells[1] for line in table.splitlines() if len(cells := line.split("|")[1:]) > 2}
    for name, algorithm in ALGORITHMS.items():
        given = rows[name].strip().replace("as fedyogi", rows["fedyogi"].strip())
        pairs = [part.split() for part in given.split(",") if part]
        written = {key: value.strip('"') if value.startswith('"') else float(value) for key, value in pairs}
        assert written | {"name": name} == asdict(algorithm())


def test_the_walk_to_an_eighth_algorithm_is_true(small, monkeypatch):
    walk = (PAGE.parents[1] / "CONTRIBUTING.md").read_text().split("## Adding an algorithm")[1]
    source = textwrap.dedent(walk.split("```python\n")[1].split("   ```")[0])
    module = types.ModuleType("fedcli.algos.fedrate")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, "fedrate.py", "exec"), module.__dict__)
    monkeypatch.setitem(ALGORITHMS._own, "fedrate", module.FedRate)
    all_take_part(small)
    Federation.open(small).server.aggregate(algorithm="fedrate")
    assert read_manifest(small, 1)["aggregation"]["algorithm"] == {"name": "fedrate", "eta": 0.5}
    before = read_adapter(small, 0)
    for name, array in read_adapter(small, 1).items():
        mean = sum(n * read_update(small, 0, client)[name] for client, n in NUM_SAMPLES.items()) / 500
        np.testing.assert_allclose(array, before[name] + 0.5 * (mean - before[name]), rtol=0, atol=1e-7)
    assert Federation(Workspace(small)).verify().violations == []


@pytest.fixture
def scaffold(small: Path) -> Path:
    """The small workspace whose round 1 is open, the first of four scaffold rounds with cohorts of two clients."""
    configure(small, "algorithm.name=scaffold", "federation.rounds=5", "federation.per_round=2", "train.steps=7")
    all_take_part(small)
    Federation.open(small).server.aggregate()
    return small


def read_control_delta(workspace: Path, number: int, client: int) -> dict[str, np.ndarray]:
    """Return the change of a control variate that a client dropped, in float64."""
    arrays = load_file(workspace / "inbox" / str(client) / f"round-{number:05d}" / CONTROL_DELTA)
    return {name: array.astype(np.float64) for name, array in arrays.items()}


def test_a_scaffold_client_written_from_the_page_is_counted(scaffold):
    manifest = read_manifest(scaffold, 1)
    assert (manifest["algorithm"], manifest["update_files"]) == ({"name": "scaffold"}, [ADAPTER, CONTROL_DELTA])
    assert manifest["aggregation"]["algorithm"] == {"name": "fedavg"}  # its own clients trained for that
    control = {name: np.zeros(array.shape) for name, array in read_adapter(scaffold, 1).items()}
    own = dict.fromkeys(range(3), control)
    for number in range(1, 5):
        cohort = answer(scaffold, number)
        assert fedcli("server", "aggregate", cwd=scaffold).returncode == 0
        manifest = read_manifest(scaffold, number + 1)
        assert [entry["client"] for entry in manifest["aggregation"]["counted"]] == cohort
        for entry in manifest["aggregation"]["counted"]:
            folder = scaffold / "inbox" / str(entry["client"]) / f"round-{number:05d}"
            assert entry["bytes"] == sizes(folder, "update.json", ADAPTER, CONTROL_DELTA)
        deltas = {client: read_control_delta(scaffold, number, client) for client in cohort}
        stored = load_file(scaffold / "rounds" / f"{number + 1:05d}" / "control.safetensors")
        rate, before = read_manifest(scaffold, number)["train"]["learning_rate"], read_adapter(scaffold, number)
        for name, array in stored.items():
            for client in cohort:  # c_k+ - c_k = (x - y_k) / (K lr) - c
                change = before[name] - read_update(scaffold, number, client)[name]
                np.testing.assert_allclose(deltas[client][name], change / (7 * rate) - control[name], atol=2e-5)
            expected = control[name] + sum(delta[name] for delta in deltas.values()) / 3
            assert array.dtype == np.float32
            np.testing.assert_allclose(array, expected, rtol=0, atol=1e-6)
        own |= {client: {name: own[client][name] + deltas[client][name] for name in control} for client in cohort}
        control = {name: array.astype(np.float64) for name, array in stored.items()}
        for name, array in control.items():  # c is the mean of all c_k
            np.testing.assert_allclose(array, sum(own[client][name] for client in range(3)) / 3, rtol=0, atol=1e-5)
    assert read_manifest(scaffold, 5)["history"] == [
        {"round": 0, "algorithm": {"name": "fedavg"}},
        {"round": 1, "algorithm": {"name": "scaffold"}},
    ]
    result = Federation(Workspace(scaffold)).verify()
    assert (result.violations, result.num_recomputed) == ([], 5)


def test_the_cost_of_scaffold_counts_the_control_variates(scaffold):
    first = read_manifest(scaffold, 1)["cost"]
    assert first["communicated_parameters"] == 2 * first["trainable_parameters"] == 2 * 2048
    adapter = sizes(scaffold / "rounds/00001/adapter", ADAPTER)
    config = sizes(scaffold / "rounds/00001/adapter", "adapter_config.json")
    assert (first["client_bytes_down"], first["client_bytes_up"]) == (adapter + config, 2 * adapter)  # no c yet
    cohorts = [answer(scaffold, 1)]
    Federation.open(scaffold).server.aggregate()
    second = read_manifest(scaffold, 2)["cost"]
    control = sizes(scaffold / "rounds/00002", "control.safetensors")
    assert second["client_bytes_down"] == adapter + config + control
    cohorts.append(answer(scaffold, 2))
    Federation.open(scaffold).server.aggregate()
    third = read_manifest(scaffold, 3)["cost"]
    dropped = [scaffold / "inbox" / str(client) / "round-00000" for client in range(3)]
    total_up = sum(sizes(folder, "update.json", ADAPTER) for folder in dropped)
    dropped = [scaffold / f"inbox/{client}/round-{n:05d}" for n, cohort in enumerate(cohorts, 1) for client in cohort]
    total_up += sum(sizes(folder, "update.json", ADAPTER, CONTROL_DELTA) for folder in dropped)
    assert third["total_bytes_up"] == total_up
    assert third["total_bytes_down"] == (3 + 2) * (adapter + config) + 2 * (adapter + config + control)


@pytest.mark.parametrize(
    ("code", "spoil"),
    [
        ("not_regular", lambda path: path.unlink() or path.mkdir()),
        ("size", lambda path: path.write_bytes(path.read_bytes()[:100])),
        ("hash", lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01")),
        ("json", lambda path: drop_from_list(path)),
        ("nonfinite", lambda path: replace_file(path, lambda array: array * np.float32(np.nan))),
        ("schema", lambda path: replace_file(path, lambda array: array[:1])),
    ],
)
def test_a_spoiled_control_delta_is_refused(scaffold, code, spoil):
    first, second = answer(scaffold, 1)
    spoil(scaffold / "inbox" / str(first) / "round-00001" / CONTROL_DELTA)
    Federation.open(scaffold).server.aggregate(refuse_arriving=True)
    aggregation = read_manifest(scaffold, 2)["aggregation"]
    assert [(entry["client"], entry["code"]) for entry in aggregation["refused"]] == [(first, code)]
    assert [entry["client"] for entry in aggregation["counted"]] == [second]
    for name, array in load_file(scaffold / "rounds/00002/control.safetensors").items():  # N stays 3
        expected = read_control_delta(scaffold, 1, second)[name] / 3
        np.testing.assert_allclose(array, expected, rtol=1e-6)


def drop_from_list(path: Path) -> None:
    """Take a file out of update.json's list."""
    record = json.loads((path.parent / "update.json").read_bytes())
    del record["files"][path.name]
    (path.parent / "update.json").write_text(json.dumps(record))


def test_an_answer_to_a_closed_round_changes_nothing(small, tmp_path):
    configure(small, "federation.quorum=0.5")
    late = Path(shutil.copytree(small, tmp_path / "late"))  # client 2 still sees round 0 open there
    take_part(late, 2, noisy(2), 30)
    take_part(small, 0)
    take_part(small, 1)
    Federation.open(small).server.aggregate()
    closed = stored_hashes(small / "rounds")
    shutil.copytree(late / "inbox" / "2", small / "inbox" / "2")
    assert stored_hashes(small / "rounds") == closed
    assert take_part(small, 0)
    assert take_part(small, 1)
    Federation.open(small).server.aggregate()
    hashes = stored_hashes(small / "rounds")
    assert {name: hashes[name] for name in closed} == closed
    assert read_manifest(small, 2)["aggregation"]["missing"] == [2]
    assert Federation(Workspace(small)).verify().violations == []


def test_a_drop_for_a_name_taken_fails_and_leaves_the_first(small):
    first = {}

    def overtaken(array):
        # Another process of the same client drops its update while this one trains.
        if not first:
            take_part(small, 0, noisy(0), 7)
            first.update(stored_hashes(small / "inbox" / "0" / "round-00000"))
        return array

    with pytest.raises(OSError, match="not empty") as caught:
        take_part(small, 0, overtaken)
    assert caught.value.errno in (errno.ENOTEMPTY, errno.EEXIST)
    assert not drop_update(Federation.open(small).round(0), 0, [("update.json", b"{}")])
    assert stored_hashes(small / "inbox" / "0" / "round-00000") == first
    assert take_part(small, 0)  # sent already: does nothing
    assert stored_hashes(small / "inbox" / "0" / "round-00000") == first
    Federation.open(small).server.aggregate(partial=True)
    assert read_manifest(small, 1)["aggregation"]["counted"][0]["num_samples"] == 7


def test_after_the_last_round_nothing_is_due_and_nothing_changes(small):
    for _ in range(2):
        all_take_part(small)
        assert fedcli("server", "aggregate", cwd=small).returncode == 0
    manifest = read_manifest(small, 2)
    assert (manifest["state"], manifest["cohort"]) == ("finished", [])
    assert [take_part(small, client) for client in NUM_SAMPLES] == [False, False, False]
    before = stored_hashes(small)
    done = fedcli("server", "aggregate", cwd=small)
    assert (done.returncode, done.stdout) == (0, "nothing to do: the federation has finished at round 2\n")
    assert stored_hashes(small) == before
    assert sorted(path.name for path in (small / "rounds").iterdir()) == ["00000", "00001", "00002"]


def test_a_cohort_is_drawn_from_the_seed_without_replacement():
    clients = list(range(10))
    cohorts = [draw_cohort(7, number, clients, 3) for number in range(100)]
    assert all(len(set(cohort)) == 3 for cohort in cohorts)
    assert cohorts == [draw_cohort(7, number, clients, 3) for number in range(100)]
    assert cohorts != [draw_cohort(8, number, clients, 3) for number in range(100)]
    assert len({frozenset(cohort) for cohort in cohorts}) > 50  # of 120 subsets, 100 draws hit 68 on average
    assert {client for cohort in cohorts for client in cohort} == set(clients)
    assert sorted(draw_cohort(7, 0, clients, 10)) == clients


def test_only_the_clients_that_were_drawn_take_part(small):
    configure(small, "federation.per_round=2", "federation.rounds=6")
    all_take_part(small)
    Federation.open(small).server.aggregate()
    drawn = []
    for number in range(1, 6):
        cohort = read_manifest(small, number)["cohort"]
        assert cohort == sorted(draw_cohort(0, number, [0, 1, 2], 2))
        drawn.append(cohort)
        assert [client for client in NUM_SAMPLES if take_part(small, client)] == cohort
        Federation.open(small).server.aggregate()
        aggregation = read_manifest(small, number + 1)["aggregation"]
        assert [entry["client"] for entry in aggregation["counted"]] == cohort
        assert math.isclose(sum(entry["weight"] for entry in aggregation["counted"]), 1, rel_tol=1e-15)
    assert {client for cohort in drawn for client in cohort} == {0, 1, 2}
    assert len({tuple(cohort) for cohort in drawn}) > 1
    assert read_manifest(small, 6)["state"] == "finished"
    assert Federation(Workspace(small)).verify().violations == []
