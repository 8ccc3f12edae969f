"""Updates that are made by hand, and what of a workspace on disk is the protocol's."""

import json
from pathlib import Path

import numpy as np

from fedcli import Federation
from fedcli.workspace.history import Round
from fedcli.workspace.inbox import drop_update
from fedcli.workspace.layout import ADAPTER_FILE, UPDATE_RECORD, Workspace
from fedcli.workspace.records import PROTOCOL, file_entry
from fedcli.workspace.tensors import encode

PROTOCOL_PARTS = ("fedcli.yaml", "workspace.json", "rounds", "inbox", "clients", "baselines")


def protocol_files(folder: Path) -> dict[str, bytes]:
    """Return what of a workspace on disk is the protocol's, by name."""
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {path.as_posix(): contents for path, contents in files.items() if path.parts[0] in PROTOCOL_PARTS}


def update_of(base: Round, client: int, /, **changes: object) -> list[tuple[str, bytes]]:
    """Return the files of a client's update of a round; `changes` are of update.json, `adapter` the file's bytes."""
    rng = np.random.default_rng([base.number, client])
    arrays = {name: (x + rng.normal(size=x.shape)).astype(np.float32) for name, x in sorted(base.adapter().items())}
    adapter = encode(arrays)
    record = {
        "protocol": PROTOCOL,
        "workspace": base.manifest.workspace,
        "round": base.number,
        "base": base.sha256,
        "client": client,
        "num_samples": 10 + client,
        "steps": 2,
        "train_loss": 1.0,
        "files": {ADAPTER_FILE: file_entry(adapter).model_dump()},
    }
    adapter = changes.pop("adapter", adapter)
    text = changes.pop("text", None) or json.dumps(record | changes).encode()
    return [(ADAPTER_FILE, adapter), (UPDATE_RECORD, text)]


def answer(workspace: Workspace, client: int) -> None:
    """Do what a client does: sweep its inbox, and drop its update of the latest round."""
    workspace.store.sweep(f"inbox/{client}")
    head = Federation(workspace).round()
    drop_update(head, client, update_of(head, client))
