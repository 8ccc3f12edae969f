"""`fedcli server aggregate` with aggregation.lora on 50 updates of 67 MB, against the means of factors, in turns.

    python benchmarks/lora_merge.py [--rules product exact] [--repeats 3]

The updates are those of aggregate.py under PEFT's names: noise, whose products have no leading part, the worst case.
The last line is `lora_merge: ratio R (limit 6.0)`: the seconds of `product` over the means', the median of the pairs.
The exit code is 1 past the limit, or where the peak memory is over 4 GB.
"""

import argparse
import resource
import shutil
import statistics
import sys
import tempfile
from operator import truediv
from pathlib import Path

import aggregate
import yaml
from record import record

MOST_RATIO, MOST_BYTES = 6.0, 4e9
TENSORS = {
    f"base_model.model.model.layers.{layer}.self_attn.{name}_proj.lora_{factor}.weight": shape
    for layer in range(32)
    for name in "qv"
    for factor, shape in (("A", (32, 4096)), ("B", (4096, 32)))
}
"""LoRA of rank 32 on q and v of a model of 7 billion parameters: 67 MB."""


def main() -> int:
    """Let the means and each rule take turns, and write what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=aggregate.NUM_FILES)
    parser.add_argument("--rules", nargs="+", default=["product", "exact"], choices=("product", "exact"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="the folder for the updates (default: the system's)")
    arguments = parser.parse_args()
    aggregate.TENSORS.clear()
    aggregate.TENSORS.update(TENSORS)
    names = ["factors", *arguments.rules]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    processors: dict[str, list[float]] = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        workspace = aggregate.make_workspace(Path(scratch) / "workspace", arguments.clients)
        config = yaml.safe_load(workspace.config.read_text())
        for _ in range(arguments.repeats):
            for name in names:
                workspace.config.write_text(yaml.safe_dump(config | {"aggregation": {"lora": name}}))
                command = [sys.executable, "-m", "fedcli", "server", "aggregate", "-w", str(workspace.root)]
                before = processor_seconds()
                taken, peak = aggregate.run(command)
                processors[name].append(processor_seconds() - before)
                print(f"{name}: {taken:.2f} s, {processors[name][-1]:.2f} of CPU, {peak / 1e6:.0f} MB", flush=True)
                seconds[name].append(taken)
                peaks[name] = max(peaks[name], peak)
                shutil.rmtree(workspace.round(1))
    figures = {
        name: {
            "seconds": round(statistics.median(taken), 2),
            "ratio": round(statistics.median(map(truediv, taken, seconds["factors"])), 3),
            "processor_seconds": round(statistics.median(processors[name]), 2),
            "peak_bytes": peaks[name],
        }
        for name, taken in seconds.items()
    }
    print(figures)
    code = record(
        "lora_merge", figures[arguments.rules[0]]["ratio"], MOST_RATIO, figures | {"clients": arguments.clients}
    )
    return code or int(max(peaks.values()) > MOST_BYTES)


def processor_seconds() -> float:
    """Return the time that all processors have worked for child processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main())
