"""A federation on disk: clients that answer without a model, and what their workspace holds afterwards."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import scaffold_client
import yaml
from protocol_client import take_part
from safetensors.numpy import load_file

from fedcli import Federation, Observer
from fedcli.algos.scaffold import Scaffold
from fedcli.client.due import train_client
from fedcli.config import apply_overrides, read_document
from fedcli.data.encoded import EncodedExample, EncodedRow, EncodedRows
from fedcli.parties.party import Party
from fedcli.workspace.client_state import read_states
from fedcli.workspace.layout import Workspace
from fedcli.workspace.train_records import TrainRecord

ADAPTER = "adapter_model.safetensors"
CONTROL_DELTA = "control_delta.safetensors"
NUM_SAMPLES = {0: 3, 1: 50, 2: 447}


def configure(workspace: Path, *overrides: str) -> None:
    """Edit fedcli.yaml as a user would between two rounds."""
    path = workspace / "fedcli.yaml"
    document = read_document(path.read_text(), path)
    apply_overrides(document, overrides)
    path.write_text(yaml.safe_dump(document))


def restart(workspace: Path, algorithm: str) -> None:
    """Let round 0, which nobody has answered, be one of another algorithm."""
    configure(workspace, f"algorithm.name={algorithm}")
    shutil.rmtree(workspace / "rounds")
    Federation(Workspace(workspace)).server.open()


def noisy(client: int):
    """Return a training that adds a client's own noise, so that no two clients send the same values."""
    # A generator a tensor: safetensors hands out tensors in no fixed order.
    return lambda array: array + np.random.default_rng(client).normal(scale=0.1, size=array.shape)


def all_take_part(workspace: Path) -> None:
    """Let every client of the cohort answer the open round."""
    for client, num_samples in NUM_SAMPLES.items():
        take_part(workspace, client, noisy(client), num_samples)


def answer(workspace: Path, number: int) -> list[int]:
    """Let the cohort of a scaffold round answer; return it."""
    cohort = read_manifest(workspace, number)["cohort"]
    for client in cohort:
        assert scaffold_client.take_part(workspace, client, f"{workspace}/home/{client}", client - 1.0, 10 + client)
    return cohort


class Stub:
    """Stands in for the loaded model: gradient descent to a point of the client's, by the client rule."""

    def __init__(self, goal: float = 0.0) -> None:
        self.goal = goal

    def load(self, party: Party, observer: Observer) -> "Stub":
        """Stand in for the process's models, too."""
        return self

    def rows(self, party: Party, train: TrainRecord, *, group_by: str | None) -> EncodedRows:
        """Return as many rows as the client has, none of which is looked at."""
        rows = EncodedRows()
        for _ in range(NUM_SAMPLES[party.client]):
            rows.append(EncodedRow((EncodedExample(np.zeros(2, np.int32), np.ones(2, np.bool_)),)))
        return rows

    def select(self, party: Party, train: TrainRecord, adapter, beside) -> None:
        """Choose no rows."""

    def train(self, adapter, train: TrainRecord, *, party: Party, rule, **_: object):
        """Return the values after the round's steps, and the steps' losses."""
        values = {}
        for name, weight in adapter.items():
            for _step in range(train.steps if rule is None or rule.trains(name) else 0):
                gradient, term = weight - (party.client - self.goal), None
                if rule is not None:
                    pull = rule.gradient_term(weight, rule.arrays[name])
                    gradient = gradient if pull is None else gradient + pull
                    term = rule.weight_term(rule.arrays[name], train.learning_rate)
                weight = weight - train.learning_rate * gradient
                weight = weight if term is None else weight + term
            values[name] = weight.astype("float32")
        return values, [1.0] * train.steps


def train_as(client: int, workspace: Path, goal: float = 0.0) -> None:
    """Let a client do all that `client train` does, but for the model."""
    result = train_client(Federation.open(workspace).state, client, Stub(goal), observer=Observer())
    assert result.status in ("submitted", "already_submitted")


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


def own(workspace: Path, client: int) -> dict[str, np.ndarray]:
    """Return a client's c_k for the open round as fedcli finds it; empty for zero."""
    state = Federation.open(workspace).state
    rounds = [*state.past(), state.head]
    return read_states(Workspace(workspace).private(client), rounds, client).get(Scaffold.private_state, {})


def stored_hashes(workspace: Path) -> dict[str, str]:
    """Return every file's hash; not of the locks, which name their latest holder."""
    files = (path for path in workspace.rglob("*") if path.is_file() and path.name not in ("server.lock", "lock"))
    return {str(path.relative_to(workspace)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def adapter_hashes(workspace: Path) -> list[str]:
    """Return the hash of every round's adapter."""
    return [
        hashlib.sha256((folder / "adapter" / ADAPTER).read_bytes()).hexdigest()
        for folder in sorted((workspace / "rounds").iterdir())
    ]
