"""The presets of FedLLM-Bench and FlowerTune, on made-up rows of the shapes that these publish."""

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedcli.config import parse_config
from fedcli.data.formats import choose_format, known_format
from fedcli.server.create import presets
from fedcli.workspace.federation_state import train_record
from tests.support.processes import fedcli, settings

FEDLLM = {
    # clients, per round, rounds, steps, rows a step, rank, learning rate, tokens
    "fedllm-aya": (38, 4, 200, 10, 16, 16, 2e-5, 1024),
    "fedllm-chatbotit": (237, 10, 100, 5, 16, 16, 2e-5, 1024),
    "fedllm-wildchat": (100, 5, 100, 10, 16, 16, 2e-5, 1024),
    "fedllm-chatbotpa": (747, 10, 200, 100, 8, 8, 1e-4, 512),
}
FLOWERTUNE = {
    "flowertune-general": (20, 2, "vicgalle/alpaca-gpt4"),
    "flowertune-finance": (50, 5, "FinGPT/fingpt-sentiment-train"),
    "flowertune-medical": (20, 2, "medalpaca/medical_meadow_medical_flashcards"),
    "flowertune-code": (10, 2, "flwrlabs/code-alpaca-20k"),
}


def preset(name: str) -> Any:
    return parse_config(yaml.safe_load(presets()[name].read_text()), presets()[name])


@pytest.mark.parametrize("name", FEDLLM)
def test_a_preset_has_fedllm_benchs_setting(name: str) -> None:
    config = preset(name)
    federation, train = config.federation, config.train
    found = (federation.clients, federation.cohort_size, federation.rounds, train.most_steps, train.batch_size)
    assert (*found, config.adapter.rank, train.learning_rate, train.max_length) == FEDLLM[name]
    assert config.adapter.alpha == 2 * config.adapter.rank
    assert (config.model.quantization, config.data.template) == ("int8", "alpaca")
    assert config.task == ("dpo" if name == "fedllm-chatbotpa" else "sft")
    assert (config.data.keyed_by, config.data.partition.by) == ("client", "client")


def test_a_client_of_chatbotpa_makes_the_steps_of_its_rows_that_fedllm_bench_gives_it() -> None:
    record = train_record(preset("fedllm-chatbotpa"), 0, 200)
    for num_rows in range(1, 500):
        assert record.for_rows(num_rows).steps == math.ceil(Fraction(3 * num_rows * 747, 200 * 10 * 8))


@pytest.mark.parametrize("name", FLOWERTUNE)
def test_a_preset_has_flowertunes_setting(name: str) -> None:
    config = preset(name)
    federation, train = config.federation, config.train
    (source,) = config.data.sources
    assert (federation.clients, federation.cohort_size, source.source) == FLOWERTUNE[name]
    assert (federation.rounds, train.steps, train.batch_size, train.max_length) == (200, 10, 16, 512)
    assert (train.learning_rate, train.learning_rate_min) == (5e-5, 1e-6)
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.dropout) == (32, 64, 0.075)
    assert (config.model.base, config.model.quantization) == ("mistralai/Mistral-7B-v0.3", "nf4")
    assert federation.budget == 200 * 10**9
    assert known_format(source.source) is not None
    assert source.format == choose_format(source.source, None, "sft")


ANSWERED = {
    f"user{name}": [{"instruction": f"Say {name} {n}.", "response": f"{n}"} for n in range(4)] for name in "abc"
}
PAIRS = {
    f"user{name}": [
        {"prompt": f"Say {name} {number}.", "chosen": f"It is {number}.", "rejected": "No."} for number in range(4)
    ]
    for name in "abc"
}
CONVERSATIONS = {
    f"user{name}": [
        {
            "conversations": [
                {"from": "human", "value": f"Say {name}."},
                {"from": "gpt", "value": name},
                {"from": "human", "value": f"And {number}?"},
                {"from": "gpt", "value": f"{number}"},
            ]
        }
        for number in range(4)
    ]
    for name in "abc"
}
PLAIN = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}"} for n in range(12)]
SENTIMENT = [
    {"input": f"Share {n} fell.", "output": "negative", "instruction": "What is the sentiment of this news?"}
    for n in range(12)
]
CARDS = [
    {"input": f"What is {n}?", "output": f"{n} is a number.", "instruction": "Answer this question truthfully"}
    for n in range(12)
]
ROWS: dict[str, Any] = {
    "fedllm-aya": ANSWERED,
    "fedllm-chatbotit": ANSWERED,
    "fedllm-wildchat": ANSWERED,
    "fedllm-chatbotpa": PAIRS,
    "flowertune-general": [row | {"text": "Below is an instruction ..."} for row in PLAIN],
    "flowertune-finance": SENTIMENT,
    "flowertune-medical": CARDS,
    "flowertune-code": PLAIN,
}
"""What the default suite runs; the others have the same keys."""


