"""Tokens a second of a 7-billion-parameter model on a GPU, against the same steps by hand and the card's matmul rate.

    python benchmarks/gpu.py [--shape 7b] [--quantization none int8 nf4] [--steps 5]

A Llama-2-7B-shaped random model in bfloat16, int8 and nf4, LoRA rank 32 on q_proj and v_proj, batches of 16 rows of 512
tokens, no checkpointing; no weights are needed. Both sides are hand_written.py's, in one process for each quantisation.
The ratio is the worst of by hand over fedcli; the fraction of the card's rate counts 4 floating-point operations for
each parameter and token. `--shape tiny` tries the script itself on a CPU, and keeps nothing.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gpu_memory import SHAPES, make_model, make_rows
from record import record

LIMIT = 1 / 0.95
BATCH_SIZE = 16
LEARNING_RATE = 5e-5


def measure(folder: Path, quantization: str, steps: int) -> dict[str, Any]:
    """Return the figures of one quantisation, in a process of its own."""
    import torch
    from hand_written import train_by_fedcli, train_by_hand

    from fedcli.data.encoding import Encoder
    from fedcli.data.source import read_rows
    from fedcli.model.lora import AdaptedModel, lora_config
    from fedcli.tasks.conversation import instruct

    has_gpu = torch.cuda.is_available()
    config = lora_config(rank=32, alpha=64, dropout=0.05, target_modules=["q_proj", "v_proj"], base=None)
    adapted = AdaptedModel(folder / "model", config, trust_remote_code=False, quantization=quantization)
    rows = [instruct(row.fields["instruction"], row.fields["output"]) for row in read_rows(folder / "rows.jsonl")]
    encoded = list(Encoder(adapted.tokenizer).encode(rows, 512))
    examples = (encoded * (1 + steps * BATCH_SIZE // len(encoded)))[: steps * BATCH_SIZE]
    num_tokens = sum(row.num_tokens for row in examples)
    figures: dict[str, Any] = {"quantization": quantization, "device": device_name(), "tokens": num_tokens}
    for name, train in (("fedcli", train_by_fedcli), ("by hand", train_by_hand)):
        train(adapted, examples[:BATCH_SIZE], batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE)  # kernels get ready
        if has_gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        train(adapted, examples, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE)  # it ends with a loss on the host
        if has_gpu:
            torch.cuda.synchronize()
        figures[name] = {"tokens_per_second": num_tokens / (time.perf_counter() - started)}
        figures[name]["peak_bytes"] = torch.cuda.max_memory_reserved() if has_gpu else None
    shape = SHAPES["7b" if adapted.base.config.hidden_size == SHAPES["7b"]["hidden_size"] else "tiny"]
    width, inner, layers = (shape[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    num_parameters = layers * (4 * width * width + 3 * width * inner)
    rate = matmul_rate()
    figures["matmul_flops"] = rate
    figures["fraction_of_matmul_rate"] = 4 * num_parameters * figures["fedcli"]["tokens_per_second"] / rate
    return figures


def matmul_rate() -> float:
    """Return the floating-point operations a second of a large product of matrices, bfloat16 on a GPU."""
    import torch

    has_gpu = torch.cuda.is_available()
    size, repeats = (8192, 50) if has_gpu else (1024, 3)
    device, dtype = ("cuda", torch.bfloat16) if has_gpu else ("cpu", torch.float32)
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    one @ other
    if has_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        one @ other
    if has_gpu:
        torch.cuda.synchronize()
    return repeats * 2 * size**3 / (time.perf_counter() - started)


def device_name() -> str:
    """Return the GPU's name, or the processor's."""
    import torch
    from record import processor

    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def main() -> int:
    """Print the table, keep the figures, and say whether the limit holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--quantization", nargs="+", default=["none", "int8", "nf4"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make_model(arguments.shape, arguments.make)
        return 0
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.quantization[0], arguments.steps)))
        return 0
    results = []
    this = [sys.executable, __file__, "--shape", arguments.shape, "--steps", str(arguments.steps)]
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        subprocess.run([*this, "--make", folder / "model"], check=True)
        make_rows(folder / "rows.jsonl")
        for quantization in arguments.quantization:
            line = [*this, "--measure", folder, "--quantization", quantization]
            done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(results[-1]), flush=True)
    ratio = max(row["by hand"]["tokens_per_second"] / row["fedcli"]["tokens_per_second"] for row in results)
    return record("gpu", ratio, LIMIT, {"shape": arguments.shape, "results": results}, is_kept=arguments.shape == "7b")


if __name__ == "__main__":
    sys.exit(main())
