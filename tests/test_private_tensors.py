"""Tensors that stay with their clients, and frozen ones: algorithms of another package, each in one file."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from protocol_client import take_part
from safetensors.numpy import load_file
from support.federation import ADAPTER, NUM_SAMPLES, noisy, read_adapter, read_manifest, stored_hashes, train_as
from support.kills import copies_killed_at_every_call
from support.plugins import install, python_path
from support.processes import ENVIRONMENT, SMALL, command, settings

from fedcli import Federation
from fedcli.algos import ALGORITHMS
from fedcli.cli import main
from fedcli.errors import UsageError
from fedcli.scoring.targets import Targets, find_targets
from fedcli.workspace.layout import Workspace

PACKAGE = '''"""FedSA-LoRA (arXiv 2410.01463) and FFA-LoRA (2403.12313), as somebody else's package."""

from dataclasses import dataclass
from typing import Literal

from fedcli.algos.algorithm import Algorithm
from fedcli.algos.client_rule import ClientRule


@dataclass(frozen=True, kw_only=True)
class FedSa(Algorithm):
    """Clients share lora_A and keep their own lora_B."""

    private_state = "factors"
    name: Literal["fedsa"] = "fedsa"

    def shares(self, tensor):
        return "lora_A" in tensor

    def start(self, adapter, own):
        return {**adapter, **own}

    def client_step(self, adapter, trained, state, own, *, steps, learning_rate):
        return {}, {name: array for name, array in trained.items() if not self.shares(name)}


class Frozen(ClientRule):
    def trains(self, tensor):
        return "lora_A" not in tensor


@dataclass(frozen=True, kw_only=True)
class Ffa(Algorithm):
    """lora_A is frozen; lora_B is shared."""

    name: Literal["ffa"] = "ffa"

    def shares(self, tensor):
        return "lora_B" in tensor

    def client_rule(self, adapter, state, own):
        return Frozen(adapter)
