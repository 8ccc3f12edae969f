"""`fedcli server aggregate` by a robust rule on 50 updates of 67 MB, against the mean on the same updates in turns.

    python benchmarks/aggregate_rules.py [--rules multi_krum trimmed_mean] [--tolerate 5]

The last line is `aggregate_rules: ratio R (limit 2.2)`: the seconds of the first rule over the mean's, the median of
the pairs. The exit code is 1 past the limit.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
from operator import truediv
from pathlib import Path

import yaml
from aggregate import NUM_FILES, make_workspace, run
from record import record

MOST_RATIO = 2.2


def main() -> int:
    """Let the mean and each rule take turns, and write what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=NUM_FILES)
    parser.add_argument("--rules", nargs="+", default=["multi_krum", "geometric_median", "trimmed_mean"])
    parser.add_argument("--tolerate", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", help="the folder for the updates (default: the system's)")
    arguments = parser.parse_args()
    sections = {"mean": {}} | {rule: {"rule": rule, "tolerate": arguments.tolerate} for rule in arguments.rules}
    seconds: dict[str, list[float]] = {name: [] for name in sections}
    peaks: dict[str, int] = dict.fromkeys(sections, 0)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        workspace = make_workspace(Path(scratch) / "workspace", arguments.clients)
        config = yaml.safe_load(workspace.config.read_text())
        for _ in range(arguments.repeats):
            for name, section in sections.items():
                workspace.config.write_text(yaml.safe_dump(config | {"aggregation": section}))
                taken, peak = run([sys.executable, "-m", "fedcli", "server", "aggregate", "-w", str(workspace.root)])
                print(f"{name}: {taken:.2f} s, {peak / 1e6:.0f} MB", flush=True)
                seconds[name].append(taken)
                peaks[name] = max(peaks[name], peak)
                shutil.rmtree(workspace.round(1))
    figures = {
        name: {
            "seconds": round(statistics.median(taken), 2),
            "ratio": round(statistics.median(map(truediv, taken, seconds["mean"])), 3),
            "peak_bytes": peaks[name],
        }
        for name, taken in seconds.items()
    }
    print(figures)
    return record("aggregate_rules", figures[arguments.rules[0]]["ratio"], MOST_RATIO, figures)


if __name__ == "__main__":
    sys.exit(main())
