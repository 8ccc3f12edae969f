"""Hostile updates under every rule and every algorithm: each is named, and refused or borne; the round goes on."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scaffold_client
from protocol_client import take_part
from safetensors.numpy import load_file, save_file
from support.federation import ADAPTER, CONTROL_DELTA, configure, noisy, read_adapter, read_manifest, restart

from fedcli import Federation
from fedcli.algos import ALGORITHMS, rules
from fedcli.errors import NotReadyError
from fedcli.workspace.parsing import sha256
from fedcli.workspace.records import file_entry

slow = pytest.mark.slow
CLIENTS = 5
RULES = ("mean", *rules.BY_PRODUCTS, *rules.BLOCKWISE)
FILES = (ADAPTER, CONTROL_DELTA)


@pytest.fixture(scope="module")
def five_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of five clients; tests must not change it."""
    settings = {
        "data.source": None,
        "federation.signatures": "off",
        "federation.clients": CLIENTS,
        "federation.rounds": 3,
        "adapter.rank": 1,
        "adapter.target_modules": ["q_proj"],
    }
    return Path(Federation.create(tmp_path_factory.mktemp("five"), preset="demo", settings=settings).path)


@pytest.fixture
def five(five_template: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(five_template, tmp_path / "five"))


def write(update: Path, files: dict[str, bytes], **changes: object) -> None:
    """Write some of an update's files, and its update.json with their hashes and other changes."""
    record = json.loads((update / "update.json").read_bytes()) | changes
    for name, contents in files.items():
        (update / name).write_bytes(contents)
        entry = file_entry(contents)
        record["files"][name] = {"sha256": entry.sha256, "bytes": entry.bytes}
    record.pop("checksum", None)
    (update / "update.json").write_text(json.dumps(record))


def filled(edit: Callable[[np.ndarray], object], *names: str) -> Callable[[Path], None]:
    """Return what changes every array of some files."""

    def change(update: Path) -> None:
        for name in names:
            if (update / name).exists():
                arrays = {key: array.copy() for key, array in load_file(update / name).items()}
                for key in arrays:
                    arrays[key] = np.asarray(edit(arrays[key]), np.float32)
                save_file(arrays, update.parent / ".scratch")
                write(update, {name: (update.parent / ".scratch").read_bytes()})

    return change


