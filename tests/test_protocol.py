"""docs/PROTOCOL.md is enough: clients of 40 lines, written from it, and a real server agree."""

import ast
import errno
import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import protocol_client
import pytest
import yaml
from conftest import fedcli
from protocol_client import take_part
from safetensors.numpy import load_file, save

from fedcli.config import apply_overrides, read_document
from fedcli.randomness import draw_cohort
from fedcli.rounds.aggregation import aggregate
from fedcli.rounds.verification import verify
from fedcli.workspace.inbox import drop_update
from fedcli.workspace.layout import Workspace

PAGE = Path(__file__).parent.parent / "docs" / "PROTOCOL.md"
ADAPTER = "adapter_model.safetensors"
NUM_SAMPLES = {0: 3, 1: 50, 2: 447}


def noisy(client: int):
    """Return a training that adds a client's own noise, so that no two clients send the same values."""
    # A generator a tensor: safetensors hands out tensors in no fixed order.
    return lambda array: array + np.random.default_rng(client).normal(scale=0.1, size=array.shape)


def all_take_part(workspace: Path) -> None:
    """Let every client of the cohort answer the open round."""
    for client, num_samples in NUM_SAMPLES.items():
        take_part(workspace, client, noisy(client), num_samples)


def read_manifest(workspace: Path, number: int) -> dict:
    """Return a round's manifest as another implementation would read it."""
    return json.loads((workspace / "rounds" / f"{number:05d}" / "manifest.json").read_bytes())


def read_adapter(workspace: Path, number: int) -> dict[str, np.ndarray]:
    """Return a round's global adapter."""
    return load_file(workspace / "rounds" / f"{number:05d}" / "adapter" / ADAPTER)


def read_update(workspace: Path, number: int, client: int) -> dict[str, np.ndarray]:
    """Return the adapter that a client dropped, in float64."""
    arrays = load_file(workspace / "inbox" / str(client) / f"round-{number:05d}" / ADAPTER)
    return {name: array.astype(np.float64) for name, array in arrays.items()}


def replace_adapter(update: Path, contents: bytes) -> None:
    """Give a dropped update another adapter, with its size and hash in update.json."""
    (update / ADAPTER).write_bytes(contents)
    record = json.loads((update / "update.json").read_bytes())
    record["files"][ADAPTER] = {"sha256": hashlib.sha256(contents).hexdigest(), "bytes": len(contents)}
    (update / "update.json").write_text(json.dumps(record))


