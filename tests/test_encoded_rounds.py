"""Encoded differences in real rounds: what is sent both ways, what comes of it, what is refused, who takes part."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from protocol_client import take_part
from safetensors.numpy import load_file
from support.federation import (
    ADAPTER,
    CONTROL_DELTA,
    NUM_SAMPLES,
    configure,
    noisy,
    read_adapter,
    read_manifest,
    train_as,
)
from support.object_stores import DyingObjects, new_objects
from support.updates import protocol_files, update_of

from fedcli import Federation
from fedcli.algos.packing import PIECE
from fedcli.client.encoded_update import encode_adapter
from fedcli.errors import ConfigError, IntegrityError
from fedcli.server.communication_cost import cost_of
from fedcli.server.encoded_step import encoding_record
from fedcli.stores.objects import Objects
from fedcli.workspace.client_state import RESIDUAL
from fedcli.workspace.encoded_differences import decode_differences
from fedcli.workspace.history import read_round
from fedcli.workspace.inbox import drop_update
from fedcli.workspace.kept_objects import KeptObjects
from fedcli.workspace.layout import ADAPTER_NAME, DELTA_NAME, Workspace
from fedcli.workspace.object_store import ObjectStore
from fedcli.workspace.parsing import sealed
from fedcli.workspace.records import file_entry
from fedcli.workspace.split_store import SplitStore
from fedcli.workspace.store import DirectoryStore

slow = pytest.mark.slow
ENCODINGS = [pytest.param("f16", marks=slow), pytest.param("bf16", marks=slow), "int8", "top_k"]
LOSSES = {"f16": 0.001, "bf16": 0.003, "int8": 0.02, "top_k": 1.0}
"""What a difference may lose at most, relative to itself."""


def reopened(workspace: Path, *overrides: str) -> Path:
    """Let round 0, which nobody has answered, ask for the encoding of other settings."""
    configure(workspace, *overrides)
    head = Federation.open(workspace).state.head
    config = Federation.open(workspace).state.config
    manifest = head.manifest.model_copy(update={"encoding": encoding_record(config.aggregation)})
    manifest = manifest.model_copy(update={"cost": cost_of(manifest, None)})
    (workspace / "rounds/00000/manifest.json").write_bytes(sealed(manifest))
    return workspace


def everybody_trains(workspace: Path) -> None:
    for client in NUM_SAMPLES:
        train_as(client, workspace)


def values(workspace: Path, number: int, client: int) -> dict[str, np.ndarray]:
    """Return the values that a client's stub reaches, as an update without an encoding would hold them."""
    manifest = read_manifest(workspace, number)["train"]
    found = read_adapter(workspace, number)
    for name in found:
        for _ in range(manifest["steps"]):
            found[name] = found[name] - manifest["learning_rate"] * (found[name] - client)
    return found


def received(workspace: Path, number: int, client: int) -> dict[str, np.ndarray]:
    """Return the differences that the server reads of an update."""
    base = read_round(Workspace(workspace), number)
    contents = (workspace / f"inbox/{client}/round-{number:05d}" / ADAPTER).read_bytes()
    return decode_differences(contents, base.manifest.sent_tensors, base.manifest.encoding)


