"""Adapters of clients' own on the demo split by topic: each on its own topic, against alone and the global adapter.

    python benchmarks/personal.py [--seeds 0 1 2] [--kinds factors ditto feddpa] [--pull 0.01] [--split test]

Each client holds one of five topics. For each seed the plain federation and each client alone are trained first, then
one federation of each kind with the same seed and as many rounds: own factors (aggregation.share: [A]), ditto and
feddpa (train.personal). All figures are shares of exactly right answers on held-out headlines: on a client's own topic
(72), and on all (360). Exits 1 where an own adapter of `factors` or `ditto` is behind alone on its own topic by more
than two paired standard errors, over all clients and seeds, or where a global adapter is worse than the plain one's.
A seed takes 26 minutes of a core of which 20 processes want a share.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev

from record import RESULTS, commit, processor

KINDS = {
    "factors": "aggregation.share=[A]",
    "ditto": "train.personal={{name: ditto, pull: {pull}}}",
    "feddpa": "train.personal.name=feddpa",
}
SPLITS = {"test": "demo", "tuning": "demo-tuning"}
CLIENTS = range(5)


def fedcli(*arguments: object) -> dict:
    """Run a command with --json, and return its document."""
    line = [sys.executable, "-m", "fedcli", *map(str, arguments), "--json"]
    done = subprocess.run(line, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)}: {done.stderr}")
    return json.loads(done.stdout)


def topics(path: Path) -> list[str]:
    """Return the topic of each row of a file."""
    return [json.loads(line)["topic"] for line in path.read_text().splitlines()]


def marks(folder: Path, target: str, split: str) -> list[float]:
    """Return a target's marks, by item."""
    items = (folder / "eval" / target / f"{SPLITS[split]}.jsonl").read_text().splitlines()
    found = {int(item["item"]): float(item["marks"]["exact_match"]) for item in map(json.loads, items)}
    return [found[number] for number in range(len(found))]


def run(folder: Path, seed: int, split: str, *settings: str) -> list[str]:
    """Run one federation, and score what there is of it; return the targets."""
    given = [word for setting in settings for word in ("--set", setting)]
    fedcli("init", folder, "--set", f"federation.seed={seed}", *given)
    fedcli("run", "-w", folder)
    if not settings:
        for client in CLIENTS:
            fedcli("train-alone", "-w", folder, "--id", client)
        models: list[object] = []
    elif settings[0] == KINDS["factors"]:
        models = ["--client", "all"]
    else:
        models = ["--client", "all", "--round", "latest"]
    scores = fedcli("eval", SPLITS[split], "-w", folder, *models)["scores"]
    return [score["target"] for score in scores]


def score_seed(seed: int, split: str, kinds: list[str], pull: float) -> dict:
    """Return the figures of one seed: by kind and client on its own topic, and on all."""
    with tempfile.TemporaryDirectory() as temporary:
        plain = Path(temporary) / "plain"
        targets = run(plain, seed, split)
        (last,) = (target for target in targets if target.startswith("round-"))
        held_out = topics(plain / "data" / f"held-out-{split}.jsonl")
        own_topic = {
            client: Counter(topics(plain / "data" / f"client-{client}.jsonl")).most_common(1)[0][0]
            for client in CLIENTS
        }

        def figures(folder: Path, target: str, client: int) -> dict[str, float]:
            found = marks(folder, target, split)
            own = [mark for mark, topic in zip(found, held_out, strict=True) if topic == own_topic[client]]
            return {"own": mean(own), "all": mean(found)}

        found = {
            "seed": seed,
            "global": mean(marks(plain, last, split)),
            "clients": {
                client: {
                    "alone": figures(plain, f"alone-{client}", client),
                    "global": figures(plain, last, client),
                }
                for client in CLIENTS
            },
            "global_of": {},
        }
        for kind in kinds:
            folder = Path(temporary) / kind
            targets = run(folder, seed, split, KINDS[kind].format(pull=pull))
            for client in CLIENTS:
                (own,) = (target for target in targets if target.startswith(f"own-{client}-"))
                found["clients"][client][kind] = figures(folder, own, client)
            if kind != "factors":
                found["global_of"][kind] = mean(marks(folder, last, split))
        return found


def main() -> int:
    """Print the tables and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--pull", type=float, default=0.01)
    parser.add_argument("--split", choices=SPLITS, default="test")
    arguments = parser.parse_args()
    columns = ["alone", "global", *arguments.kinds]
    print(
        f"| seed | client | {' | '.join(f'{name}: own topic' for name in columns)} |\n|---|---|{'---|' * len(columns)}"
    )
    seeds = []
    for seed in arguments.seeds:
        seeds.append(found := score_seed(seed, arguments.split, arguments.kinds, arguments.pull))
        for client, row in found["clients"].items():
            cells = [f"{row[name]['own']:.3f}" for name in columns]
            print(f"| {seed} | {client} | {' | '.join(cells)} |", flush=True)
    print(f"\n| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    rows = [row for found in seeds for row in found["clients"].values()]
    for what in ("own", "all"):
        print(f"| {what}: mean | {' | '.join(f'{mean(row[name][what] for row in rows):.3f}' for name in columns)} |")
        print(f"| {what}: worst | {' | '.join(f'{min(row[name][what] for row in rows):.3f}' for name in columns)} |")
    is_fine = True
    for kind in arguments.kinds:
        leads = [row[kind]["own"] - row["alone"]["own"] for row in rows]
        error = stdev(leads) / math.sqrt(len(leads))
        worst = [found["global_of"][kind] - found["global"] for found in seeds if kind in found["global_of"]]
        told = f"; its global adapter against the plain one's: {min(worst):+.3f}" if worst else ""
        print(
            f"{kind}: ahead of alone on the own topic {mean(leads):+.3f} ± {error:.3f}, worst {min(leads):+.3f}{told}"
        )
        if kind != "feddpa":
            is_fine = is_fine and mean(leads) >= -2 * error and min(worst, default=0.0) >= 0
    record = {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "machine": processor()}
    record |= {"cores": os.cpu_count(), "split": arguments.split, "pull": arguments.pull}
    record |= {"seeds": seeds}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"personal-{arguments.split}.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0 if is_fine else 1


if __name__ == "__main__":
    sys.exit(main())
