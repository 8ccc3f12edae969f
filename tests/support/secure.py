"""Federations of joined parties with secure aggregation, made without a model; and what their server can read."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fedcli import Federation, Observer
from fedcli.algos.share import sent_tensors
from fedcli.client.due import ClientResult, train_client
from fedcli.data.row_report import RowReport
from fedcli.server.enrol import found_trust
from fedcli.workspace.history import publish_round, read_identity, read_start
from fedcli.workspace.layout import Workspace, default_home
from fedcli.workspace.privacy_records import PrivacyRecord
from support.federation import Stub, configure
from support.warm import write_rows

ROWS = {client: client + 2 for client in range(12)}


class Party(Stub):
    """Trains to a point of the client's own, on as many rows as it registered; counts how often."""

    trained = 0

    def rows(self, party, train, *, group_by=None):
        """Return as many rows as the client has."""
        return range_of(ROWS[party.client])

    def train(self, adapter, train, *, party, rule, **rest):
        """Train to values that no two clients share, and that no other bytes hold."""
        type(self).trained += 1
        drift = {
            name: np.random.default_rng([party.client, len(name)]).normal(scale=0.01, size=array.shape)
            for name, array in adapter.items()
        }
        values = {name: (array + drift[name]).astype(np.float32) for name, array in adapter.items()}
        return values, [1.2345678 + party.client] * train.steps


class range_of(RowReport):
    """Rows of which nothing is looked at but their number."""

    num_truncated = 0

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def __len__(self) -> int:
        return self.count

    @property
    def num_own(self) -> int:
        return self.count


def make(
    template: Path,
    folder: Path,
    mode: str,
    clients: int = 3,
    *,
    algorithm: str = "fedavg",
    rounds: int = 2,
    share: str = "[A, B]",
) -> Path:
    """Make a workspace that waits for parties of a masked federation, and let all join and be enrolled."""
    workspace = Workspace(Path(shutil.copytree(template, folder / "W", ignore=shutil.ignore_patterns("data"))))
    configure(
        workspace.root,
        "data.source=null",
        f"privacy.secure_aggregation={mode}",
        f"federation.clients={clients}",
        "federation.per_round=null",
        f"federation.rounds={rounds}",
        f"algorithm.name={algorithm}",
        f"aggregation.share={share}",
    )
    old, start = read_identity(workspace), read_start(workspace)
    fixed = old.fixed | {"federation.clients": clients}
    identity = old.model_copy(update={"signatures": "required", "simulation": False, "fixed": fixed})
    workspace.identity.write_bytes(identity.to_bytes())
    files = {name: start.read(name) for name in start.manifest.files}
    shutil.rmtree(workspace.rounds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder / "data"))
        trust = found_trust(workspace, identity)
        assert trust is not None
        from fedcli.workspace.federation_state import Experiment

        config = Experiment.read(workspace).config
        chosen, shared = config.algorithm, config.aggregation.shared_factor
        named = {
            "enrolment": trust.enrolment.head,
            "fedcli": "1",
            "cohort": list(range(clients)),
            "privacy": PrivacyRecord(secure_aggregation=mode),
            "algorithm": {"name": algorithm} | {k: v for k, v in vars(chosen).items() if k != "name"},
            "update_files": ["adapter_model.safetensors", *chosen.update_files],
            "cost": None,
            "share": shared,
            "update_tensors": sent_tensors(chosen, shared, 0, start.manifest.tensors),
        }
        train = start.manifest.train.model_copy(
            update={"schedule": start.manifest.train.schedule.model_copy(update={"rounds": rounds})}
        )
        named |= {"rounds": rounds, "train": train}
        assert publish_round(workspace, start.manifest.model_copy(update=named), files, trust.sign_round)
        trust.note_round(read_start(workspace))
        federation = Federation.open(workspace.root)
        for client in range(clients):
            texts = [{"instruction": f"say {n}", "output": f"{n}"} for n in range(ROWS[client])]
            rows = write_rows(folder / f"rows-{client}.jsonl", texts)
            federation.server.enrol(client, federation.client(client).join(rows, share="minimal").commit())
    return folder


def used(template: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy a workspace and its keys, and let this process find them."""
    copy = Path(shutil.copytree(template, folder / "P"))
    monkeypatch.setenv("XDG_DATA_HOME", str(copy / "data"))
    return copy / "W"


def visit(workspace: Path, *clients: int) -> list[str]:
    """Let clients come by, and do what is due; return how each then stands."""
    return [come(workspace, client).status for client in clients]


def come(workspace: Path, client: int) -> ClientResult:
    """Let a client come by."""
    return train_client(Federation.open(workspace).state, client, Party(), observer=Observer())


def merge(workspace: Path, **options: object):
    """Let the server do what is due."""
    return Federation.open(workspace).server.aggregate(**options)


def differences(workspace: Path, client: int) -> dict[str, np.ndarray]:
    """Return what a client's training adds to the open round's adapter, in float64."""
    head = Federation.open(workspace).round()
    adapter = head.adapter()
    values, _ = Party().train(adapter, head.manifest.train, party=Federation_party(client), rule=None)
    return {name: values[name].astype(np.float64) - adapter[name] for name in adapter}


class Federation_party:
    """A client's number."""

    def __init__(self, client: int) -> None:
        self.client = client


def journal(workspace: Path, client: int, number: int = 0) -> dict:
    """Return what a client's home says of a masked round."""
    identity = json.loads((workspace / "workspace.json").read_bytes())["id"]
    return json.loads(default_home(identity, client).masked(number).read_bytes())