def flat(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([arrays[name].reshape(-1).astype(np.float64) for name in sorted(arrays)])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rounds_of_encoded_differences_are_their_mean_and_are_verified(encoding, small):
    reopened(small, f"aggregation.encoding={encoding}")
    for number in range(2):
        everybody_trains(small)
        differences = [flat(received(small, number, client)) for client in NUM_SAMPLES]
        for client, found in zip(NUM_SAMPLES, differences, strict=True):
            wanted = flat(values(small, number, client)) - flat(read_adapter(small, number))
            if number == 0:
                assert np.linalg.norm(found - wanted) <= LOSSES[encoding] * np.linalg.norm(wanted)
        Federation.open(small).server.aggregate()
        before, after = flat(read_adapter(small, number)), flat(read_adapter(small, number + 1))
        mean = np.average(differences, axis=0, weights=[*NUM_SAMPLES.values()])
        down = "int8" if encoding == "top_k" else encoding
        assert np.linalg.norm(after - before - mean) <= LOSSES[down] * np.linalg.norm(mean)
        record = read_round(Workspace(small), number).manifest.encoding
        schema = read_round(Workspace(small), number).manifest.tensors
        delta = decode_differences(
            (small / f"rounds/{number + 1:05d}" / DELTA_NAME).read_bytes(), schema, record.of_step
        )
        assert all(
            (read_adapter(small, number)[name] + delta[name] == found).all()
            for name, found in read_adapter(small, number + 1).items()
        )
    assert Federation.open(small).verify().violations == []
    counted = read_manifest(small, 2)["aggregation"]["counted"]
    assert counted[1]["delta_norm"] == pytest.approx(np.linalg.norm(differences[1]))
    cost, plain = read_manifest(small, 1)["cost"], (small / "rounds/00001" / ADAPTER_NAME).stat().st_size
    assert cost["client_bytes_up"] <= {"int8": 0.27, "top_k": 0.14}.get(encoding, 0.6) * plain
    assert cost["client_bytes_up"] == (small / "inbox/1/round-00001" / ADAPTER).stat().st_size
    assert cost["client_bytes_down"] == sum(
        (small / "rounds/00001/adapter" / name).stat().st_size for name in ("delta.safetensors", "adapter_config.json")
    )
    assert json.loads((small / "inbox/1/round-00001/update.json").read_text())["encoding"] == encoding


def test_without_an_encoding_nothing_says_so(small):
    manifest = read_manifest(small, 0)
    assert "encoding" not in manifest
    train_as(0, small)
    assert "encoding" not in json.loads((small / "inbox/0/round-00000/update.json").read_text())
    Federation.open(small).server.aggregate(partial=True)
    assert not (small / "rounds/00001" / DELTA_NAME).exists()


def test_a_client_of_version_1_sends_values_beside_encoded_differences(small):
    reopened(small, "aggregation.encoding=int8")
    train_as(0, small)
    take_part(small, 1, noisy(1), NUM_SAMPLES[1])
    train_as(2, small)
    Federation.open(small).server.aggregate()
    start = flat(read_adapter(small, 0))
    values_sent = flat(load_file(small / "inbox/1/round-00000" / ADAPTER)) - start
    differences = [flat(received(small, 0, 0)), values_sent, flat(received(small, 0, 2))]
    mean = np.average(differences, axis=0, weights=[*NUM_SAMPLES.values()])
    assert np.linalg.norm(flat(read_adapter(small, 1)) - start - mean) <= 0.02 * np.linalg.norm(mean)
    assert Federation.open(small).verify().violations == []


@pytest.mark.parametrize("encoding", [pytest.param("int8", marks=slow), "top_k"])
def test_a_client_that_was_killed_before_its_drop_sends_the_same_bytes(encoding, small):
    reopened(small, f"aggregation.encoding={encoding}")
    everybody_trains(small)
    Federation.open(small).server.aggregate()
    sent = []
    for _ in range(2):
        train_as(1, small)
        sent.append((small / "inbox/1/round-00001" / ADAPTER).read_bytes())
        shutil.rmtree(small / "inbox/1/round-00001")
    train_as(2, small)
    assert sent[0] == sent[1] != (small / "inbox/2/round-00001" / ADAPTER).read_bytes()


def residual(workspace: Path, client: int) -> np.ndarray:
    """Return what the last candidate of a client has not sent."""
    (*_, last) = sorted((workspace / f"private/{client}" / RESIDUAL).iterdir())
    return flat(load_file(last))


def test_what_a_sparse_update_does_not_send_is_sent_later(small):
    reopened(small, "aggregation.encoding=top_k", "aggregation.top_k=0.25")
    everybody_trains(small)
    wanted = flat(values(small, 0, 1)) - flat(read_adapter(small, 0))
    sent = flat(received(small, 0, 1))
    first = residual(small, 1)
    assert np.allclose(sent + first, wanted, atol=1e-7)
    assert not (first * sent).any()
    Federation.open(small).server.aggregate()
    train_as(1, small)
    wanted = flat(values(small, 1, 1)) - flat(read_adapter(small, 1)) + first
    assert np.allclose(flat(received(small, 1, 1)) + residual(small, 1), wanted, atol=1e-7)


def test_error_feedback_fades_with_the_rounds_that_passed_over_it(small):
    reopened(small, "aggregation.encoding=top_k", "federation.rounds=5")
    everybody_trains(small)
    first = residual(small, 1)
    Federation.open(small).server.aggregate()
    for number in (1, 2):
        take_part(small, 0, noisy(number))
        Federation.open(small).server.aggregate(partial=True)
    train_as(1, small)
    d = flat(values(small, 3, 1)) - flat(read_adapter(small, 3))
    assert np.allclose(flat(received(small, 3, 1)) + residual(small, 1), d + first * 3**-0.5, atol=1e-7)


def test_error_feedback_of_a_refused_update_is_none_and_ends_with_top_k(small):
    reopened(small, "aggregation.encoding=top_k")
    everybody_trains(small)
    with (small / "inbox/1/round-00000" / ADAPTER).open("ab") as file:
        file.write(b"\0")
    configure(small, "aggregation.encoding=int8")
    Federation.open(small).server.aggregate(partial=True)
    assert [entry["client"] for entry in read_manifest(small, 1)["aggregation"]["refused"]] == [1]
    everybody_trains(small)
    for client in (0, 1):
        wanted = flat(values(small, 1, client)) - flat(read_adapter(small, 1))
        assert np.linalg.norm(flat(received(small, 1, client)) - wanted) <= 0.02 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("encoding", "rule"),
    [
        ("top_k", "geometric_median"),
        pytest.param("int8", "median", marks=slow),
        pytest.param("int8", "norm_clip", marks=slow),
        pytest.param("top_k", "norm_clip", marks=slow),
        pytest.param("bf16", "trimmed_mean", marks=slow),
    ],
)
def test_rules_read_encoded_differences_side_by_side(encoding, rule, small):
    reopened(small, f"aggregation.encoding={encoding}", f"aggregation.rule={rule}")
    train_as(0, small)
    take_part(small, 1, noisy(1), NUM_SAMPLES[1])
    train_as(2, small)
    Federation.open(small).server.aggregate()
    assert read_manifest(small, 1)["aggregation"]["rule"]["rule"] == rule
    found = Federation.open(small).verify()
    assert found.violations == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["aggregation.encoding=top_k", "aggregation.rule=median"], ["top_k", "median", "zero"]),
        (["aggregation.encoding=int8", "aggregation.top_k=0.1"], ["top_k is set", "int8"]),
        (["aggregation.top_k=1.5", "aggregation.encoding=top_k"], ["top_k"]),
        (["aggregation.encoding=int4"], ["encoding"]),
        (
            ["aggregation.encoding=int8", "privacy.secure_aggregation=pairwise", "federation.signatures=required"],
            ["aggregation.encoding: int8", "secure_aggregation: pairwise", "8 bytes each"],
        ),
    ],
)
def test_what_an_encoding_cannot_stand_beside_is_an_error_that_names_both(settings, words, small):
    configure(small, *settings)
    with pytest.raises(ConfigError) as found:
        Federation.open(small)
    assert all(word in found.value.message for word in words), found.value.message