'''
TWO = (*SMALL, "federation.clients=2", "federation.rounds=3", "train.steps=3")
FACTORS = {"fedsa": "lora_A", "ffa": "lora_B"}
"""What the updates of each carry."""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    points = {"fedcli.algorithms": {"fedsa": "somebodys_factors:FedSa", "ffa": "somebodys_factors:Ffa"}}
    return install(tmp_path_factory.mktemp("package"), "somebodys-factors", PACKAGE, points)


def run(package: Path, workspace: Path, *arguments: object, code: int = 0) -> str:
    """Run a fedcli process that sees the package; return what it printed."""
    environment = ENVIRONMENT | python_path(package)
    done = subprocess.run(command(*arguments), cwd=workspace, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def update(workspace: Path, number: int, client: int) -> Path:
    return workspace / "inbox" / str(client) / f"round-{number:05d}" / ADAPTER


def mean(workspace: Path, number: int, name: str, weights: dict[int, int]) -> np.ndarray:
    sent = {client: load_file(update(workspace, number, client))[name].astype(float) for client in weights}
    return sum(weights[client] * sent[client] for client in weights) / sum(weights.values())


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", FACTORS)
def test_updates_carry_one_factor_the_other_stays_as_it_was_and_the_federation_is_verified(
    package, tmp_path, algorithm
):
    run(package, tmp_path, "init", ".", *settings(*TWO, f"algorithm.name={algorithm}"))
    run(package, tmp_path, "run")
    assert "no violation" in run(package, tmp_path, "verify")
    start = read_adapter(tmp_path, 0)
    shared = sorted(name for name in start if FACTORS[algorithm] in name)
    numbers = sum(start[name].size for name in shared)
    assert len(shared) == len(start) / 2
    for number in range(3):
        manifest = read_manifest(tmp_path, number)
        assert manifest["update_tensors"] == shared
        assert manifest["cost"]["communicated_parameters"] == numbers
        assert manifest["cost"]["trainable_parameters"] == sum(array.size for array in start.values())
        counted = read_manifest(tmp_path, number + 1)["aggregation"]["counted"]
        weights = {entry["client"]: entry["num_samples"] for entry in counted}
        before, after = read_adapter(tmp_path, number), read_adapter(tmp_path, number + 1)
        for client in (0, 1):
            path = update(tmp_path, number, client)
            assert sorted(load_file(path)) == shared
            assert path.stat().st_size == manifest["cost"]["client_bytes_up"]
            assert 0 < path.stat().st_size - 4 * numbers < 150 * len(shared)  # the header
        for name in start:
            if name in shared:
                assert not np.array_equal(after[name], before[name])
                np.testing.assert_allclose(after[name], mean(tmp_path, number, name, weights), rtol=0, atol=1e-7)
            else:
                assert np.array_equal(after[name], start[name])
    kept = [load_file(path) for path in sorted((tmp_path / "private/0").glob("factors/round-0000[12]-*"))]
    assert len(kept) == (2 if algorithm == "fedsa" else 0)
    for arrays in kept:
        assert sorted(arrays) == sorted(start.keys() - shared)
        assert all(array.any() for array in arrays.values())


@pytest.fixture(scope="module")
def own(package: Path) -> Iterator[None]:
    """The package's algorithm is fedcli's own, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        path = f"{package}/somebodys_factors.py"
        spec = importlib.util.spec_from_file_location("somebodys_factors", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        patch.setitem(ALGORITHMS._own, "fedsa", module.FedSa)
        yield


@pytest.fixture(scope="module")
def opened(own: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation of fedsa whose round 0 is open; tests must not change it."""
    folder = tmp_path_factory.mktemp("opened") / "workspace"
    assert main(["init", str(folder), *settings(*TWO, "algorithm.name=fedsa")]) == 0
    return folder


def play(workspace: Path, rounds: int) -> None:
    for _ in range(rounds):
        train_as(0, workspace)
        train_as(1, workspace)
        assert Federation.open(workspace).server.aggregate().published


def test_three_rounds_of_two_clients_are_those_of_a_formula(opened, tmp_path):
    """The stand-in for a model makes gradient descent to the point `client` from where its training starts."""
    folder = Path(shutil.copytree(opened, tmp_path / "workspace"))
    play(folder, 3)
    start = read_adapter(folder, 0)
    x = {name: array.astype(float) for name, array in start.items()}
    y = {client: dict(x) for client in (0, 1)}
    for number in range(3):
        rate = read_manifest(folder, number)["train"]["learning_rate"]
        for client in (0, 1):
            for name in x:
                begin = x[name] if "lora_A" in name else y[client][name]
                y[client][name] = client + (begin - client) * (1 - rate) ** 3
            kept = [*(folder / "private" / str(client) / "factors").glob(f"round-{number:05d}-*")]
            assert len(kept) == min(number, 1)  # what the last two updates are about; older ones have gone
            for name, array in load_file(kept[0]).items() if kept else ():
                np.testing.assert_allclose(array, y[client][name], rtol=1e-5, atol=1e-7)
        for name in filter(lambda name: "lora_A" in name, x):
            sent = sum(NUM_SAMPLES[client] * y[client][name] for client in (0, 1))
            x[name] = sent / (NUM_SAMPLES[0] + NUM_SAMPLES[1])
        for name, array in read_adapter(folder, number + 1).items():
            np.testing.assert_allclose(array, x[name], rtol=1e-5, atol=1e-7)
    assert Federation(Workspace(folder)).verify().violations == []


def stored(workspace: Path) -> dict[str, str]:
    """Return the hashes of all files of the rounds and of the updates."""
    parts = ("rounds", "inbox")
    return {f"{part}/{name}": found for part in parts for name, found in stored_hashes(workspace / part).items()}


def go_on(workspace: Path) -> None:
    """Let round 1 be merged and client 0 answer round 2, from the factors of its counted update."""
    assert Federation.open(workspace).server.aggregate().published
    train_as(0, workspace)


@pytest.mark.slow
def test_a_client_killed_at_any_system_call_keeps_the_factors_of_its_counted_update(opened, tmp_path):
    """The process that is killed trains to another end than the one behind it: its candidate must not be taken."""
    start = Path(shutil.copytree(opened, tmp_path / "start" / "workspace"))
    play(start, 1)
    train_as(1, start)
    undisturbed = {}
    for goal in (0.0, 7.0):
        folder = Path(shutil.copytree(start, tmp_path / f"{goal}"))
        train_as(0, folder, goal)
        go_on(folder)
        undisturbed[goal] = stored(folder)
    strays = 0
    for workspace in copies_killed_at_every_call(start, partial(train_as, 0, goal=7.0), after=False):
        counts = 7.0 if update(workspace, 1, 0).exists() else 0.0
        train_as(0, workspace)
        strays += len(list((workspace / "private/0/factors").glob("round-00001-*"))) - 1
        go_on(workspace)
        assert stored(workspace) == undisturbed[counts]
        assert Federation(Workspace(workspace)).verify().violations == []
    assert strays >= 10  # kills between the candidate and the drop


def test_an_update_of_all_tensors_is_refused_and_another_list_of_tensors_is_a_violation(opened, tmp_path):
    folder = Path(shutil.copytree(opened, tmp_path / "workspace"))
    take_part(folder, 0, noisy(0), 10)
    train_as(1, folder)
    Federation.open(folder).server.aggregate()
    refused = read_manifest(folder, 1)["aggregation"]["refused"]
    assert [(entry["client"], entry["code"]) for entry in refused] == [(0, "schema")]
    manifest = read_manifest(folder, 1)
    manifest["update_tensors"] = manifest["update_tensors"][1:]
    (folder / "rounds/00001/manifest.json").write_text(json.dumps(manifest))
    problems = [violation.problem for violation in Federation(Workspace(folder)).verify().violations]
    assert "asks for other tensors than its algorithm has updates carry" in problems


def test_an_algorithm_with_momentum_may_merge_a_part_and_one_that_keeps_a_part_may_not_merge_all(
    opened, small, tmp_path
):
    folder = Path(shutil.copytree(opened, tmp_path / "another"))
    start = read_adapter(folder, 0)
    for _ in range(2):
        train_as(0, folder)
        train_as(1, folder)
        Federation.open(folder).server.aggregate(algorithm="fedavgm")
    after = read_adapter(folder, 2)
    assert {name for name in start if np.array_equal(start[name], after[name])} == {n for n in start if "lora_B" in n}
    assert Federation(Workspace(folder)).verify().violations == []
    with pytest.raises(UsageError, match="it changes how clients train"):
        Federation.open(small).server.aggregate(algorithm="fedsa")
    with pytest.raises(UsageError, match="client 0's update of round 1 is no whole model"):
        find_targets(Federation.open(folder).state, Targets(clients=[0]))