def last(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return what sets an array's last number."""

    def edit(array: np.ndarray) -> np.ndarray:
        array.flat[-1] = value
        return array

    return edit


def constant(value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: np.full_like(array, value)


def emptied(update: Path) -> None:
    for path in update.iterdir():
        path.write_bytes(b"")


HOSTILE: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "nan": (filled(last(np.nan), ADAPTER), "nonfinite"),
    "infinity": (filled(last(-np.inf), ADAPTER), "nonfinite"),
    "3e38": (filled(constant(3e38), *FILES), "nonfinite"),
    "1e30": (filled(constant(1e30), *FILES), "nonfinite"),
    "squares overflow": (filled(last(1e20), ADAPTER), "nonfinite"),
    "one beyond the bound": (filled(last(4294967808.0), ADAPTER), "nonfinite"),
    "at the bound": (filled(constant(2.0**32), *FILES), None),
    "denormals": (filled(constant(1e-45), *FILES), None),
    "all zero": (filled(constant(0.0), *FILES), None),
    "signs": (filled(lambda array: np.where(np.arange(array.size).reshape(array.shape) % 2, -4e9, 4e9), *FILES), None),
    "huge num_samples": (lambda update: write(update, {}, num_samples=2**53), None),
    "more than 2^53 rows": (lambda update: write(update, {}, num_samples=2**53 + 1), "samples"),
    "truncated": (lambda update: write(update, {ADAPTER: (update / ADAPTER).read_bytes()[:-4]}), "header"),
    "torn": (lambda update: (update / ADAPTER).write_bytes((update / ADAPTER).read_bytes()[:100]), "size"),
    "empty": (emptied, "json"),
    "wrong shapes": (filled(lambda array: array.reshape(-1, 1, 1), ADAPTER), "schema"),
    "nan in the control alone": (filled(last(np.nan), CONTROL_DELTA), "nonfinite"),
    "a control of no shape": (filled(lambda array: array[..., :0], CONTROL_DELTA), "schema"),
}


def answer(workspace: Path, algorithm: str, hostile: dict[int, Callable[[Path], object]]) -> None:
    """Let all clients answer the open round, and spoil the updates of some."""
    number = len([*(workspace / "rounds").iterdir()]) - 1
    for client in range(CLIENTS):
        if algorithm == "scaffold":
            scaffold_client.take_part(workspace, client, f"{workspace.parent}/home/{client}", 0.1 * client, 10 + client)
        else:
            take_part(workspace, client, noisy(100 * number + client), 10 + client)
        if client in hostile:
            update, home = workspace / f"inbox/{client}/round-{number:05d}", workspace.parent / f"home/{client}"
            candidate = home / sha256((update / "update.json").read_bytes())
            hostile[client](update)
            if candidate.exists():
                candidate.rename(home / sha256((update / "update.json").read_bytes()))


def check_round(workspace: Path, refused: dict[int, str]) -> None:
    """The round was merged of all others, is finite, and is computed again."""
    aggregation = read_manifest(workspace, 1)["aggregation"]
    assert {entry["client"]: entry["code"] for entry in aggregation["refused"]} == refused
    assert [entry["client"] for entry in aggregation["counted"]] == sorted({*range(CLIENTS)} - refused.keys())
    assert all(np.isfinite(array).all() for array in read_adapter(workspace, 1).values())
    verified = Federation.open(workspace).verify()
    assert (verified.violations, verified.num_recomputed) == ([], 1)


NAMES = sorted(ALGORITHMS)
EVERY = [(algorithm, rule) for algorithm in NAMES for rule in RULES]


def some_kinds(algorithm: str, rule: str) -> list[str]:
    """Return a sixth of the kinds, another one for each neighbour, so that each rule and algorithm meets all."""
    known = [kind for kind in HOSTILE if algorithm == "scaffold" or "control" not in kind]
    return known[(NAMES.index(algorithm) + RULES.index(rule)) % 6 :: 6]


def forget(workspace: Path, *clients: int) -> None:
    """Take back a merge of round 0, and what some clients sent."""
    shutil.rmtree(workspace / "rounds/00001", ignore_errors=True)
    for client in clients:
        shutil.rmtree(workspace / f"inbox/{client}")
        shutil.rmtree(workspace.parent / f"home/{client}", ignore_errors=True)


@pytest.mark.parametrize(
    ("algorithm", "rule"), [pytest.param(*each, marks=[] if each == ("fedavg", "mean") else slow) for each in EVERY]
)
def test_one_hostile_update_of_any_kind_stops_no_round(five: Path, algorithm: str, rule: str) -> None:
    restart(five, algorithm)
    configure(five, f"aggregation.rule={rule}")
    for kind in some_kinds(algorithm, rule):
        damage, code = HOSTILE[kind]
        answer(five, algorithm, {1: damage})
        assert Federation.open(five).server.aggregate(refuse_arriving=True).published, kind
        check_round(five, {} if code is None else {1: code})
        forget(five, 1)


@slow
@pytest.mark.parametrize("rule", RULES)
def test_where_all_updates_but_one_are_refused_that_one_counts_or_the_error_says_why(five: Path, rule: str) -> None:
    configure(five, f"aggregation.rule={rule}")
    kinds = ["nan", "3e38", "torn", "wrong shapes"]
    answer(five, "fedavg", {client: HOSTILE[kind][0] for client, kind in enumerate(kinds)})
    if "krum" in rule:
        with pytest.raises(
            NotReadyError, match=f"1 updates are valid, and {rule} needs 3 to tolerate 0 hostile"
        ) as got:
            Federation.open(five).server.aggregate(refuse_arriving=True)
        assert "aggregation.rule in fedcli.yaml" in (got.value.hint or "")
        configure(five, "aggregation.rule=mean")
    assert Federation.open(five).server.aggregate(refuse_arriving=True).published
    check_round(five, {client: HOSTILE[kind][1] for client, kind in enumerate(kinds)})


@slow
@pytest.mark.parametrize("rule", ["mean", "median", "multi_krum"])
def test_where_all_updates_are_refused_each_is_named_and_others_may_be_sent(five: Path, rule: str) -> None:
    configure(five, f"aggregation.rule={rule}")
    kinds = ["nan", "3e38", "torn", "wrong shapes", "empty"]
    answer(five, "fedavg", {client: HOSTILE[kind][0] for client, kind in enumerate(kinds)})
    server = Federation.open(five).server
    for options in ({}, {"partial": True}):
        with pytest.raises(NotReadyError, match="round 0 has no valid update") as got:
            server.aggregate(refuse_arriving=True, **options)
        for client, kind in enumerate(kinds):
            assert f"client {client}: {HOSTILE[kind][1]}" in got.value.message
    for client in range(CLIENTS):
        assert server.discard(client)
    answer(five, "fedavg", {})
    assert server.aggregate().published
    check_round(five, {})


@slow
@pytest.mark.parametrize("algorithm", [*NAMES, "fedavgm heavy_ball"])
def test_updates_at_the_bound_in_every_round_overflow_nothing(five: Path, algorithm: str) -> None:
    name, _, momentum = algorithm.partition(" ")
    restart(five, name)
    configure(five, "federation.rounds=8", *([f"algorithm.momentum={momentum}"] * bool(momentum)))
    for number in range(8):
        sign = -1.0 if number % 2 else 1.0
        answer(five, name, {client: filled(constant(sign * 2.0**32), *FILES) for client in range(CLIENTS)})
        assert Federation.open(five).server.aggregate().published
    assert all(np.isfinite(array).all() for array in read_adapter(five, 8).values())
    assert Federation.open(five).verify().violations == []


class Restless(threading.Thread):
    """Puts the files of two valid updates in each other's place without end; each file is always there."""

    def __init__(self, update: Path, other: Path) -> None:
        super().__init__(daemon=True)
        self._update, self._names = update, [path.name for path in update.iterdir()]
        self._sources = [
            Path(shutil.copytree(folder, other.with_name(f".{folder.name}"))) for folder in (update, other)
        ]
        self.is_over = threading.Event()

    def run(self) -> None:
        while not self.is_over.is_set():
            for source in self._sources:
                for name in self._names:
                    os.link(source / name, self._update.with_name(".spare"))
                    self._update.with_name(".spare").replace(self._update / name)


@slow
@pytest.mark.parametrize("rule", ["mean", "multi_krum", "median"])
def test_a_client_that_swaps_its_update_without_end_stops_no_round(five: Path, rule: str) -> None:
    configure(five, f"aggregation.rule={rule}")
    answer(five, "fedavg", {})
    inbox = five / "inbox/1"
    (inbox / "round-00000").rename(inbox / ".first")
    take_part(five, 1, noisy(99), 11)
    restless = Restless(inbox / "round-00000", inbox / ".first")
    restless.start()
    try:
        for _ in range(4):
            assert Federation.open(five).server.aggregate().published
            aggregation = read_manifest(five, 1)["aggregation"]
            assert {entry["client"] for entry in aggregation["counted"]} >= {0, 2, 3, 4}
            assert {entry["client"] for entry in aggregation["refused"]} <= {1}
            forget(five)
    finally:
        restless.is_over.set()
        restless.join()
