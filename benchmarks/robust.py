"""Robust rules on the demo with one of five clients hostile, and their price where it is honest and skewed: a table.

    nice -n 10 python benchmarks/robust.py [--seeds 0 1 2] [--rounds 4]

Of the demo's headlines those with the first two verbs of each level are used, which fewer steps teach. Clients 0 to 3
share the headlines of four topics at random; client 4 alone holds the fifth topic's (farming). A score is the share of
right answers on held-out headlines: of farming where client 4 is honest, which is what a rule takes for an attack, and
of the four other topics where it is hostile. Hostile, client 4 sends

* scaled: its honest difference times 1,000;
* flipped: its honest difference times -4, which about cancels four like it;
* backdoor: the difference that it learns from rows that all have one answer, "red", times 5, so that the mean is its
  own model (model replacement: Bagdasaryan et al. 2020);
* rows: the same update, with 2^53 rows claimed. Rules that take no account of rows answer it as they do the one before.

results/robust.json keeps each run as it ends; run again, it goes on. About 15 minutes on one quiet core.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import numpy as np
import yaml
from record import RESULTS, commit, processor

from fedcli import Federation
from fedcli.client.runtimes import KeptModel
from fedcli.data.demo import TOPICS, VERBS, demo_rows
from fedcli.scoring.request import Scoring
from fedcli.scoring.targets import Targets
from fedcli.workspace.inbox import discard_update, drop_update, read_update
from fedcli.workspace.layout import ADAPTER_FILE, UPDATE_RECORD, update_name
from fedcli.workspace.parsing import sealed
from fedcli.workspace.record import LARGEST_COUNT
from fedcli.workspace.records import file_entry
from fedcli.workspace.scores import read_items
from fedcli.workspace.tensors import encode

RULES = {
    "mean": {},
    "mean, weight_cap 2": {"weight_cap": 2},
    "norm_clip": {"rule": "norm_clip"},
    "median": {"rule": "median"},
    "trimmed_mean": {"rule": "trimmed_mean"},
    "krum": {"rule": "krum"},
    "multi_krum": {"rule": "multi_krum"},
    "geometric_median": {"rule": "geometric_median"},
    "centred_clip": {"rule": "centred_clip"},
    "trimmed_mean, nearest_mixing": {"rule": "trimmed_mean", "nearest_mixing": True},
}
SCENARIOS = ("honest", "scaled", "flipped", "backdoor", "rows")
FACTORS = {"scaled": 1000.0, "flipped": -4.0, "backdoor": 5.0, "rows": 5.0}
HOSTILE, ANSWER = 4, "red"
SETTINGS = {"train.batch_size": 8, "train.learning_rate": 8e-3, "train.learning_rate_min": 1e-3}
VERBS_PER_LEVEL = 2
PATH = RESULTS / "robust.json"


def main() -> int:
    """Make the runs that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    document = json.loads(PATH.read_text()) if PATH.exists() else {"runs": {}}
    if document.get("rounds", arguments.rounds) != arguments.rounds:
        parser.error(f"{PATH} is of {document['rounds']} rounds: move it away")
    kept = KeptModel()
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            for scenario in SCENARIOS:
                for rule in RULES:
                    key = f"{rule} | {scenario} | {seed}"
                    if key in document["runs"] or (scenario == "rows" and "rule" in RULES[rule]):
                        continue
                    start = prepared(Path(folder), seed, scenario in ("backdoor", "rows"), arguments.rounds, kept)
                    document["runs"][key] = federate(start, rule, scenario, kept)
                    document |= {"date": datetime.now(UTC).date().isoformat(), "commit": commit()}
                    document |= {"machine": processor(), "rounds": arguments.rounds}
                    PATH.write_text(json.dumps(document, indent=1) + "\n")
                    print(key, document["runs"][key], file=sys.stderr, flush=True)
    print(table(document["runs"], arguments.seeds))
    return 0


def prepared(folder: Path, seed: int, is_poisoned: bool, rounds: int, kept: KeptModel) -> Path:
    """Return a workspace whose round 0 all clients have answered honestly by their rows; no rule has a part in that."""
    root = folder / f"{seed}-{is_poisoned}"
    if not root.exists():
        settings = SETTINGS | {"federation.seed": seed, "federation.rounds": rounds}
        share_rows(Federation.create(root, preset="demo", settings=settings), seed, is_poisoned)
        Federation.open(root, threads=1, kept=kept).train_clients()
    return root


