"""The demo with one client three times slower: merged round by round, and with late updates (aggregation.staleness: 2).

    python benchmarks/staleness.py [--rounds 12] [--late-rounds 28] [--seconds 4] [--seed 0]

Each of the five clients is a process of its own that keeps its model; a training takes `--seconds`, the last client's
three times as long: the rest of the time is slept away between its steps. The server is a sixth process. With late
updates a round is merged as soon as four updates are there, made from it or from one of the two rounds before.

Ratio: the rounds per hour of the synchronous way over those with late updates (limit 0.6). The scores are the exact
matches on the demo's held-out rows: after as many rounds each, of the synchronous way when the other had made as many,
and with `--late-rounds` after so many rounds with late updates, as fit into the synchronous way's time.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from record import record

LIMIT = 0.6
CLIENTS = 5
LATE = ("federation.per_round=4", "federation.select=5", "aggregation.staleness=2")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def fedcli(*arguments: object) -> Any:
    """Run a command with --json, and return its document."""
    line = [sys.executable, "-m", "fedcli", *map(str, arguments), "--json"]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)}:\n{done.stderr}")
    return json.loads(done.stdout)


def serve(folder: Path) -> None:
    """Merge until the last round."""
    from fedcli import Federation

    Federation.open(folder).server.run()


def take_part(folder: Path, client: int, seconds: float) -> None:
    """Train whenever something is due, until the last round; each training takes so many seconds."""
    from fedcli import Federation, Observer

    class Slow(Observer):
        """Sleeps after each step until its share of the training's time has passed."""

        began = 0.0

        def step_done(self, client: int | None, report: Any) -> None:
            if report.step == 1:
                self.began = time.monotonic()
            time.sleep(max(0.0, self.began + seconds * report.step / steps - time.monotonic()))

    federation = Federation.open(folder, threads=1)
    steps = federation.state.head.manifest.train.steps
    while federation.client(client).train(wait=3600, observer=Slow()).status != "finished":
        pass


def measure(folder: Path, options: list[str], seconds: float) -> dict[str, Any]:
    """Run a federation of processes to its end; return when its rounds were published, and what counted in them."""
    fedcli("init", folder, *(part for option in options for part in ("--set", option)))
    roles = [
        ("serve",),
        *(("client", client, seconds * (3 if client == CLIENTS - 1 else 1)) for client in range(CLIENTS)),
    ]
    started = time.monotonic()
    processes = [
        subprocess.Popen([sys.executable, __file__, "--role", *map(str, role), "--folder", folder], env=ENVIRONMENT)
        for role in roles
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"processes ended with {codes}")
    manifests = sorted((folder / "rounds").glob("0*/manifest.json"))
    opened = [path.stat().st_mtime for path in manifests]
    counted = [json.loads(path.read_bytes())["aggregation"]["counted"] for path in manifests[1:]]
    ages = [number - entry.get("base", number) for number, entries in enumerate(counted) for entry in entries]
    of_slow = sum(entry["client"] == CLIENTS - 1 for entries in counted for entry in entries)
    first = opened[1]  # the first round has the loading of six processes in it
    if fedcli("verify", "-w", folder)["violations"]:
        raise SystemExit("verify found violations")
    return {
        "published": [round(each - first, 1) for each in opened[1:]],
        "rounds_per_hour": round(3600 * (len(opened) - 2) / (opened[-1] - first), 1),
        "ages": dict(sorted(Counter(ages).items())),
        "counted_of_the_slow_client": of_slow,
        "seconds": round(time.monotonic() - started, 1),
    }


def score(folder: Path, number: int) -> float:
    """Return the exact matches of a round on the held-out rows."""
    fedcli("eval", "demo", "-w", folder, "--round", number)
    rows = fedcli("eval", "table", "demo", "-w", folder)["scores"]
    (found,) = [
        row["value"] for row in rows if row["metric"] == "exact_match" and row["target"] == f"round-{number:05d}"
    ]
    return float(found)


def main() -> int:
    """Measure both ways, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--late-rounds", type=int)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        match arguments.role:
            case ["serve"]:
                serve(arguments.folder)
            case ["client", client, seconds]:
                take_part(arguments.folder, int(client), float(seconds))
        return 0
    ways: dict[str, tuple[int, tuple[str, ...]]] = {
        "synchronous": (arguments.rounds, ()),
        "late": (arguments.rounds, LATE),
    }
    if arguments.late_rounds is not None:
        ways["late, as long"] = (arguments.late_rounds, LATE)
    with TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / str(place) for place, name in enumerate(ways)}
        found = {}
        for name, (rounds, options) in ways.items():
            shared = [f"federation.rounds={rounds}", f"federation.seed={arguments.seed}"]
            found[name] = measure(folders[name], [*shared, *options], arguments.seconds)
            found[name]["score"] = score(folders[name], rounds)
        ended = found["late"]["published"][-1]
        then = 1 + sum(each <= ended for each in found["synchronous"]["published"][1:])
        found["synchronous"] |= {"round_then": then, "score_then": score(folders["synchronous"], then)}
    for name, figures in found.items():
        print(name, figures, flush=True)
    ratio = found["synchronous"]["rounds_per_hour"] / found["late"]["rounds_per_hour"]
    settings = {"rounds": arguments.rounds, "seconds_of_a_training": arguments.seconds, "seed": arguments.seed}
    return record("staleness", ratio, LIMIT, settings | found)


if __name__ == "__main__":
    sys.exit(main())
