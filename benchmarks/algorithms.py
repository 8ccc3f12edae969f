"""Every algorithm, each client alone and all rows pooled on the demo, for several seeds, as a table.

    python benchmarks/algorithms.py [--task sft|dpo] [--seeds 0 1 2] [--algorithms NAME[:KEY=VALUE,...] ...]

An entry such as `fedyogi:eta=0.01` sets hyperparameters; without them an algorithm has its defaults. Two processes run
at a time. Exits 1 where an algorithm has no entry that is ahead of the best client alone in the mean over the seeds.
"""

import argparse
import json
import math
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from demo_seeds import fedcli
from record import RESULTS, commit, processor

NAMES = {"test": "demo", "tuning": "demo-tuning"}
PRESETS = {"sft": "demo", "dpo": "demo-dpo"}
ENTRIES = (
    *("fedavg", "fedprox", "scaffold"),
    *("fedavgm", "fedavgm:beta1=0.5"),
    *("fedadagrad", "fedadagrad:eta=0.02"),
    *("fedyogi", "fedyogi:eta=0.005,beta1=0.5"),
    *("fedadam", "fedadam:eta=0.005,beta1=0.5"),
)
"""The defaults and, where they are too slow for 15 rounds, settings chosen on the tuning rows of seed 0 (task sft)."""


def options(entry: str, task: str, seed: int) -> list[str]:
    """Return init's options for an entry."""
    name, _, hyperparameters = entry.partition(":")
    settings = [f"federation.seed={seed}", f"algorithm.name={name}"]
    settings += [f"algorithm.{setting}" for setting in filter(None, hyperparameters.split(","))]
    return ["--preset", PRESETS[task], *(part for setting in settings for part in ("--set", setting))]


def federate(entry: str, task: str, seed: int, split: str) -> dict:
    """Run one federation, and return its score and the mean training loss of its last round."""
    with tempfile.TemporaryDirectory() as folder:
        fedcli("init", folder, *options(entry, task, seed))
        fedcli("run", "-w", folder)
        losses = fedcli("status", "-w", folder)["last_losses"].values()
        (score,) = fedcli("eval", NAMES[split], "-w", folder, "--round", "latest")["scores"]
        return figures(score) | {"loss": math.fsum(losses) / len(losses)}


def baselines(task: str, seed: int, split: str) -> dict[str, dict]:
    """Train the baselines of a seed, and return their scores and the losses of their last rounds."""
    with tempfile.TemporaryDirectory() as folder:
        head = fedcli("init", folder, *options("fedavg", task, seed))
        losses = {f"alone-{k}": fedcli("train-alone", "-w", folder, "--id", k)["last_loss"] for k in head["cohort"]}
        losses["pooled"] = fedcli("train-pooled", "-w", folder)["last_loss"]
        alone = [part for k in head["cohort"] for part in ("--alone", k)]
        scores = fedcli("eval", NAMES[split], "-w", folder, "--base", "--pooled", *alone)["scores"]
        return {score["target"]: figures(score) | {"loss": losses.get(score["target"])} for score in scores}


def figures(score: dict) -> dict:
    """Return accuracy, and of preferences the margin, of a score."""
    values = {name: entry["value"] for name, entry in score["scores"].items()}
    accuracy = values.get("exact_match", values.get("preference_accuracy"))
    return {"accuracy": accuracy, "margin": values.get("margin")}


def best_alone(scores: dict[str, dict]) -> dict:
    """Return the best client's figures."""
    return max((score for name, score in scores.items() if name.startswith("alone-")), key=lambda s: s["accuracy"])


def line(name: str, scores: list[dict]) -> str:
    """Return a row of the table."""
    cells = [f"{score['accuracy']:.3f}" for score in scores]
    losses = [score["loss"] for score in scores if score["loss"] is not None]
    cells.append(f"{sum(score['accuracy'] for score in scores) / len(scores):.3f}")
    cells.append(f"{sum(losses) / len(losses):.3f}" if losses else "")
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> int:
    """Print the table and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=PRESETS, default="sft")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=("test", "tuning"), default="test")
    parser.add_argument("--algorithms", nargs="*", default=ENTRIES)
    arguments = parser.parse_args()
    task, seeds, split = arguments.task, arguments.seeds, arguments.split
    with ThreadPoolExecutor(2) as pool:
        pending = {
            entry: [pool.submit(federate, entry, task, seed, split) for seed in seeds] for entry in arguments.algorithms
        }
        alone = list(pool.map(lambda seed: baselines(task, seed, split), seeds))
        print("| | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean score | mean loss |")
        print("|---" * (len(seeds) + 3) + "|")
        results = {"base": [scores["base"] for scores in alone], "best alone": [best_alone(scores) for scores in alone]}
        results["pooled"] = [scores["pooled"] for scores in alone]
        for name, scores in results.items():
            print(line(name, scores), flush=True)
        for entry, futures in pending.items():
            results[entry] = [future.result() for future in futures]
            print(line(entry, results[entry]), flush=True)
    record = {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "machine": processor(), "task": task}
    record |= {"split": split, "seeds": seeds, "results": results}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"algorithms-{task}-{split}.json").write_text(json.dumps(record, indent=1) + "\n")
    means = {name: sum(score["accuracy"] for score in scores) / len(seeds) for name, scores in results.items()}
    ahead = {entry.partition(":")[0] for entry in arguments.algorithms if means[entry] > means["best alone"]}
    return 0 if ahead == {entry.partition(":")[0] for entry in arguments.algorithms} else 1


if __name__ == "__main__":
    sys.exit(main())
