"""Peak memory and seconds a step of one client on a GPU: a Llama-2-7B-shaped random model in int8 and nf4.

    python benchmarks/gpu_memory.py [--shape 7b] [--quantization int8 nf4] [--algorithms fedavg scaffold]

LoRA rank 32 on q_proj and v_proj, batch 16 in micro-batches of 4, length 512, 10 steps, gradient checkpointing. No
weights are needed: it makes the model. The limit is a card of 24 GB. `--shape tiny` tries the script itself on a CPU.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from demo_seeds import fedcli
from record import RESULTS, commit, processor

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4},
}
LIMIT = 24 * 10**9
"""Bytes."""
NUM_ROWS = 64


def make_model(shape: str, folder: Path) -> None:
    """Save a random Llama with the tokenizer of the built-in model."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from fedcli.model.base import find_base

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **SHAPES[shape]))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(find_base("builtin:tiny", revision=None, root=folder)).save_pretrained(folder)


def make_rows(path: Path) -> None:
    """Write rows that are longer than 512 tokens."""
    story = " ".join(f"the bank soars on day {number} and the coast clears" for number in range(100))
    rows = [{"instruction": f"Tell story {number}.", "output": story} for number in range(NUM_ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(folder: Path) -> dict:
    """Train client 0 of a workspace, and return its figures; in a process of its own."""
    import torch

    from fedcli import Federation, Observer

    moments: list[float] = []
    clock = Observer()
    clock.step_done = lambda client, report: moments.append(time.monotonic())
    result = Federation.open(folder).client(0).train(observer=clock)
    has_gpu = torch.cuda.is_available()
    return {
        "seconds_per_step": (moments[-1] - moments[0]) / (len(moments) - 1),
        "peak_bytes": torch.cuda.max_memory_reserved() if has_gpu else None,
        "device": torch.cuda.get_device_name() if has_gpu else processor(),
        "mean_loss": result.training.mean_loss,
    }


def main() -> int:
    """Print the table, keep the figures, and say whether the limit holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--quantization", nargs="+", default=["int8", "nf4"])
    parser.add_argument("--algorithms", nargs="+", default=["fedavg", "scaffold"])
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make_model(arguments.shape, arguments.make)
        return 0
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return 0
    results = []
    scratch = Path(tempfile.mkdtemp())
    try:
        make = [sys.executable, __file__, "--shape", arguments.shape, "--make", str(scratch / "model")]
        subprocess.run(make, check=True)  # a process of its own: what it leaves on the GPU would be measured, too
        make_rows(scratch / "rows.jsonl")
        for quantization in arguments.quantization:
            for algorithm in arguments.algorithms:
                folder = scratch / f"{quantization}-{algorithm}"
                settings = [
                    f"model.base={scratch / 'model'}",
                    f"model.quantization={quantization}",
                    f"data.source={scratch / 'rows.jsonl'}",
                    f"algorithm.name={algorithm}",
                    "federation.clients=2",
                    "train.micro_batch_size=4",
                    "train.gradient_checkpointing=true",
                ]
                options = [part for setting in settings for part in ("--set", setting)]
                fedcli("init", folder, "--preset", "defaults", *options)
                line = [sys.executable, __file__, "--measure", str(folder)]
                done = subprocess.run(line, env=os.environ, stdout=subprocess.PIPE, text=True, check=True)
                row = {"quantization": quantization, "algorithm": algorithm} | json.loads(done.stdout.splitlines()[-1])
                results.append(row)
                print(row, flush=True)
    finally:
        shutil.rmtree(scratch)
    record = {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "shape": arguments.shape}
    RESULTS.mkdir(exist_ok=True)
    if arguments.shape != "tiny":
        (RESULTS / "gpu_memory.json").write_text(json.dumps(record | {"results": results}, indent=1) + "\n")
    peak = max((row["peak_bytes"] or 0 for row in results), default=0)
    print(f"gpu_memory: ratio {peak / LIMIT:.2f} (limit 1)")
    return 0 if peak <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
