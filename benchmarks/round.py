"""Seconds of a federated round, and its memory, against the paper's way of doing the same work (paper_way.py).

    python benchmarks/round.py [--rounds 3]

Both sides train the same model on the same rows (workload.py) in one process with the same number of threads; ours goes
through the workspace, with all its files, hashes and fsyncs. The first round of each, which loads and tokenises, is not
counted.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from record import record
from workload import SETTINGS, make_base, make_rows

from fedcli import Federation, Observer

LIMIT = 0.35
MOST_BYTES = 1.0e9
HERE = Path(__file__).parent


class _Clock(Observer):
    """Notes when each round was merged."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def round_done(self, result: object) -> None:
        self.moments.append(time.perf_counter())


def ours(workspace: Path, rounds: int) -> None:
    """Run so many rounds and one before; print what they took as JSON."""
    clock = _Clock()
    Federation.open(workspace).run(rounds=rounds + 1, observer=clock)
    seconds = [after - before for before, after in zip(clock.moments, clock.moments[1:], strict=False)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


def measure(*line: object) -> dict:
    """Run a side in a process of its own."""
    done = subprocess.run([sys.executable, *map(str, line)], cwd=HERE, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Measure both sides, print them and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ours:
        ours(arguments.ours, arguments.rounds)
        return 0
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base, rows = make_base(folder / "base"), make_rows(folder / "rows.jsonl")
        options = [f"model.base={base}", f"data.source={rows}", *SETTINGS]
        line = ["-m", "fedcli", "init", folder / "w", "--preset", "defaults"]
        line += [part for option in options for part in ("--set", option)]
        subprocess.run([sys.executable, *map(str, line)], check=True, capture_output=True)
        sides = {
            "fedcli": measure(HERE / "round.py", "--ours", folder / "w", "--rounds", arguments.rounds),
            "the paper's way": measure(HERE / "paper_way.py", base, rows, "--rounds", arguments.rounds + 1),
        }
    sides["the paper's way"]["seconds"] = sides["the paper's way"]["seconds"][1:]
    medians = {name: statistics.median(side["seconds"]) for name, side in sides.items()}
    for name, side in sides.items():
        print(f"{name}: {medians[name]:.1f} s a round, at most {side['peak_bytes'] / 1e6:.0f} MB")
    peak = sides["fedcli"]["peak_bytes"]
    figures = {"threads": os.environ.get("OMP_NUM_THREADS", "all cores"), "sides": sides}
    code = record("round", medians["fedcli"] / medians["the paper's way"], LIMIT, figures)
    if peak > MOST_BYTES:
        print(f"round: {peak / 1e6:.0f} MB are more than {MOST_BYTES / 1e6:.0f}")
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
