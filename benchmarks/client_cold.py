"""A whole cold `fedcli client train` process against one written by hand for the same steps.

    python benchmarks/client_cold.py [--repeats 5]

The work is the demo's: the built-in model, 10 steps of 16 rows, so that starting is what costs. The hand-written
process imports torch and transformers' Llama, loads the model, adds LoRA in a few lines, and trains on rows that are
tokenised already; it has no workspace, no protocol and no checks. Both are timed from start to exit and take turns,
with the same number of threads. The ratio is that of the medians.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from record import record

LIMIT = 1.5
BY_HAND = Path(__file__).parent / "client_by_hand.py"


def seconds_of(line: list[object]) -> tuple[float, float]:
    """Run a process; return its wall and processor seconds."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(list(map(str, line)), check=True, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def save_examples(workspace: Path, path: Path) -> Path:
    """Save the token ids that client 0 trains on in round 0, for the hand-written process; return the path."""
    import numpy as np

    from fedcli.data.encoding import Encoder, encode_source
    from fedcli.data.formats import RowReader
    from fedcli.data.order import draw
    from fedcli.model.base import find_base
    from fedcli.model.loading import load_tokenizer
    from fedcli.parties.party import find_party
    from fedcli.workspace.federation_state import Experiment
    from fedcli.workspace.layout import Workspace

    experiment = Experiment.read(Workspace(workspace))
    config, party = experiment.config, find_party(experiment, 0)
    encoder = Encoder(load_tokenizer(find_base("builtin:tiny", revision=None, root=path), trust_remote_code=False))
    reader = RowReader(party.format, config.federation.seed)
    rows = encode_source(encoder, reader, party.source, config.train.max_length)
    order = draw(len(rows), seed=config.federation.seed, client=0, first=0, count=160)
    examples = [rows[index].sides[0] for index in order]
    lengths = np.array([len(row.ids) for row in examples])
    ids = np.concatenate([row.ids for row in examples])
    supervised = np.concatenate([row.supervised for row in examples])
    np.savez(path, ids=ids, supervised=supervised, lengths=lengths)
    return path


def main() -> int:
    """Let both processes take turns, and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    taken: dict[str, list[tuple[float, float]]] = {"fedcli": [], "by hand": []}
    with TemporaryDirectory() as scratch:
        workspace = Path(scratch) / "w"
        fedcli = [sys.executable, "-m", "fedcli"]
        steps = ["--set", "train.steps=10", "--set", "train.batch_size=16"]
        subprocess.run([*fedcli, "init", workspace, *steps], check=True, capture_output=True)
        examples = save_examples(workspace, Path(scratch) / "examples.npz")
        for _ in range(arguments.repeats):
            taken["fedcli"].append(seconds_of([*fedcli, "client", "train", "-w", workspace, "--id", 0, "--json"]))
            subprocess.run(
                [*fedcli, "server", "discard", "-w", workspace, "--id", "0"], check=True, capture_output=True
            )
            taken["by hand"].append(seconds_of([sys.executable, BY_HAND, examples]))
    medians = {name: [statistics.median(column) for column in zip(*each, strict=True)] for name, each in taken.items()}
    for name, (wall, cpu) in medians.items():
        print(f"{name}: {wall:.2f} s, {cpu:.2f} s of processor time")
    return record("client_cold", medians["fedcli"][0] / medians["by hand"][0], LIMIT, {"seconds": taken})


if __name__ == "__main__":
    sys.exit(main())