@pytest.mark.parametrize(
    ("encoding", "edit", "words"),
    [
        ("top_k", "aggregation.rule=median", ["opened with aggregation.encoding: top_k", "median"]),
        ("top_k", "aggregation.rule=trimmed_mean", ["opened with aggregation.encoding: top_k", "trimmed_mean"]),
        ("int8", "aggregation.lora=exact", ["aggregation.lora: exact", "aggregation.encoding: int8"]),
        ("f16", "aggregation.lora=product", ["aggregation.lora: product", "aggregation.encoding: f16"]),
    ],
)
def test_an_open_round_is_not_merged_in_a_way_that_its_encoding_excludes(encoding, edit, words, small):
    reopened(small, f"aggregation.encoding={encoding}")
    everybody_trains(small)
    configure(small, "aggregation.encoding=f32", edit)
    with pytest.raises(ConfigError) as found:
        Federation.open(small).server.aggregate()
    assert all(word in found.value.message for word in words), found.value.message
    configure(small, "aggregation.rule=mean", "aggregation.lora=factors")
    assert Federation.open(small).server.aggregate().published
    assert Federation(Workspace(small)).verify().violations == []


def opened_anew(workspace: Path, *overrides: str) -> None:
    """Open round 0 again, which nobody has answered, with settings that a manifest's edit does not give."""
    configure(workspace, *overrides)
    shutil.rmtree(workspace / "rounds")
    Federation(Workspace(workspace)).server.open()


