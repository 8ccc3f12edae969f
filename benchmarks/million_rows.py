"""A million rows: memory and seconds of splitting them, and of one client's training on all of them.

Each command is a process of its own. The last line is `million_rows: ratio R (limit 1.0)`: the largest peak of memory
over two gigabytes; the exit code is 1 past the limit.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

LIMIT_BYTES = 2e9
WORDS = ("fund", "bank", "harvest", "patient", "river", "engine", "court", "letter", "garden", "market", "winter")


def main() -> int:
    """Generate the rows, run the commands, and write what they took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--by", nargs="*", default=["iid", "label", "topic"], help="iid, label, length, topic")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "million_rows.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = folder / "rows.jsonl"
        generate(rows, arguments.rows)
        print(f"{arguments.rows:,} rows, {rows.stat().st_size / 1e6:.0f} MB")
        results = {"rows": arguments.rows, "bytes": rows.stat().st_size, "commands": {}}
        common = ["--set", "train.max_length=128", "--set", "train.steps=2"]
        for kind in arguments.by:
            choice = "data.partition=iid"
            if kind != "iid":
                choice = f"data.partition={{dirichlet: {{by: {kind}, alpha: 0.3}}}}"
            workspace = folder / f"ws-{kind}"
            init = ["init", workspace, "--set", f"data.source={rows}", "--set", choice, *common]
            results["commands"][f"init, split by {kind}"] = measure(init, folder)
        workspace = folder / "ws-iid"
        results["commands"]["client train, a fifth of the rows"] = measure(
            ["client", "train", "-w", workspace, "--id", 0], folder
        )
        party = folder / "party"
        measure(
            [
                "init",
                party,
                "--set",
                "data.source=null",
                "--set",
                "federation.signatures=off",
                "--set",
                "federation.clients=2",
                *common,
            ],
            folder,
        )
        home = folder / "home"
        join = ["client", "join", "-w", party, "--id", 0, "--data", rows, "--home", home]
        results["commands"]["client join, all rows"] = measure(join, folder)
        train = ["client", "train", "-w", party, "--id", 0, "--home", home]
        results["commands"]["client train, all rows"] = measure(train, folder)
    peak = max(command["peak_bytes"] for command in results["commands"].values())
    results |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": platform.processor() or "unknown"}
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"million_rows: ratio {peak / LIMIT_BYTES:.2f} (limit 1.0)")
    return 0 if peak <= LIMIT_BYTES else 1


def generate(path: Path, count: int) -> None:
    """Write rows of Alpaca's columns, about 300 bytes each, with a label of five kinds."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            first, second, third = (WORDS[number * step % len(WORDS)] for step in (1, 7, 3))
            row = {
                "instruction": f"Write a sentence number {number} about a {first}, a {second} and a {third}.",
                "input": f"The {first} was seen near the {second} on day {number % 365}, and nobody knew why.",
                "output": f"On day {number % 365} the {first} and the {third} met at the {second}; so it was.",
                "label": f"kind {number * 7919 % 5}",
            }
            file.write(json.dumps(row) + "\n")


def measure(command: list[object], folder: Path) -> dict[str, float]:
    """Run a fedcli process; return its seconds and the peak of its memory."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "fedcli", *map(str, command)], cwd=folder, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"fedcli {' '.join(map(str, command))} failed")
    seconds, peak = time.monotonic() - started, usage.ru_maxrss * 1024
    print(f"{' '.join(map(str, command[:2]))}: {seconds:.0f} s, {peak / 1e6:.0f} MB")
    return {"seconds": round(seconds, 1), "peak_bytes": peak}


if __name__ == "__main__":
    sys.exit(main())
