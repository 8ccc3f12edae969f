"""Seconds of a client's optimiser steps against a loop written by hand with the same tricks, in the same process.

    python benchmarks/step.py [--repeats 5] [--steps 5]

Both sides (hand_written.py) have the same adapted model, rows, order and number of threads, and take turns; the ratio
is that of the medians. The adapters that come out must agree.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from hand_written import train_by_fedcli, train_by_hand
from record import record
from workload import MAX_LENGTH, make_base, make_rows

from fedcli.data.encoding import Encoder
from fedcli.data.source import read_rows
from fedcli.model.lora import AdaptedModel, lora_config, start_adapter
from fedcli.tasks.conversation import instruct

LIMIT = 1.10
BATCH_SIZE = 16
LEARNING_RATE = 5e-5
FARTHEST = 1e-4


def main() -> int:
    """Let both sides take turns, and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    with TemporaryDirectory() as scratch:
        base, rows = make_base(Path(scratch) / "base"), read_rows(make_rows(Path(scratch) / "rows.jsonl"))
        config = lora_config(rank=32, alpha=64, dropout=0.0, target_modules=["q_proj", "v_proj"], base=None)
        start, _ = start_adapter(base, config, seed=0, trust_remote_code=False)
        adapted = AdaptedModel(base, config, trust_remote_code=False)
    conversations = [instruct(row.fields["instruction"], row.fields["output"]) for row in rows]
    drawn = Encoder(adapted.tokenizer).encode(conversations, MAX_LENGTH)[: arguments.steps * BATCH_SIZE]
    seconds: dict[str, list[float]] = {"fedcli": [], "by hand": []}
    results = {}
    for _ in range(arguments.repeats):
        for name, train in (("fedcli", train_by_fedcli), ("by hand", train_by_hand)):
            adapted.load(start)
            started = time.perf_counter()
            train(adapted, drawn, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE)
            seconds[name].append((time.perf_counter() - started) / arguments.steps)
            results[name] = adapted.values()
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    apart = max(float(np.abs(results["fedcli"][name] - array).max()) for name, array in results["by hand"].items())
    for name, taken in medians.items():
        print(f"{name}: {taken:.3f} s a step")
    print(f"the adapters differ by at most {apart:.1e}")
    if apart > FARTHEST:
        print(f"step: they must not differ by more than {FARTHEST}")
        return 1
    figures = {"threads": torch.get_num_threads(), "seconds_per_step": seconds, "largest_difference": apart}
    return record("step", medians["fedcli"] / medians["by hand"], LIMIT, figures)


if __name__ == "__main__":
    sys.exit(main())
