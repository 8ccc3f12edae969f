"""KTO on the demo's verdicts, each client with thumbs up or thumbs down alone, against the base and clients alone.

    python benchmarks/kto.py [--seeds 0 1 2] [--split test|tuning] [--set KEY=VALUE ...]

The preset demo-kto has ten clients, of one topic and one kind of verdict each; the score is the preference accuracy on
held-out pairs of all topics. Two processes run at a time. Exits 1 unless the federation is ahead of the base and of the
mean client alone in every seed.
"""

import argparse
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from demo_seeds import fedcli
from record import RESULTS, commit, processor

NAMES = {"test": "demo", "tuning": "demo-tuning"}


def compare(seed: int, split: str, settings: list[str]) -> dict[str, float]:
    """Train a federation and each of its clients alone; return the accuracy of each, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        given = [part for each in (f"federation.seed={seed}", *settings) for part in ("--set", each)]
        head = fedcli("init", folder, "--preset", "demo-kto", *given)
        fedcli("run", "-w", folder)
        for client in head["cohort"]:
            fedcli("train-alone", "-w", folder, "--id", client)
        alone = [part for client in head["cohort"] for part in ("--alone", client)]
        scores = fedcli("eval", NAMES[split], "-w", folder, "--base", "--round", "latest", *alone)["scores"]
        return {
            "federated" if score["target"].startswith("round-") else score["target"]: score["scores"][
                "preference_accuracy"
            ]["value"]
            for score in scores
        }


def figures(scores: dict[str, float]) -> dict[str, float]:
    """Return a seed's accuracies: the base's, the mean and the best client's alone, and the federation's."""
    alone = [score for name, score in scores.items() if name.startswith("alone-")]
    mean = sum(alone) / len(alone)
    return {"base": scores["base"], "alone": mean, "best alone": max(alone), "federated": scores["federated"]}


def main() -> int:
    """Print the table and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=NAMES, default="test")
    parser.add_argument("--set", dest="settings", action="append", default=[])
    arguments = parser.parse_args()
    seeds, split, settings = arguments.seeds, arguments.split, arguments.settings
    with ThreadPoolExecutor(2) as pool:
        scores = list(pool.map(lambda seed: compare(seed, split, settings), seeds))
    results = [figures(each) for each in scores]
    print("| | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |")
    print("|---" * (len(seeds) + 2) + "|")
    for name in results[0]:
        cells = [each[name] for each in results]
        print(f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in [*cells, sum(cells) / len(cells)]) + " |")
    record = {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "machine": processor(), "split": split}
    record |= {"settings": settings, "seeds": seeds, "results": scores}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"kto-{split}.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(each["federated"] > max(each["base"], each["alone"]) for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