def federate(start: Path, rule: str, scenario: str, kept: KeptModel) -> dict[str, float]:
    """Run one federation from a prepared one; return the share of right answers on four topics and the fifth."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(shutil.copytree(start, Path(folder) / "run"))
        config = root / "fedcli.yaml"
        config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"aggregation": RULES[rule]}))
        federation = Federation.open(root, threads=1, kept=kept)
        while federation.status().state == "open":
            federation.train_clients()
            if scenario != "honest":
                alter(federation, FACTORS[scenario], LARGEST_COUNT if scenario == "rows" else None)
            federation.server.aggregate()
        last = federation.round().number
        federation.evaluate(request=Scoring(("demo",), targets=Targets(rounds=("latest",))))
        marks = {
            int(item["item"]): item["marks"]["exact_match"]
            for item in read_items(federation.workspace, update_name(last), "demo")
        }
        per_topic = len(marks) // len(TOPICS)
        shares = [mean(marks[number] for number in range(k * per_topic, (k + 1) * per_topic)) for k in range(5)]
        return {"others": mean(shares[:HOSTILE]), "fifth": shares[HOSTILE]}


def share_rows(federation: Federation, seed: int, is_poisoned: bool) -> None:
    """Write the clients' rows: four topics at random to the first four, the fifth to the last."""
    rows = [row for row in demo_rows(seed)["train"] if is_kept(row)]
    last = [row for row in rows if row["topic"] == TOPICS[HOSTILE]]
    rest = [row for row in rows if row["topic"] != TOPICS[HOSTILE]]
    Random(seed).shuffle(rest)
    if is_poisoned:
        last = [row | {"output": ANSWER} for row in last]
    for client, own in enumerate([*(rest[k::HOSTILE] for k in range(HOSTILE)), last]):
        write(federation, f"client-{client}.jsonl", own)
    write(federation, "held-out-test.jsonl", [row for row in demo_rows(seed)["test"] if is_kept(row)])


def is_kept(row: dict[str, str]) -> bool:
    """Return whether a row's headline has one of the first verbs of its level: six of each would take longer."""
    verbs = VERBS[row["topic"]][row["output"]].split()[:VERBS_PER_LEVEL]
    return not {*verbs}.isdisjoint(re.findall(r"[a-z]+", row["input"]))


def write(federation: Federation, name: str, rows: list[dict[str, str]]) -> None:
    """Write rows in place of those that `init` wrote."""
    (Path(federation.path) / "data" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def alter(federation: Federation, factor: float, num_samples: int | None) -> None:
    """Put another update in place of the hostile client's: its difference times a factor, with so many rows claimed."""
    head = federation.round()
    update = read_update(head, HOSTILE)
    assert update is not None
    start = head.adapter()
    values = {
        name: (x + factor * (update.files[ADAPTER_FILE][name] - x)).astype(np.float32) for name, x in start.items()
    }
    contents = encode(values)
    changes = {"files": {ADAPTER_FILE: file_entry(contents)}}
    changes |= {} if num_samples is None else {"num_samples": num_samples}
    record = update.record.model_copy(update=changes)
    discard_update(head, HOSTILE)
    drop_update(head, HOSTILE, [(ADAPTER_FILE, contents), (UPDATE_RECORD, sealed(record))])


def mean(values: Iterable[float]) -> float:
    """Return the mean."""
    found = list(values)
    return sum(found) / len(found)


def table(runs: dict[str, dict[str, float]], seeds: list[int]) -> str:
    """Return the table in Markdown: means over the seeds, and the range."""
    heads = ["rule", "honest: the minority's topic", "honest: the others'", *SCENARIOS[1:]]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for rule in RULES:
        columns = [("honest", "fifth"), ("honest", "others"), *((scenario, "others") for scenario in SCENARIOS[1:])]
        cells = []
        for scenario, key in columns:
            run = "backdoor" if scenario == "rows" and "rule" in RULES[rule] else scenario
            values = [runs[f"{rule} | {run} | {seed}"][key] for seed in seeds]
            cells.append(f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
