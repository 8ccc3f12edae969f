"""`fedcli run --workers 2` against `--workers 1`, one thread each: whole processes from start to exit, the same bytes.

    python benchmarks/workers.py [--rounds 2]

The work is workload.py's with 4 clients a round. The ratio is the seconds of two workers over those of one; the limit
is 1 / 1.6. Exits 1, too, where an adapter of the two differs.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from record import record
from workload import SETTINGS, make_base, make_rows

LIMIT = 1 / 1.6


def run(folder: Path, workers: int, rounds: int) -> float:
    """Run so many rounds; return the seconds that the process took."""
    line = ["run", "-w", folder, "--workers", workers, "--threads", 1, "--rounds", rounds, "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fedcli", *map(str, line)], check=True, capture_output=True, env=environment)
    return time.perf_counter() - started


def main() -> int:
    """Measure both, compare what came out, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    seconds: dict[int, float] = {}
    adapters: dict[int, list[bytes]] = {}
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base, rows = make_base(folder / "base"), make_rows(folder / "rows.jsonl")
        options = [f"model.base={base}", f"data.source={rows}", *SETTINGS, "federation.per_round=4"]
        for workers in (1, 2):
            workspace = folder / str(workers)
            line = [
                "init",
                workspace,
                "--preset",
                "defaults",
                *(part for option in options for part in ("--set", option)),
            ]
            subprocess.run([sys.executable, "-m", "fedcli", *map(str, line)], check=True, capture_output=True)
            seconds[workers] = run(workspace, workers, arguments.rounds)
            files = sorted(workspace.glob("rounds/*/adapter/adapter_model.safetensors"))
            adapters[workers] = [file.read_bytes() for file in files]
            print(f"{workers} worker{'s' * (workers > 1)}: {seconds[workers]:.1f} s for {arguments.rounds} rounds")
    if adapters[1] != adapters[2] or len(adapters[1]) != arguments.rounds + 1:
        print("workers: the adapters differ")
        return 1
    print(f"{len(adapters[1])} adapters are the same, bit for bit")
    return record("workers", seconds[2] / seconds[1], LIMIT, {"seconds": seconds, "rounds": arguments.rounds})


if __name__ == "__main__":
    sys.exit(main())
