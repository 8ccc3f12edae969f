"""`fedcli server aggregate` on 50 updates of 67 MB, and on 500, against hashlib on the same files in the same run.

The 500 are hard links to the 50, each with an update.json of its own. All sides are processes of their own and take
turns; what they read lies in the file system's cache where that holds it all. The last line is `aggregate: ratio R
(limit 1.2)`: the worst of the seconds over hashlib's, which uses the processor's own instructions for SHA-256 as not
every sha256sum does. The exit code is 1 past the limit, or where the peak memory is over 400 MB.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from operator import truediv
from pathlib import Path

import numpy as np
from record import record

from fedcli.workspace.history import Round, read_round
from fedcli.workspace.inbox import drop_update
from fedcli.workspace.layout import ADAPTER_FILE, ADAPTER_NAME, UPDATE_RECORD, Workspace
from fedcli.workspace.records import PROTOCOL, FileEntry, UpdateRecord, file_entry
from fedcli.workspace.tensors import encode, schema_of

MOST_RATIO, MOST_BYTES = 1.2, 400e6
HASHLIB = "import hashlib, sys\nfor path in sys.argv[1:]: hashlib.file_digest(open(path, 'rb'), 'sha256')"
TENSORS = {f"layers.{layer}.{name}": shape for layer in range(32) for name, shape in
           (("q.A", (32, 4096)), ("q.B", (4096, 32)), ("v.A", (32, 4096)), ("v.B", (4096, 32)))}  # fmt: skip
"""LoRA of rank 32 on q and v of a model of 7 billion parameters: 67 MB."""
NUM_FILES = 50


def main() -> int:
    """Make the updates, let both sides read them in turn, and write what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="*", default=[50, 500])
    parser.add_argument("--repeats", type=int, default=5, help="for 50 updates; for more fewer in proportion")
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to measure on (the default: TMPDIR)")
    arguments = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        for clients in arguments.clients:
            repeats = max(1, arguments.repeats * NUM_FILES // clients)
            found = figures[f"{clients} updates"] = measure(Path(scratch), clients, repeats)
            print(f"{clients} updates: {found}")
    peak = max(found["peak_bytes"] for found in figures.values())
    print(f"peak memory {peak / 1e6:.0f} MB (limit {MOST_BYTES / 1e6:.0f})")
    code = record("aggregate", max(found["ratio"] for found in figures.values()), MOST_RATIO, figures)
    return code or int(peak > MOST_BYTES)


def measure(scratch: Path, clients: int, repeats: int) -> dict[str, float]:
    """Let hashlib and a fresh aggregation take turns; return the medians, their ratio, and the largest memory."""
    workspace = make_workspace(scratch / f"workspace-{clients}", clients)
    files = [workspace.update(0, client) / ADAPTER_FILE for client in range(clients)]
    hashing, merging, peaks = [], [], []
    for _ in range(repeats):
        hashing.append(run([sys.executable, "-c", HASHLIB, *map(str, files)])[0])
        seconds, peak = run([sys.executable, "-m", "fedcli", "server", "aggregate", "-w", str(workspace.root)])
        merging.append(seconds)
        peaks.append(peak)
        shutil.rmtree(workspace.round(1))
    return {
        "hashlib_seconds": round(statistics.median(hashing), 2),
        "aggregate_seconds": round(statistics.median(merging), 2),
        "ratio": round(statistics.median(map(truediv, merging, hashing)), 3),
        "peak_bytes": max(peaks),
    }


def make_workspace(root: Path, clients: int, signatures: str = "off") -> Workspace:
    """Make a workspace with one tensor list of 67 MB, and an update of each client."""
    settings = {
        "data.source": "null",
        "federation.signatures": signatures,
        "federation.clients": clients,
        "federation.rounds": 2,
    }
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    run([sys.executable, "-m", "fedcli", "init", str(root), *options])
    workspace = Workspace(root)
    base = enlarged(workspace)
    rng = np.random.default_rng(0)
    shared = root.parent / "updates"  # of all workspaces, so that links cost nothing
    shared.mkdir(exist_ok=True)
    for client in range(clients):
        path = shared / str(client % NUM_FILES)
        if not path.exists():
            path.write_bytes(encode({name: noise(rng, shape) for name, shape in TENSORS.items()}))
            path.with_suffix(".json").write_text(file_entry(path.read_bytes()).model_dump_json())
        entry = FileEntry.model_validate_json(path.with_suffix(".json").read_text())
        drop_update(base, client, [(UPDATE_RECORD, update_record(base, client, entry).to_bytes())])
        os.link(path, workspace.update(0, client) / ADAPTER_FILE)
    return workspace


def enlarged(workspace: Workspace) -> Round:
    """Give round 0 an adapter of the benchmark's size, in place of the tiny model's."""
    adapter = {name: np.zeros(shape, np.float32) for name, shape in TENSORS.items()}
    contents = encode(adapter)
    (workspace.round(0) / ADAPTER_NAME).write_bytes(contents)
    start = read_round(workspace, 0)
    assert start is not None
    changed = {
        "files": start.manifest.files | {ADAPTER_NAME: file_entry(contents)},
        "tensors": schema_of(adapter),
    }
    (start.folder / "manifest.json").write_bytes(start.manifest.model_copy(update=changed).to_bytes())
    enlarged_start = read_round(workspace, 0)
    assert enlarged_start is not None
    return enlarged_start


def noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return values of a trained adapter's size."""
    return rng.standard_normal(shape, np.float32) * np.float32(0.01)


def update_record(base: Round, client: int, entry: FileEntry) -> UpdateRecord:
    """Return what a client says of its update."""
    return UpdateRecord(
        protocol=PROTOCOL,
        workspace=base.manifest.workspace,
        round=0,
        base=base.sha256,
        client=client,
        num_samples=client + 1,
        steps=10,
        train_loss=None,
        files={ADAPTER_FILE: entry},
    )


def run(command: list[str]) -> tuple[float, int]:
    """Run a process; return its seconds and the peak of its memory in bytes."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[:5]} failed")
    return time.monotonic() - started, usage.ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
