"""Encoded differences on the demo, three seeds: bytes up and down, scores, and what 16-bit values lose: tables.

    nice -n 10 python benchmarks/encoding.py [--seeds 0 1 2] [--encodings f32 int8 top_k f16 bf16] [--rounds N]

One federation for each seed and encoding, by the demo's settings; each is verified. A score is the share of right
answers on the held-out headlines, beside the float32 federation's of the same seed by paired standard errors. Bytes are
those of one client in the last round: up its files but update.json; down what a client elsewhere reads that holds the
adapter of the round before. The relative errors are of a Gaussian difference of deviation 1e-4 from an adapter of
deviation 0.02, as in the notes of the project. results/encoding.json keeps each run as it ends; run again, it goes on.
"""

import argparse
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from record import RESULTS, commit, processor

from fedcli import Federation
from fedcli.client.runtimes import KeptModel
from fedcli.config.aggregation import AggregationConfig
from fedcli.scoring.request import Scoring
from fedcli.scoring.targets import Targets
from fedcli.server.encoded_step import encoding_record
from fedcli.workspace.encoded_differences import decode_differences, encode_differences
from fedcli.workspace.layout import update_name
from fedcli.workspace.records import TensorEntry
from fedcli.workspace.scores import read_items

ENCODINGS = ("f32", "int8", "top_k", "f16", "bf16")
PATH = RESULTS / "encoding.json"


def main() -> int:
    """Make the runs that are missing, and print the tables; return 1 where int8 takes over .27 of float32's bytes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--encodings", nargs="+", choices=ENCODINGS, default=ENCODINGS)
    parser.add_argument("--rounds", type=int)
    arguments = parser.parse_args()
    document = json.loads(PATH.read_text()) if PATH.exists() else {"runs": {}}
    if document.get("rounds", arguments.rounds) != arguments.rounds:
        parser.error(f"{PATH} is of {document['rounds']} rounds: move it away")
    document |= {"rounds": arguments.rounds, "errors": errors()}
    print(error_table(document["errors"]), flush=True)
    kept = KeptModel()
    for encoding in arguments.encodings:
        for seed in arguments.seeds:
            key = f"{encoding} | {seed}"
            if key not in document["runs"]:
                document["runs"][key] = federate(encoding, seed, arguments.rounds, kept)
                document |= {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "machine": processor()}
                PATH.write_text(json.dumps(document, indent=1) + "\n")
                print(key, {**document["runs"][key], "marks": "..."}, file=sys.stderr, flush=True)
    print(table(document["runs"], arguments.encodings, arguments.seeds))
    one = [document["runs"].get(f"{name} | {arguments.seeds[0]}") for name in ("f32", "int8")]
    return int(all(one) and any(one[1][key] > 0.27 * one[0][key] for key in ("up", "down")))


def federate(encoding: str, seed: int, rounds: int | None, kept: KeptModel) -> dict:
    """Run one federation; return its bytes and its marks."""
    settings = {"federation.seed": seed, "aggregation.encoding": encoding}
    settings |= {} if rounds is None else {"federation.rounds": rounds}
    with tempfile.TemporaryDirectory() as folder:
        Federation.create(Path(folder), preset="demo", settings=settings)
        federation = Federation.open(folder, threads=1, kept=kept)
        while federation.status().state == "open":
            federation.train_clients()
            federation.server.aggregate()
        violations = federation.verify().violations
        assert not violations, violations
        last = federation.round()
        federation.evaluate(request=Scoring(("demo",), targets=Targets(rounds=("latest",))))
        items = read_items(federation.workspace, update_name(last.number), "demo")
        marks = {str(item["item"]): item["marks"]["exact_match"] for item in items}
        before = last.previous()
        return {
            "marks": [marks[name] for name in sorted(marks)],
            "up": before.manifest.cost.client_bytes_up,
            "down": before.manifest.cost.client_bytes_down,
            "rounds": last.number,
        }


def errors() -> dict[str, float]:
    """Return the relative errors of differences, and of the difference between values, in each encoding."""
    rng = np.random.default_rng(0)
    difference = rng.normal(scale=1e-4, size=2**20).astype(np.float32)
    adapter = rng.normal(scale=0.02, size=2**20).astype(np.float32)
    found = {}
    for encoding in ENCODINGS[1:]:
        found[f"{encoding} differences"] = error(received(difference, encoding), difference)
        if encoding in ("f16", "bf16"):
            found[f"{encoding} values"] = error(received(adapter + difference, encoding) - adapter, difference)
    return found


def received(values: np.ndarray, encoding: str) -> np.ndarray:
    """Return what is read of numbers that are sent so."""
    record = encoding_record(AggregationConfig(encoding=encoding))
    schema = {"x": TensorEntry(shape=values.shape, dtype="F32")}
    contents = encode_differences({"x": values}, record, lambda _: np.random.default_rng(1))
    return decode_differences(contents, schema, record)["x"]


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the relative L2 error."""
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted.astype(np.float64)))


def error_table(found: dict[str, float]) -> str:
    """Return the relative errors in Markdown."""
    return "\n".join(["| sent as | relative error |", "|---|---|", *(f"| {k} | {v:.4f} |" for k, v in found.items())])


def table(runs: dict[str, dict], encodings: list[str], seeds: list[int]) -> str:
    """Return the scores and bytes in Markdown."""
    lines = ["| encoding | up | down | score by seed | difference to f32, pooled |", "|---|---|---|---|---|"]
    for encoding in encodings:
        found = [runs[f"{encoding} | {seed}"] for seed in seeds]
        up, down = (
            f"{found[0][key]:,} ({found[0][key] / runs[f'f32 | {seeds[0]}'][key]:.3f})" for key in ("up", "down")
        )
        scores = ", ".join(f"{np.mean(run['marks']):.3f}" for run in found)
        plain = np.concatenate([runs[f"f32 | {seed}"]["marks"] for seed in seeds])
        gaps = np.concatenate([run["marks"] for run in found]) - plain
        spread = 1.96 * gaps.std(ddof=1) / len(gaps) ** 0.5
        lines.append(f"| {encoding} | {up} | {down} | {scores} | {gaps.mean():+.4f} ± {spread:.4f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
