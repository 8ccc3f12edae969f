"""Score against epsilon, of row and client level: on the demo over three seeds, and on the PhraseBank with SmolLM2.

    OMP_NUM_THREADS=1 python benchmarks/privacy.py demo [--seeds 0 1 2]
    OMP_NUM_THREADS=2 python benchmarks/privacy.py fpb --data DIR --base MODEL [--seeds 0]
    python benchmarks/privacy.py plot

Each run is a whole federation whose noise is calibrated to the epsilon at delta 1e-5, and its last round's score. Rows
are protected at each party, clients at the server. Clients are few here, as hospitals are: noise for clients is far
larger than what they teach. results/privacy-NAME.json keeps each run as it ends; run again, it goes on. `plot` draws
both into results/privacy.svg.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fpb import BENCHMARK, write_training_rows
from record import RESULTS, commit, processor

from fedcli import Federation
from fedcli.client.runtimes import KeptModel
from fedcli.eval.benchmark import Options
from fedcli.scoring.request import Scoring
from fedcli.scoring.targets import Targets

DELTA = 1e-5
EPSILONS = {
    "demo": {"row": (8, 64, 512), "client": (64, 4096)},
    "fpb": {"row": (8, 512), "client": (64,)},
}
CLIP = 1.0
FPB_LIMIT = 100
DEMO = {
    "federation.rounds": 10,
    "train.batch_size": 64,
    "train.learning_rate": 1e-2,
    "train.learning_rate_min": 1e-3,
    "adapter.rank": 2,
    "adapter.alpha": 4,
}
"""What differs from the preset demo: large batches and few numbers, which noise asks for; without privacy, too."""
FPB = {
    "data.format": "fingpt",
    "data.partition": "iid",
    "federation.clients": 2,
    "federation.rounds": 1,
    "train.steps": 40,
    "train.batch_size": 16,
    "train.max_length": 128,
    "train.learning_rate": 2e-3,
    "train.learning_rate_min": 2e-4,
    "adapter.rank": 2,
    "adapter.alpha": 4,
}
METRIC = {"demo": "exact_match", "fpb": "accuracy"}


def main() -> int:
    """Make the runs that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=["demo", "fpb", "plot"])
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--data", type=Path, help="Of fpb: the folder of Sentences_50Agree.txt.")
    parser.add_argument("--base", help="Of fpb: model.base.")
    arguments = parser.parse_args()
    if arguments.name == "plot":
        return plot()
    name, seeds = arguments.name, arguments.seeds or ([0, 1, 2] if arguments.name == "demo" else [0])
    path = RESULTS / f"privacy-{name}.json"
    document = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    kept = KeptModel()
    for seed in seeds:
        for unit, epsilon in settings_of(name):
            key = f"{unit} | {epsilon} | {seed}"
            if key in document["runs"]:
                continue
            document["runs"][key] = federate(name, unit, epsilon, seed, arguments, kept)
            document |= {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "machine": processor()}
            path.write_text(json.dumps(document, indent=1) + "\n")
            print(key, document["runs"][key], file=sys.stderr, flush=True)
    print(table(name, document["runs"]))
    return 0


def settings_of(name: str) -> Iterator[tuple[str, float | None]]:
    """Yield what is to be run: no privacy first."""
    yield "none", None
    for unit, epsilons in EPSILONS[name].items():
        yield from ((unit, float(epsilon)) for epsilon in epsilons)


def federate(
    name: str, unit: str, epsilon: float | None, seed: int, arguments: argparse.Namespace, kept: KeptModel
) -> dict[str, float]:
    """Run one federation; return its base's and its last round's score, and its seconds."""
    settings: dict[str, Any] = {"federation.seed": seed, **(DEMO if name == "demo" else {})}
    if epsilon is not None:
        settings |= {"privacy.unit": unit, "privacy.clip": CLIP}
        settings |= {"privacy.target.epsilon": epsilon, "privacy.target.delta": DELTA}
    with tempfile.TemporaryDirectory() as scratch:
        if name == "fpb":
            rows = Path(scratch) / "train.jsonl"
            write_training_rows(arguments.data / "Sentences_50Agree.txt", rows)
            settings |= FPB | {"data.source": str(rows), "model.base": arguments.base}
        start = time.monotonic()
        folder = Path(scratch) / "workspace"
        Federation.create(folder, preset="demo" if name == "demo" else "real", settings=settings)
        federation = Federation.open(folder, kept=kept)
        federation.run()
        seconds = time.monotonic() - start
        benchmark = "demo" if name == "demo" else BENCHMARK
        limit = {} if name == "demo" else {"data": arguments.data, "options": Options(limit=FPB_LIMIT)}
        request = Scoring((benchmark,), targets=Targets(rounds=("latest",)), **limit)
        (record,) = federation.evaluate(request=request)
        return {"score": record.scores[METRIC[name]].value, "seconds": round(seconds, 1)}


def scores_of(runs: dict[str, dict[str, float]], unit: str, epsilon: float | None) -> list[float]:
    """Return the scores of a setting over its seeds."""
    return [run["score"] for key, run in runs.items() if key.startswith(f"{unit} | {epsilon} | ")]


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def table(name: str, runs: dict[str, dict[str, float]]) -> str:
    """Return the table in Markdown: means over the seeds, and the range."""
    lines = [f"| unit | epsilon | {METRIC[name]} |", "|---|---|---|"]
    for unit, epsilon in settings_of(name):
        if values := scores_of(runs, unit, epsilon):
            shown = f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
            lines.append(f"| {unit} | {'no guarantee' if epsilon is None else f'{epsilon:g}'} | {shown} |")
    return "\n".join(lines)


def plot() -> int:
    """Draw the runs that there are into one picture."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fedcli"
    from matplotlib import pyplot

    titles = {"demo": "the demo, five clients, three seeds", "fpb": "FPB, SmolLM2-135M, two clients, one seed"}
    titles = {name: title for name, title in titles.items() if (RESULTS / f"privacy-{name}.json").exists()}
    figure, all_axes = pyplot.subplots(
        1, len(titles), figsize=(4.5 * len(titles), 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (name, title) in zip(all_axes[0], titles.items(), strict=True):
        runs = json.loads((RESULTS / f"privacy-{name}.json").read_text())["runs"]
        for unit, epsilons in EPSILONS[name].items():
            marks = {"row": ("o-", "#0072b2"), "client": ("s--", "#d55e00")}[unit]
            found = [(epsilon, values) for epsilon in epsilons if (values := scores_of(runs, unit, float(epsilon)))]
            means = [mean(values) for _, values in found]
            spread = [
                [m - min(v) for m, (_, v) in zip(means, found, strict=True)],
                [max(v) - m for m, (_, v) in zip(means, found, strict=True)],
            ]
            axes.errorbar(
                [epsilon for epsilon, _ in found], means, spread, fmt=marks[0], color=marks[1], capsize=3, label=unit
            )
        axes.axhline(mean(scores_of(runs, "none", None)), color="#555555", lw=1, label="no privacy")
        axes.set(xscale="log", xlabel="epsilon (delta 1e-5)", title=title, ylim=(0, 1))
    all_axes[0][0].set_ylabel("share of right answers")
    all_axes[0][0].legend(loc="center left")
    figure.savefig(RESULTS / "privacy.svg", metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
