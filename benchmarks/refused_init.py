"""A whole `fedcli init` that refuses a wrong base against `fedcli --help`: what it costs to be told.

    python benchmarks/refused_init.py [--repeats 5]

Four bases are refused: one with prefixed names of weights, one with a layer too few, an encoder-decoder, and one whose
tokenizer has a token too many. Each is a copy of the built-in model. Processes take turns; the ratio is of medians, of
the slowest of the four.
"""

import argparse
import json
import shutil
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from record import record

from fedcli.model.base import find_base

LIMIT = 8


def configure(folder: Path, name: str, **changes: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def prefix(folder: Path) -> None:
    path = folder / "model.safetensors"
    contents = path.read_bytes()
    (length,) = struct.unpack("<Q", contents[:8])
    header = json.loads(contents[8 : 8 + length])
    renamed = {name if name == "__metadata__" else f"module.{name}": entry for name, entry in header.items()}
    encoded = json.dumps(renamed).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + contents[8 + length :])


def add_token(folder: Path) -> None:
    token = {"id": 900, "content": "<new>", "special": False}
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    configure(folder, "tokenizer.json", added_tokens=[*tokens, token])


WRONG: dict[str, Callable[[Path], None]] = {
    "prefixed names": prefix,
    "a layer too few": lambda folder: configure(folder, "config.json", num_hidden_layers=3),
    "an encoder-decoder": lambda folder: configure(folder, "config.json", model_type="t5", architectures=["T5Model"]),
    "a token too many": add_token,
}


def seconds_of(*arguments: object, code: int) -> float:
    """Run a fedcli process that must exit with a code; return its wall seconds."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "fedcli", *map(str, arguments)], capture_output=True)
    assert done.returncode == code, done.stderr
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    seconds: dict[str, list[float]] = {"help": [], **{name: [] for name in WRONG}}
    with TemporaryDirectory() as temporary:
        built_in = find_base("builtin:tiny", revision=None, root=Path.cwd())
        for name, change in WRONG.items():
            change(Path(shutil.copytree(built_in, Path(temporary) / name)))
        for _ in range(repeats):
            seconds["help"].append(seconds_of("--help", code=0))
            for name in WRONG:
                base = Path(temporary) / name
                seconds[name].append(seconds_of("init", Path(temporary) / "w", "--set", f"model.base={base}", code=8))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:20} {median:.2f} s")
    slowest = max(medians[name] for name in WRONG)
    return record("refused_init", slowest / medians["help"], LIMIT, {"seconds": medians, "repeats": repeats})


if __name__ == "__main__":
    sys.exit(main())