@slow
@pytest.mark.parametrize("algorithm", ["scaffold", "fedavgm", "fedadam"])
@pytest.mark.parametrize("encoding", ["bf16", "int8", "top_k"])
def test_every_kind_of_algorithm_goes_on_with_encoded_differences(algorithm, encoding, small):
    opened_anew(small, f"aggregation.encoding={encoding}", f"algorithm.name={algorithm}")
    for _ in range(2):
        everybody_trains(small)
        Federation.open(small).server.aggregate()
    assert Federation.open(small).verify().violations == []
    if algorithm == "scaffold":
        up = sum((small / "inbox/1/round-00001" / name).stat().st_size for name in (ADAPTER, CONTROL_DELTA))
        assert read_manifest(small, 1)["cost"]["client_bytes_up"] == up


@slow
@pytest.mark.parametrize("encoding", ["int8", "top_k"])
def test_what_was_decoded_is_clipped_where_clients_are_private(encoding, small):
    opened_anew(
        small,
        f"aggregation.encoding={encoding}",
        "privacy.unit=client",
        "privacy.clip=0.01",
        "privacy.noise=1.0e-6",
        "privacy.delta=0.001",
    )
    take_part(small, 0, noisy(0))
    take_part(small, 1, noisy(1))
    train_as(2, small)
    Federation.open(small).server.aggregate()
    start = flat(read_adapter(small, 0))
    sent = [flat(load_file(small / f"inbox/{client}/round-00000" / ADAPTER)) - start for client in (0, 1)]
    sent.append(flat(received(small, 0, 2)))
    mean = sum(difference * min(1, 0.01 / np.linalg.norm(difference)) for difference in sent) / 3
    assert np.linalg.norm(flat(read_adapter(small, 1)) - start - mean) <= 0.02 * np.linalg.norm(mean)
    assert Federation.open(small).verify().violations == []
    keys = [path for path in (small / "private/server").rglob("*") if path.is_file() and "noise" in str(path)]
    found = Federation.open(small).verify(noise_keys=keys)
    assert (found.violations, found.noisy_rounds, found.num_recomputed) == ([], [], 1)


@slow
@pytest.mark.parametrize("rule", ["mean", "geometric_median", "norm_clip"])
@pytest.mark.parametrize("encoding", ["f16", "int8", "top_k"])
def test_tensors_of_several_pieces_are_read_part_by_part(encoding, rule, tmp_path):
    settings = {
        "data.source": None,
        "federation.signatures": "off",
        "federation.clients": 3,
        "federation.rounds": 2,
        "adapter.rank": 300,
        "adapter.target_modules": ["q_proj"],
        "aggregation.encoding": encoding,
        "aggregation.rule": rule,
    }
    root = Path(Federation.create(tmp_path / "pieces", preset="demo", settings=settings).path)
    base = read_round(Workspace(root), 0)
    assert any(PIECE < np.prod(entry.shape) < 2 * PIECE for entry in base.manifest.tensors.values())
    sent = {}
    for client in range(3):
        adapter = base.adapter()
        values = {name: noisy(client)(array).astype(np.float32) for name, array in adapter.items()}
        contents, _ = encode_adapter(base, [base], client, values, {})
        assert drop_update(
            base,
            client,
            update_of(
                base, client, adapter=contents, encoding=encoding, files={ADAPTER: file_entry(contents).model_dump()}
            ),
        )
        sent[client] = flat(received(root, 0, client))
    Federation.open(root).server.aggregate()
    step = flat(read_adapter(root, 1)) - flat(base.adapter())
    if rule == "mean":
        mean = np.average([*sent.values()], axis=0, weights=[10, 11, 12])
        assert np.linalg.norm(step - mean) <= 0.02 * np.linalg.norm(mean)
    counted = read_manifest(root, 1)["aggregation"]["counted"]
    assert [entry["delta_norm"] for entry in counted] == pytest.approx([*map(np.linalg.norm, sent.values())])
    assert Federation.open(root).verify().violations == []