def as_bfloat16(arrays: dict[str, np.ndarray]) -> bytes:
    """Return a safetensors file of BF16: float32 without its low 16 bits. numpy has no such type."""
    header, body = {}, b""
    for name, array in arrays.items():
        part = (np.ascontiguousarray(array, "<f4").view("<u4") >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": array.shape, "data_offsets": [len(body), len(body) + len(part)]}
        body += part
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def configure(workspace: Path, *overrides: str) -> None:
    """Edit fedcli.yaml as a user would between two rounds."""
    path = workspace / "fedcli.yaml"
    document = read_document(path.read_text(), path)
    apply_overrides(document, overrides)
    path.write_text(yaml.safe_dump(document))


def stored_hashes(workspace: Path) -> dict[str, str]:
    """Return every file's hash; not of the locks, which name their latest holder."""
    files = (path for path in workspace.rglob("*") if path.is_file() and path.name not in ("server.lock", "lock"))
    return {str(path.relative_to(workspace)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


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
    assert verify(Workspace(small)).violations == []


def test_the_manifest_has_every_key_of_the_page_with_its_value(small):
    section = PAGE.read_text().split("## manifest.json\n")[1].split("\n\n")[0]
    documented = re.findall(r"^    ([a-z_]+) ", section, re.MULTILINE)
    all_take_part(small)
    aggregate(Workspace(small))
    manifest = read_manifest(small, 1)
    assert set(documented) == set(manifest)
    assert len(documented) == len(manifest) == 15
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
    }
    assert {key: manifest[key] for key in expected} == expected
    assert manifest["model"].keys() == {"base", "revision", "fingerprint", "quantization"}
    assert manifest["model"]["base"] == "builtin:tiny"
    assert read_manifest(small, 0)["parent"] is None
    assert read_manifest(small, 0)["aggregation"] is None


def test_the_manifest_says_what_a_client_must_obey(small):
    all_take_part(small)
    aggregate(Workspace(small))
    train = read_manifest(small, 1)["train"]
    assert math.isclose(train.pop("learning_rate"), 0.0022, rel_tol=1e-12)  # half of the cosine: the mean of both ends
    schedule = {"name": "cosine", "learning_rate": 0.004, "learning_rate_min": 0.0004, "rounds": 2}
    assert train == {
        "steps": 2,
        "batch_size": 4,
        "micro_batch_size": 4,
        "max_length": 128,
        "schedule": schedule,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "template": "alpaca",
        "seed": 0,
    }


def test_the_manifest_gives_the_hash_of_every_file_beside_it(small):
    all_take_part(small)
    aggregate(Workspace(small))
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
    aggregate(Workspace(small))
    aggregation = read_manifest(small, 1)["aggregation"]
    assert aggregation.keys() == {"algorithm", "counted", "refused", "missing"}
    assert (aggregation["algorithm"], aggregation["refused"]) == ({"name": "fedavg"}, [])
    assert aggregation["missing"] == [1]
    counted = aggregation["counted"]
    assert [(entry["client"], entry["weight"], entry["num_samples"]) for entry in counted] == [
        (0, 0.25, 10),
        (2, 0.75, 30),
    ]
    before = read_adapter(small, 0)
    for entry in counted:
        assert entry.keys() == {"client", "update", "weight", "num_samples", "train_loss", "delta_norm"}
        assert entry["train_loss"] is None
        record = small / "inbox" / str(entry["client"]) / "round-00000" / "update.json"
        assert entry["update"] == hashlib.sha256(record.read_bytes()).hexdigest()
        update = read_update(small, 0, entry["client"])
        delta = np.concatenate([(array - before[name]).ravel() for name, array in update.items()])
        assert math.isclose(entry["delta_norm"], np.linalg.norm(delta), rel_tol=1e-12)


def test_an_answer_to_a_closed_round_changes_nothing(small, tmp_path):
    configure(small, "federation.quorum=0.5")
    late = Path(shutil.copytree(small, tmp_path / "late"))  # client 2 still sees round 0 open there
    take_part(late, 2, noisy(2), 30)
    take_part(small, 0)
    take_part(small, 1)
    aggregate(Workspace(small))
    closed = stored_hashes(small / "rounds")
    shutil.copytree(late / "inbox" / "2", small / "inbox" / "2")
    assert stored_hashes(small / "rounds") == closed
    assert take_part(small, 0)
    assert take_part(small, 1)
    aggregate(Workspace(small))
    hashes = stored_hashes(small / "rounds")
    assert {name: hashes[name] for name in closed} == closed
    assert read_manifest(small, 2)["aggregation"]["missing"] == [2]
    assert verify(Workspace(small)).violations == []


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
    assert not drop_update(Workspace(small), 0, 0, [("update.json", b"{}")])
    assert stored_hashes(small / "inbox" / "0" / "round-00000") == first
    assert take_part(small, 0)  # sent already: does nothing
    assert stored_hashes(small / "inbox" / "0" / "round-00000") == first
    aggregate(Workspace(small), partial=True)
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
    assert all(len(set(cohort)) == 3 and cohort == sorted(cohort) for cohort in cohorts)
    assert cohorts == [draw_cohort(7, number, clients, 3) for number in range(100)]
    assert cohorts != [draw_cohort(8, number, clients, 3) for number in range(100)]
    assert len({tuple(cohort) for cohort in cohorts}) > 50  # of 120 subsets, 100 draws hit 68 on average
    assert {client for cohort in cohorts for client in cohort} == set(clients)
    assert draw_cohort(7, 0, clients, 10) == clients


def test_only_the_clients_that_were_drawn_take_part(small):
    configure(small, "federation.per_round=2", "federation.rounds=6")
    all_take_part(small)
    aggregate(Workspace(small))
    drawn = []
    for number in range(1, 6):
        cohort = read_manifest(small, number)["cohort"]
        assert cohort == draw_cohort(0, number, [0, 1, 2], 2)
        drawn.append(cohort)
        assert [client for client in NUM_SAMPLES if take_part(small, client)] == cohort
        aggregate(Workspace(small))
        aggregation = read_manifest(small, number + 1)["aggregation"]
        assert [entry["client"] for entry in aggregation["counted"]] == cohort
        assert math.isclose(sum(entry["weight"] for entry in aggregation["counted"]), 1, rel_tol=1e-15)
    assert {client for cohort in drawn for client in cohort} == {0, 1, 2}
    assert len({tuple(cohort) for cohort in drawn}) > 1
    assert read_manifest(small, 6)["state"] == "finished"
    assert verify(Workspace(small)).violations == []
