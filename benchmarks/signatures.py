"""What signatures add to `fedcli server aggregate` of 50 updates of 67 MB: the same updates, signed and not, in turn.

All are processes of their own, and pairs of runs begin with each of the two in turn. CPU seconds are compared, for
they hardly depend on what else the machine does. The last line is `signatures: ratio R (limit 1.01)`: the ratio of both
medians. The exit code is 1 past the limit.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from aggregate import make_workspace
from record import record

from fedcli.server.enrol import open_trust
from fedcli.trust.keys import KeyPair
from fedcli.workspace.history import read_identity
from fedcli.workspace.layout import UPDATE_RECORD, UPDATE_SIGNATURE, Workspace
from fedcli.workspace.parsing import sha256

MOST_RATIO = 1.01


def main() -> int:
    """Make both workspaces, merge each in turn, and write what that took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=16)
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to measure on (the default: TMPDIR)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        os.environ["XDG_DATA_HOME"] = f"{scratch}/data"
        plain = make_workspace(Path(scratch) / "plain", arguments.clients)
        signed = make_workspace(Path(scratch) / "signed", arguments.clients, signatures="required")
        sign(signed, arguments.clients)
        merge(plain), merge(signed)  # the files come into the cache
        without, with_them = [], []
        runs = [(plain, without), (signed, with_them)]
        for _ in range(arguments.repeats):
            for workspace, seconds in runs:
                seconds.append(merge(workspace))
            runs.reverse()
    figures = {
        "without_cpu_seconds": round(statistics.median(without), 3),
        "with_cpu_seconds": round(statistics.median(with_them), 3),
        "with_least_cpu_seconds": round(min(with_them), 3),
        "without_least_cpu_seconds": round(min(without), 3),
        "clients": float(arguments.clients),
        "repeats": float(arguments.repeats),
    }
    print(figures)
    ratio = statistics.median(with_them) / statistics.median(without)
    return record("signatures", ratio, MOST_RATIO, {"aggregate": figures})


def sign(workspace: Workspace, clients: int) -> None:
    """Enrol every client under keys of its own, and sign its update."""
    identity = read_identity(workspace)
    trust = open_trust(workspace, identity)
    assert trust is not None
    for client in range(clients):
        key, update = KeyPair.make(), workspace.update(0, client)
        trust = trust.append("enrol", client, keys=key.public)
        digest = sha256((update / UPDATE_RECORD).read_bytes())
        (update / UPDATE_SIGNATURE).write_bytes(key.sign("update", identity.id, digest))


def merge(workspace: Workspace) -> float:
    """Merge round 0 in a process of its own, take the result back, and return the CPU seconds."""
    command = [sys.executable, "-m", "fedcli", "server", "aggregate", "-w", str(workspace.root)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit("server aggregate failed")
    shutil.rmtree(workspace.round(1))
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main())
