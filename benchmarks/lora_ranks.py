"""Clients of ranks 4, 8 and 16 on the demo: `lora: product` against zero-padded means, for several seeds, as a table.

    python benchmarks/lora_ranks.py [--seeds 0 1 2] [--split test]

Both federations have the same clients, ranks, rows and draws. Exits 1 where the product is not ahead in the mean over
the seeds.
"""

import argparse
import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from statistics import mean

from demo_seeds import fedcli
from record import RESULTS, commit, processor

RANKS = "{0: 4, 1: 8, 2: 16, 3: 4, default: 8}"
RULES = {
    "zero_padded": (),
    "norm_weights": ("aggregation.lora_weights=norm",),
    "product": ("aggregation.lora=product",),
    "fresh": ("aggregation.lora=exact", "aggregation.lora_fresh=true"),
}
"""Zero-padded means weighed by rows, and as HetLoRA does; FlexLoRA; FLoRA with a limit."""


def score(rule: str, seed: int, split: str) -> dict[str, float]:
    """Run one federation; return the share of held-out rows that it answers right, and what it told of the errors."""
    settings = (f"federation.seed={seed}", f"adapter.rank={RANKS}", "aggregation.lora_error=true", *RULES[rule])
    with tempfile.TemporaryDirectory() as folder:
        fedcli("init", folder, *(part for setting in settings for part in ("--set", setting)))
        fedcli("run", "-w", folder)
        name = {"test": "demo", "tuning": "demo-tuning"}[split]
        (scored,) = fedcli("eval", name, "-w", folder, "--round", "latest")["scores"]
        with open(f"{folder}/rounds/00015/manifest.json", encoding="utf-8") as file:
            errors = json.load(file)["aggregation"]["lora"]["errors"]
        return {
            "exact_match": scored["scores"]["exact_match"]["value"],
            "error_of_means": mean(errors["factors"].values()),
            "error_of_merge": mean((errors["merged"] or errors["factors"]).values()),
        }


def main() -> int:
    """Print the table and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=("test", "tuning"), default="test")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=["zero_padded", "product"])
    arguments = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {rule: [] for rule in arguments.rules}
    for seed in arguments.seeds:
        for rule, found in rows.items():
            found.append(score(rule, seed, arguments.split))
            print(f"seed {seed}: {rule}: {found[-1]}", flush=True)
    means = {rule: mean(each["exact_match"] for each in found) for rule, found in rows.items()}
    record = {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "machine": processor()}
    record |= {"cores": os.cpu_count(), "split": arguments.split, "ranks": RANKS, "seeds": arguments.seeds}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"lora_ranks-{arguments.split}.json").write_text(
        json.dumps(record | {"rules": rows, "means": means}, indent=1) + "\n"
    )
    print(means)
    return 0 if means["product"] > means["zero_padded"] else 1


if __name__ == "__main__":
    sys.exit(main())
