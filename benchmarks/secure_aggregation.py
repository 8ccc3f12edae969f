"""What secure aggregation costs: 10 parties with updates of 67 MB in the clear, masked pairwise, and masked double.

Every visit of a party and of the server is a process of its own, with a training that takes no time. CPU seconds are
compared, for they hardly depend on what else the machine does, and the peaks of memory. With `double` a party's figures
are of both of its visits. The last line is `secure_aggregation: ratio R (limit 6)`: of a party's CPU seconds with
double, the dearest, over those in the clear.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from aggregate import enlarged
from record import record
from untrained import Untrained

from fedcli import Federation, Observer
from fedcli.client.due import train_client
from fedcli.server.enrol import open_trust
from fedcli.workspace.history import read_identity
from fedcli.workspace.layout import MANIFEST, MANIFEST_SIGNATURE, Workspace

MOST_RATIO = 6.0
MODES = ("off", "pairwise", "double")


def main() -> int:
    """Play a round in each way, and write what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--dropped", type=int, default=0, help="so many of them never come")
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to measure on (the default: TMPDIR)")
    parser.add_argument("--come", nargs=2, metavar=("WORKSPACE", "ID"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.come:
        workspace, client = arguments.come
        train_client(Federation.open(workspace).state, int(client), Untrained(), observer=Observer())
        return 0
    figures = {}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        os.environ["XDG_DATA_HOME"] = f"{scratch}/data"
        for mode in MODES:
            workspace = make_workspace(Path(scratch) / mode, arguments.clients, mode)
            figures[mode] = play(workspace, arguments.clients - arguments.dropped)
            print(mode, figures[mode], flush=True)
            subprocess.run(["rm", "-r", f"{scratch}/{mode}", f"{scratch}/data"], check=True)
    ratios = {
        mode: {key: round(figures[mode][key] / figures["off"][key], 2) for key in figures["off"]} for mode in MODES[1:]
    }
    print(ratios)
    facts = {"clients": arguments.clients, "dropped": arguments.dropped, "figures": figures, "ratios": ratios}
    return record("secure_aggregation", ratios["double"]["client_cpu_seconds"], MOST_RATIO, facts)


def make_workspace(root: Path, clients: int, mode: str) -> Workspace:
    """Make a workspace whose parties have joined and are enrolled, with an adapter of 67 MB."""
    settings = {"data.source": "null", "federation.clients": clients, "federation.rounds": 1}
    settings["privacy.secure_aggregation"] = mode
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    run([sys.executable, "-m", "fedcli", "init", str(root), *options])
    workspace = Workspace(root)
    start = enlarged(workspace)
    trust = open_trust(workspace, read_identity(workspace))
    assert trust is not None
    (start.folder / MANIFEST_SIGNATURE).write_bytes(trust.sign_round((start.folder / MANIFEST).read_bytes()))
    federation = Federation.open(root)
    rows = root.parent / f"rows-{mode}.jsonl"
    rows.write_text("".join(f'{{"instruction": "say {number}", "output": "{number}"}}\n' for number in range(10)))
    for client in range(clients):
        federation.server.enrol(client, federation.client(client).join(rows, share="minimal").commit())
    return workspace


def play(workspace: Workspace, clients: int) -> dict[str, float]:
    """Let parties and the server come by until the round is merged; return a party's and the server's cost."""
    spent = dict.fromkeys(range(clients), 0.0)
    peaks: dict[str, list[int]] = {"client": [], "server": []}
    server = 0.0
    aggregate = [sys.executable, "-m", "fedcli", "server", "aggregate", "-w", str(workspace.root), "--partial"]
    while not workspace.has_round(1):
        for client in range(clients):
            seconds, peak = run([sys.executable, __file__, "--come", str(workspace.root), str(client)])
            spent[client] += seconds
            peaks["client"].append(peak)
        seconds, peak = run(aggregate, codes=(0, 6))
        server += seconds
        peaks["server"].append(peak)
    return {
        "client_cpu_seconds": round(statistics.median(spent.values()), 2),
        "client_peak_mb": round(max(peaks["client"]) / 1e6),
        "server_cpu_seconds": round(server, 2),
        "server_peak_mb": round(max(peaks["server"]) / 1e6),
        "update_mb": round(sum(path.stat().st_size for path in workspace.update(0, 0).iterdir()) / 1e6, 1),
    }


def run(command: list[str], codes: tuple[int, ...] = (0,)) -> tuple[float, int]:
    """Run a process; return its CPU seconds and the peak of its memory in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    told = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in codes:
        raise SystemExit(f"{command[1:4]} failed: {told.decode()}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