BASE, PLAINLY = "model.base=builtin:tiny", "model.quantization=none"


def initialised(folder: Path, name: str, rows: object, *more: str) -> dict[str, Any]:
    """Make a workspace from a preset as a laptop can run it, and return what init says."""
    (folder / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    small = (BASE, PLAINLY, "train.steps=1", "train.batch_size=2")
    small = (*small, "train.micro_batch_size=null", "federation.clients=3", "federation.per_round=2")
    overrides = settings("data.source=rows.json", *small, *more)
    done = fedcli("init", "ws", "--preset", name, *overrides, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_two_clients_train_and_a_round_is_merged_on_rows_of_the_published_shape(name: str, tmp_path: Path) -> None:
    made = initialised(tmp_path, name, ROWS[name])
    assert made["data"]["num_usable"] == 12
    assert made["data"]["sizes"] == [4, 4, 4]
    cohort = made["cohort"]
    assert len(cohort) == 2
    for client in cohort:
        done = fedcli("client", "train", "-w", "ws", "--id", client, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    done = fedcli("server", "aggregate", "-w", "ws", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "ws/rounds/00001/manifest.json").read_text())
    assert [entry["client"] for entry in manifest["aggregation"]["counted"]] == cohort
    own = [json.loads(line) for line in (tmp_path / "ws/data/client-1.jsonl").read_text().splitlines()]
    if name in FEDLLM:
        assert {row["client"] for row in own} == {"userb"}
        assert made["data"]["unused"] == {}
    if name in FLOWERTUNE:
        told = [note for note in made["notes"] if "federation.budget is 200.0 GB" in note]
        assert told
        assert told[0].startswith("200 rounds of 2 clients move ")


@pytest.mark.slow
def test_whole_conversations_of_wildchat_are_read_as_the_preset_says(tmp_path: Path) -> None:
    made = initialised(tmp_path, "fedllm-wildchat", CONVERSATIONS, "data.format=sharegpt", "data.template=vicuna")
    assert (made["data"]["sizes"], made["data"]["formats"]) == ([4, 4, 4], ["sharegpt"] * 3)


def test_a_file_of_users_that_is_read_as_one_row_is_explained(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ANSWERED), encoding="utf-8")
    done = fedcli("init", "ws", *settings("data.source=rows.json"), cwd=tmp_path)
    assert done.returncode == 3
    assert "The file is an object of lists of rows: set data.keyed_by to a column for their keys" in done.stderr


@pytest.mark.slow
def test_fewer_users_than_clients_are_told_with_their_number(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ANSWERED), encoding="utf-8")
    done = fedcli(
        "init", "ws", "--preset", "fedllm-aya", *settings("data.source=rows.json", BASE, PLAINLY), cwd=tmp_path
    )
    assert done.returncode == 3
    assert "column 'client' has 3 values, 3 of them with at least data.min_rows (1) rows; federation.clients is 38" in (
        done.stderr
    )


@pytest.mark.slow
def test_the_budget_counts_every_round_and_both_ways(tmp_path: Path) -> None:
    made = initialised(tmp_path, "flowertune-code", PLAIN, "federation.budget=1MB", "federation.rounds=7")
    manifest = json.loads((tmp_path / "ws/rounds/00000/manifest.json").read_text())
    each = manifest["cost"]["client_bytes_down"] + manifest["cost"]["client_bytes_up"]
    told = f"7 rounds of 2 clients move {7 * 2 * each / 1e6:.1f} MB in all, federation.budget is 1.0 MB, which is less."
    assert any(note.startswith(told) for note in made["notes"]), made["notes"]