class Gets(DyingObjects):
    """Objects that count the bytes that are fetched, by the file's name."""

    def __init__(self, objects: Objects) -> None:
        super().__init__(objects)
        self.fetched: Counter[str] = Counter()

    def get(self, key: str, limit: int) -> bytes:
        contents = super().get(key, limit)
        self.fetched[key.rpartition("/")[2]] += len(contents)
        return contents


def elsewhere(workspace: Path, tmp_path: Path, monkeypatch) -> tuple[Workspace, Gets]:
    """Return a copy of a workspace's rounds in a store of objects, with an empty cache on this machine."""
    objects = Gets(new_objects("objects", monkeypatch))
    for name, contents in protocol_files(workspace).items():
        objects.put(name, contents)
    store = SplitStore(DirectoryStore(workspace), ObjectStore(objects, KeptObjects(tmp_path / "kept")))
    return Workspace(workspace, store, "memory://objects"), objects


def test_a_client_elsewhere_fetches_the_step_alone_once_it_has_an_adapter(small, tmp_path, monkeypatch):
    reopened(small, "aggregation.encoding=int8", "federation.rounds=8")
    for _ in range(6):
        train_as(0, small)
        Federation.open(small).server.aggregate(partial=True)
    workspace, objects = elsewhere(small, tmp_path, monkeypatch)
    full, step = "adapter_model.safetensors", "delta.safetensors"
    size = (small / "rounds/00000" / ADAPTER_NAME).stat().st_size
    read_round(workspace, 0).adapter()
    assert (objects.fetched[full], objects.fetched[step]) == (size, 0)
    found = read_round(workspace, 1).adapter()
    assert objects.fetched[full] == size
    assert objects.fetched[step] == (small / "rounds/00001" / DELTA_NAME).stat().st_size < 0.27 * size
    assert all((array == read_adapter(small, 1)[name]).all() for name, array in found.items())
    before = objects.fetched[step]
    read_round(workspace, 4).adapter()  # three steps from round 1
    assert (objects.fetched[full], round(objects.fetched[step] / before)) == (size, 4)
    read_round(workspace, 1).adapter()
    assert objects.fetched[full] == size
    (tmp_path / "kept" / read_round(workspace, 4).manifest.files[ADAPTER_NAME].sha256).unlink()
    (tmp_path / "kept" / read_round(workspace, 3).manifest.files[ADAPTER_NAME].sha256).unlink()
    (tmp_path / "kept" / read_round(workspace, 2).manifest.files[ADAPTER_NAME].sha256).unlink()
    steps = objects.fetched[step]
    read_round(workspace, 6).adapter()  # five steps from round 1: the whole is less
    assert (objects.fetched[full], objects.fetched[step]) == (2 * size, steps)


def test_a_step_that_leads_elsewhere_or_is_gone_costs_the_whole_adapter(small, tmp_path, monkeypatch):
    reopened(small, "aggregation.encoding=int8")
    train_as(0, small)
    Federation.open(small).server.aggregate(partial=True)
    workspace, objects = elsewhere(small, tmp_path, monkeypatch)
    read_round(workspace, 0).adapter()
    good = objects.get(f"rounds/00001/{DELTA_NAME}", 2**20)
    for contents in (good[:-1] + bytes([good[-1] ^ 1]), good[:50], None):
        objects.delete(f"rounds/00001/{DELTA_NAME}")
        if contents is not None:
            objects.put(f"rounds/00001/{DELTA_NAME}", contents)
        found = read_round(workspace, 1).adapter()
        assert all((array == read_adapter(small, 1)[name]).all() for name, array in found.items())
        (tmp_path / "kept" / read_round(workspace, 1).manifest.files[ADAPTER_NAME].sha256).unlink()
    with pytest.raises(IntegrityError):
        read_round(workspace, 1).read(DELTA_NAME)


