"""The Financial PhraseBank, federated: does the federation beat its clients alone, and the majority class?

    python benchmarks/fpb.py --data DIR [--seed S]

DIR holds the publisher's Sentences_50Agree.txt. FinGPT's training part (3,634 sentences) is split among the 50 clients
of the preset fedit-finance, with the built-in model; five of the first round's clients also train alone, for the same
rounds and steps; all are scored on FinGPT's test part (1,212 sentences) by the likelihood of the three labels. Writes
results/fpb-SEED.json, prints a table, and exits with 1 where the federated macro F1 is not the best.
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

from fedcli.data.file_rows import Row
from fedcli.eval.benchmarks.finance import held_out

BENCHMARK = "fpb-likelihood"
INSTRUCTION = "What is the sentiment of this news? Please choose an answer from {negative/neutral/positive}."
RESULTS = Path(__file__).parent / "results"
SETTINGS = (
    "model.base=builtin:tiny",
    "model.quantization=none",
    "federation.rounds=100",
    "train.learning_rate=2.0e-3",
    "train.batch_size=8",
    "train.max_length=256",
    # the tied embeddings of the tiny model leave most tokens of these rows alike: its output layer must learn, too
    "adapter.target_modules=[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head]",
)
"""What differs from the preset, which is for a model of 7 B parameters and 200 rounds."""


def fedcli(*arguments: object) -> dict:
    """Run a command with --json, and return its document."""
    line = [sys.executable, "-m", "fedcli", *map(str, arguments), "--json"]
    done = subprocess.run(
        line, env={"OMP_NUM_THREADS": "1"} | os.environ, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def write_training_rows(sentences: Path, to: Path) -> int:
    """Write what is not in the test part as rows of FinGPT's form; return how many."""
    lines = sentences.read_text(encoding="latin-1").split("\n")
    rows = [Row({"line": line}, str(number)) for number, line in enumerate(line for line in lines if line.strip())]
    test = {row.where for row in held_out(rows, 0.25)}
    parts = [row.fields["line"].rpartition("@") for row in rows if row.where not in test]
    made = [{"instruction": INSTRUCTION, "input": sentence, "output": label.strip()} for sentence, _, label in parts]
    to.write_text("".join(json.dumps(row) + "\n" for row in made))
    return len(made)


def majority(folder: Path, name: str = BENCHMARK) -> dict[str, float]:
    """Return the scores of the answer that is right most often."""
    items = [json.loads(line) for line in (folder / f"eval/base/{name}.jsonl").read_text().splitlines()]
    labels = [item["expected"] for item in items]
    share = max(map(labels.count, set(labels))) / len(labels)
    f1 = 2 * share / (1 + share)
    return {"accuracy": share, "weighted_f1": share * f1, "macro_f1": f1 / 3}


def main() -> int:
    """Run it all, print the table and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", type=int, default=5, help="How many clients also train alone.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, rows = Path(scratch) / "workspace", Path(scratch) / "train.jsonl"
        num_rows = write_training_rows(arguments.data / "Sentences_50Agree.txt", rows)
        settings = (*SETTINGS, f"data.source={rows}", f"federation.seed={arguments.seed}")
        sets = [part for setting in settings for part in ("--set", setting)]
        cohort = fedcli("init", folder, "--preset", "fedit-finance", *sets)["cohort"]
        start = time.monotonic()
        fedcli("run", "-w", folder)
        seconds = time.monotonic() - start
        for client in cohort[: arguments.alone]:
            fedcli("train-alone", "--id", client, "-w", folder)
        fedcli("eval", BENCHMARK, "--data", arguments.data, "-w", folder)
        table = fedcli("eval", "table", BENCHMARK, "--against", "best-alone", "-w", folder)["scores"]
        scores: dict[str, dict] = {"majority class": majority(folder)}
    for row in table:
        scores.setdefault(row["target"], {})[row["metric"]] = row["value"]
    (federated,) = (row for row in table if row["target"].startswith("round-") and row["metric"] == "macro_f1")
    print("| | accuracy | weighted F1 | macro F1 |\n|---|---|---|---|")
    for target, values in scores.items():
        print(f"| {target} | {values['accuracy']:.3f} | {values['weighted_f1']:.3f} | {values['macro_f1']:.3f} |")
    lead = f"{federated['difference']:+.3f} [{federated['difference_low']:+.3f}, {federated['difference_high']:+.3f}]"
    print(f"macro F1 ahead of the best client alone: {lead}; {num_rows} rows, federation {seconds:.0f} s")
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(),
        "seed": arguments.seed,
        "settings": SETTINGS,
        "seconds": seconds,
        "scores": scores,
        "lead": {name: federated[name] for name in ("difference", "difference_low", "difference_high")},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"fpb-{arguments.seed}.json").write_text(json.dumps(record, indent=1) + "\n")
    return (
        0
        if federated["difference_low"] > 0
        and federated["rank"] == 1
        and federated["value"] > scores["majority class"]["macro_f1"]
        else 1
    )


if __name__ == "__main__":
    sys.exit(main())
