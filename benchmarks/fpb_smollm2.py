"""SmolLM2-135M-Instruct on the Financial PhraseBank, before and after a short federation.

    OMP_NUM_THREADS=2 python benchmarks/fpb_smollm2.py --data DIR [--seed S]

DIR holds the publisher's Sentences_50Agree.txt. FinGPT's training part (3,634 sentences) is split by label (Dirichlet,
alpha 0.2) among four clients, which train for three rounds of ten steps from the preset `real`. The base and the last
round are scored on the first 200 sentences of FinGPT's test part by the likelihood of the three labels. Writes
results/fpb_smollm2-SEED.json and prints a table. There is no limit to pass: so short a run shows that a real model
takes part, not how good federated training can be.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from fpb import BENCHMARK, fedcli, majority, write_training_rows
from record import RESULTS, commit, processor

LIMIT = 200
SETTINGS = (
    "data.format=fingpt",
    "data.partition.dirichlet.by=output",
    "data.partition.dirichlet.alpha=0.2",
    "federation.clients=4",
)
"""What differs from the preset `real`."""


def main() -> None:
    """Run it all, print the table and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", help="Another model.base than the preset's.")
    arguments = parser.parse_args()
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, rows = Path(scratch) / "workspace", Path(scratch) / "train.jsonl"
        num_rows = write_training_rows(arguments.data / "Sentences_50Agree.txt", rows)
        settings = [*SETTINGS, f"data.source={rows}", f"federation.seed={arguments.seed}"]
        settings += [f"model.base={arguments.base}"] if arguments.base else []
        for name, command in (
            ("init", ["init", folder, "--preset", "real", *(part for each in settings for part in ("--set", each))]),
            ("run", ["run", "-w", folder]),
            ("eval", ["eval", BENCHMARK, "--data", arguments.data, "--limit", LIMIT, "-w", folder]),
        ):
            start = time.monotonic()
            fedcli(*command)
            seconds[name] = round(time.monotonic() - start, 1)
            print(f"{name}: {seconds[name]} s", flush=True)
        shares = [sum(1 for _ in path.open()) for path in sorted((folder / "data").glob("client-*.jsonl"))]
        table = fedcli("eval", "table", "-w", folder)["scores"]
        scores: dict[str, dict] = {"majority class": majority(folder, f"{BENCHMARK}@limit={LIMIT}")}
    for row in table:
        scores.setdefault(row["target"], {})[row["metric"]] = row["value"]
        scores[row["target"]][f"{row['metric']}_interval"] = [row["low"], row["high"]]
    print("| | accuracy | weighted F1 | macro F1 |\n|---|---|---|---|")
    for target, values in scores.items():
        print(f"| {target} | {values['accuracy']:.3f} | {values['weighted_f1']:.3f} | {values['macro_f1']:.3f} |")
    figures = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": processor(),
        "threads": os.environ.get("OMP_NUM_THREADS", "1"),
        "seed": arguments.seed,
        "settings": SETTINGS,
        "num_rows": num_rows,
        "rows_of_clients": shares,
        "num_items": LIMIT,
        "seconds": seconds,
        "peak_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
        "scores": scores,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"fpb_smollm2-{arguments.seed}.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
