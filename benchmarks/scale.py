"""10,000 clients and 200 rounds of history: what the commands take that run all the time, and what they take without.

Both workspaces have ten clients a round, the tiny model's adapter, and parties that have all joined; in the small one
ten are all, and round 1 is open. The updates themselves cost nothing here, so that a whole `fedcli server aggregate` is
its overhead. Everything measured is a process of its own. The last line is `scale: ratio R (limit 1)`: the worst of the
seconds of `fedcli status` over 0.5, and of `fedcli server aggregate` over 1; the exit code is 1 past the limit.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import record

from fedcli import Federation
from fedcli.workspace.history import Round, read_identity
from fedcli.workspace.inbox import drop_update
from fedcli.workspace.layout import ADAPTER_FILE, ADAPTER_NAME, UPDATE_RECORD, Workspace
from fedcli.workspace.records import PROTOCOL, UpdateRecord
from fedcli.workspace.registrations import DataCard, Registration

STATUS_SECONDS, AGGREGATE_SECONDS = 0.5, 1.0
PER_ROUND = 10


def main() -> int:
    """Make both workspaces, run the commands in each, and write what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        figures = {
            "large": measure(folder / "large", arguments.clients, arguments.rounds, arguments.repeats),
            "small": measure(folder / "small", PER_ROUND, 1, arguments.repeats),
        }
    found = figures["large"]
    worst = max(found["status"] / STATUS_SECONDS, found["server aggregate"] / AGGREGATE_SECONDS)
    figures["large"] |= {"clients": arguments.clients, "rounds": arguments.rounds}
    return record("scale", round(worst, 3), 1, figures)


def measure(folder: Path, clients: int, rounds: int, repeats: int) -> dict[str, float]:
    """Make a workspace with so many rounds behind it; return the median seconds of each command."""
    settings = {
        "data.source": "null",
        "federation.signatures": "off",
        "federation.clients": clients,
        "federation.per_round": PER_ROUND,
    }
    settings |= {"federation.rounds": rounds + repeats + 1, "adapter.rank": 1}
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    seconds = {"init": run("init", str(folder), *options)}
    workspace = Workspace(folder)
    join_all(workspace, clients)
    for _ in range(rounds):
        answer(workspace)
        Federation(workspace).server.aggregate()
    drawn = str(Federation(workspace).round().manifest.cohort[0])
    commands = {
        "status": ("status",),
        "client status": ("client", "status", "--id", drawn),
        "server aggregate": ("server", "aggregate"),
    }
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        answer(workspace)
        for name, command in commands.items():
            taken[name].append(run(*command, "-w", str(folder)))
    seconds |= {name: statistics.median(found) for name, found in taken.items()}
    seconds = {name: round(found, 3) for name, found in seconds.items()}
    print(f"{clients:,} clients, {rounds} rounds: {seconds}")
    return seconds


def join_all(workspace: Workspace, clients: int) -> None:
    """Make what `client join` makes of each party, but not durably: that would take a minute."""
    identity = read_identity(workspace).id
    for client in range(clients):
        card = DataCard(num_rows=client + 1)
        registration = Registration(workspace=identity, client=client, data=card)
        workspace.registration(client).write_bytes(registration.to_bytes())
        workspace.client_inbox(client).mkdir()


def answer(workspace: Workspace) -> None:
    """Let the cohort send the adapter back as it is."""
    head = Federation(workspace).round()
    contents = head.read(ADAPTER_NAME)
    for client in head.manifest.cohort:
        entry = update_record(head, client).to_bytes()
        drop_update(head, client, [(ADAPTER_FILE, contents), (UPDATE_RECORD, entry)])


def update_record(head: Round, client: int) -> UpdateRecord:
    """Return what a client says of its update."""
    return UpdateRecord(
        protocol=PROTOCOL,
        workspace=head.manifest.workspace,
        round=head.number,
        base=head.sha256,
        client=client,
        num_samples=client + 1,
        steps=10,
        train_loss=1.0,
        files={ADAPTER_FILE: head.manifest.files[ADAPTER_NAME]},
    )


def run(*command: str) -> float:
    """Run a fedcli process; return its seconds."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "fedcli", *command], stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