def rewrite(workspace: Path, client: int, edit, encoding: str | None = None) -> str:
    """Edit the bytes of an update's adapter, merge, and return the code of its refusal; none: it was counted."""
    folder = workspace / f"inbox/{client}/round-00000"
    record = json.loads((folder / "update.json").read_bytes())
    contents = edit((folder / ADAPTER).read_bytes())
    (folder / ADAPTER).write_bytes(contents)
    record["files"][ADAPTER] = file_entry(contents).model_dump()
    record["encoding"] = encoding or record["encoding"]
    record.pop("checksum")
    (folder / "update.json").write_text(json.dumps(record))
    Federation.open(workspace).server.aggregate()
    refused = read_manifest(workspace, 1)["aggregation"]["refused"]
    assert all(entry["client"] == client for entry in refused)
    found = Federation.open(workspace).verify()
    assert found.violations == []
    return "".join(entry["code"] for entry in refused)


def first_bytes(*data: int):
    """Return an edit of the first bytes behind the header."""

    def edit(contents: bytes) -> bytes:
        begin = 8 + int.from_bytes(contents[:8], "little")
        return contents[:begin] + bytes(data) + contents[begin + len(data) :]

    return edit


def other_header(old: bytes, new: bytes):
    """Return an edit of the header's text, of the same length."""
    return lambda contents: contents.replace(old, new, 1)


HOSTILE = {
    "a scale is NaN": ("int8", first_bytes(0, 0, 192, 127), "nonfinite"),
    "a scale is infinite": ("int8", first_bytes(0, 0, 128, 127), "nonfinite"),
    "a scale is huge": ("int8", first_bytes(0, 0, 0, 0x60, 1), "nonfinite"),
    "a scale is huge once it is multiplied": ("int8", first_bytes(0, 0, 0, 0x4F, 127), "nonfinite"),
    "a scale is negative": ("int8", first_bytes(0, 0, 0, 0xBF), "schema"),
    "a step is -128": ("int8", first_bytes(0, 0, 0, 0, 128), "schema"),
    "a byte is missing": ("int8", lambda contents: contents[:-1], "header"),
    "a byte is over": ("int8", lambda contents: contents + b"\0", "header"),
    "another type": ("int8", other_header(b'"U8"', b'"I8"'), "schema"),
    "bits more than numbers": ("top_k", first_bytes(*[255] * 8), "schema"),
    "no bit": ("top_k", first_bytes(*[0] * 8), "schema"),
    "values of another encoding": ("f16", other_header(b'"F16"', b'"F32"'), "schema"),
    "an encoding of another name": ("f16", lambda contents: contents, "schema"),
}


DEFAULT = [("a scale is NaN", "mean"), ("no bit", "geometric_median")]


@pytest.mark.parametrize(
    ("case", "rule"),
    [
        pytest.param(case, rule, marks=[] if (case, rule) in DEFAULT else slow)
        for case in HOSTILE
        for rule in ("mean", "geometric_median")
    ],
)
def test_a_hostile_encoded_update_is_refused_and_the_round_goes_on(case, rule, small):
    encoding, edit, code = HOSTILE[case]
    reopened(small, f"aggregation.encoding={encoding}", f"aggregation.rule={rule}", "aggregation.tolerate=0")
    everybody_trains(small)
    named = "int8" if "another name" in case else None
    assert rewrite(small, 1, edit, named) == code


def test_an_encoding_that_the_round_does_not_ask_for_is_refused(small):
    everybody_trains(small)
    folder = small / "inbox/1/round-00000"
    record = json.loads((folder / "update.json").read_bytes()) | {"encoding": "f16"}
    record.pop("checksum")
    (folder / "update.json").write_text(json.dumps(record))
    Federation.open(small).server.aggregate()
    (refused,) = read_manifest(small, 1)["aggregation"]["refused"]
    assert refused["code"] == "schema"
    assert "the round asks for values" in refused["reason"]
