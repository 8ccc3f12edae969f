"""Clients of ranks of their own, and beside a frozen adapter, that answer without a model; and dense arithmetic."""

import json
import shutil
from pathlib import Path

import numpy as np

from fedcli import Federation
from fedcli.algos.lora import cut, pairs
from fedcli.workspace.history import Round
from fedcli.workspace.inbox import drop_update
from fedcli.workspace.layout import ADAPTER_FILE, UPDATE_RECORD, Workspace
from fedcli.workspace.records import PROTOCOL, UpdateRecord, file_entry
from fedcli.workspace.tensors import encode
from support.federation import configure

ROWS = {0: 3, 1: 50, 2: 47}


def restart_with(workspace: Path, ranks: object) -> None:
    """Let the federation begin anew with other ranks."""
    document = json.loads((workspace / "workspace.json").read_text())
    document["fixed"]["adapter"]["rank"] = ranks
    document.pop("checksum", None)
    (workspace / "workspace.json").write_text(json.dumps(document))
    configure(workspace, f"adapter.rank={json.dumps(ranks)}")
    shutil.rmtree(workspace / "rounds")
    Federation(Workspace(workspace)).server.open()


def head_of(workspace: Path) -> Round:
    """Return the open round."""
    return Federation.open(workspace).state.head


def answer(workspace: Path, client: int, *, rank: int | None = None, says_delta: bool = True) -> dict[str, np.ndarray]:
    """Let a client answer with noise of its own; return what it sent."""
    head = head_of(workspace)
    rng = np.random.default_rng([client, head.number])
    rank = rank or head.manifest.rank_of(client) or 10**6
    start = cut(head.adapter(), rank)
    trained = {
        name: array + rng.normal(scale=0.1, size=array.shape).astype("f4") for name, array in sorted(start.items())
    }
    contents = encode(trained)
    record = UpdateRecord(
        protocol=PROTOCOL,
        workspace=head.manifest.workspace,
        round=head.number,
        base=head.sha256,
        client=client,
        num_samples=ROWS[client],
        steps=1,
        train_loss=None,
        files={ADAPTER_FILE: file_entry(contents)},
        base_delta=head.manifest.base_delta if says_delta else None,
    )
    assert drop_update(head, client, [(ADAPTER_FILE, contents), (UPDATE_RECORD, record.to_bytes())])
    return trained


def dense(adapter: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return each module's product B A, formed."""
    return {module: adapter[b].astype(float) @ adapter[a].astype(float) for module, (a, b) in pairs(adapter).items()}


def mean_product(updates: dict[int, dict[str, np.ndarray]], weights: dict[int, float]) -> dict[str, np.ndarray]:
    """Return the weighted mean of clients' products."""
    formed, total = {client: dense(update) for client, update in updates.items()}, sum(weights.values())
    modules = formed[min(formed)]
    return {module: sum(weights[client] / total * formed[client][module] for client in formed) for module in modules}
