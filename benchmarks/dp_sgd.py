"""Seconds of a private optimiser step (privacy.unit row) against a plain one, on the same rows, in the same process.

    OMP_NUM_THREADS=1 python benchmarks/dp_sgd.py [--repeats 5] [--steps 10]

Two models: the built-in one with the demo's rows, adapted as the demo adapts it, and the 6-million-parameter Llama of
step.py (workload.py). Both sides have batches of the same 16 rows and take turns; noise, norms and clipping are in the
private step's time, the accountant, which works once a round, is not. The ratio is the larger one of the medians'.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from record import record
from workload import MAX_LENGTH, make_base, make_rows

from fedcli.data.demo import demo_rows
from fedcli.data.encoded import EncodedRow
from fedcli.data.encoding import Encoder
from fedcli.data.source import read_rows
from fedcli.model.base import find_base
from fedcli.model.lora import AdaptedModel, lora_config, start_adapter
from fedcli.tasks import SFT
from fedcli.tasks.conversation import instruct
from fedcli.training.dp_sgd import Protection, fit_privately
from fedcli.training.reports import TrainSettings
from fedcli.training.trainer import fit

LIMIT = 2.5
BATCH_SIZE = 16
SETTINGS = TrainSettings(
    batch_size=BATCH_SIZE,
    micro_batch_size=None,
    learning_rate=5e-5,
    weight_decay=0.0,
    max_grad_norm=1.0,
    gradient_checkpointing=False,
    seed=0,
)


def measure(
    base: Path, config: dict[str, Any], items: Sequence[Any], repeats: int, steps: int
) -> dict[str, list[float]]:
    """Return both sides' seconds a step, repeat by repeat."""
    start, _ = start_adapter(base, config, seed=0, trust_remote_code=False)
    adapted = AdaptedModel(base, config, trust_remote_code=False)
    rows = list(Encoder(adapted.tokenizer).encode(items, MAX_LENGTH))[: steps * BATCH_SIZE]
    batches = [[[row] for row in rows[at : at + BATCH_SIZE]] for at in range(0, len(rows), BATCH_SIZE)]
    protection = Protection(clip=1.0, noise=1.0)

    def plain(rows: list[EncodedRow]) -> None:
        fit(adapted, rows, SFT, SETTINGS, on_step=lambda _: None)

    def private(_: list[EncodedRow]) -> None:
        fit_privately(adapted, iter(batches), SFT, SETTINGS, protection, on_step=lambda _: None)

    seconds: dict[str, list[float]] = {"plain": [], "private": []}
    for _ in range(repeats):
        for name, train in (("plain", plain), ("private", private)):
            adapted.load(start)
            started = time.perf_counter()
            train(rows)
            seconds[name].append((time.perf_counter() - started) / len(batches))
    return seconds


def main() -> int:
    """Let both sides take turns on both models, and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    tiny = find_base("builtin:tiny", revision=None, root=Path.cwd())
    of_demo = [instruct(row["instruction"], row["output"], row["input"]) for row in demo_rows(0)["train"]]
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    demo = lora_config(rank=16, alpha=32, dropout=0.0, target_modules=layers, base=None)
    larger = lora_config(rank=32, alpha=64, dropout=0.0, target_modules=["q_proj", "v_proj"], base=None)
    with TemporaryDirectory() as scratch:
        base, rows = make_base(Path(scratch) / "base"), read_rows(make_rows(Path(scratch) / "rows.jsonl"))
        of_workload = [instruct(row.fields["instruction"], row.fields["output"]) for row in rows]
        works = {"built-in": (tiny, demo, of_demo), "6 M Llama": (base, larger, of_workload)}
        seconds = {name: measure(*work, arguments.repeats, arguments.steps) for name, work in works.items()}
    ratios = {}
    for name, taken in seconds.items():
        plain, private = (statistics.median(taken[side]) for side in ("plain", "private"))
        ratios[name] = private / plain
        print(f"{name}: plain {plain:.4f} s a step, private {private:.4f} s, ratio {ratios[name]:.2f}")
    figures = {"threads": torch.get_num_threads(), "seconds_per_step": seconds, "ratios": ratios}
    return record("dp_sgd", max(ratios.values()), LIMIT, figures)


if __name__ == "__main__":
    sys.exit(main())
