"""What scores cost in bytes: a column of tables, a budget of init and doctor, and a study's two views of it."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from support.processes import fedcli, run_ok, settings
from support.scores import ACCURACY, keep

from fedcli.errors import UsageError
from fedcli.scoring.render import as_rows, to_markdown
from fedcli.scoring.table import make_table
from fedcli.study.columns import Column
from fedcli.study.costs import Goal, Reached
from fedcli.study.render import as_rows as study_rows
from fedcli.study.render import render
from fedcli.study.results import Block, StudyScore, StudyTable
from fedcli.workspace.layout import Workspace


def moved_until(workspace: Path, number: int) -> int:
    """Count the bytes that all clients read and sent in the rounds before one, by the files on the disk."""
    total = 0
    for before in range(number):
        folder = workspace / f"rounds/{before:05d}"
        read = [path for path in folder.rglob("adapter*") if path.is_file()]
        assert len(read) == 2
        merged = json.loads((workspace / f"rounds/{before + 1:05d}/manifest.json").read_text())["aggregation"]
        for entry in merged["counted"]:
            sent = workspace / f"inbox/{entry['client']}/round-{before:05d}"
            total += sum(path.stat().st_size for path in (*read, *sent.iterdir()))  # update.json, too
    return total


@pytest.mark.slow
def test_a_score_table_has_the_megabytes_until_each_round_and_doctor_knows_the_budget(small: Path) -> None:
    run_ok("run", "--rounds", 2, cwd=small)
    workspace = Workspace(small)
    for number, target in enumerate(["base", "round-00000", "round-00001", "round-00002", "pooled"]):
        keep(workspace, target, "fpb", {ACCURACY: [1] * number + [0]})
    table = make_table(workspace)
    counted = {f"round-0000{number}": moved_until(small, number) for number in range(3)}
    assert counted["round-00002"] > counted["round-00001"] > counted["round-00000"] == 0
    assert table.communication == counted
    first, second = (f"{counted[f'round-0000{number}'] / 1e6:,.2f}" for number in (1, 2))
    lines = to_markdown(table).splitlines()
    assert lines[2].endswith("| average rank | MB sent and fetched |")
    ends = {line.split(" | ")[0][2:]: line.rsplit("|", 2)[1].strip() for line in lines[4:8]}
    assert ends == {"base": "", "round-00000": "0.00", "round-00001": first, "round-00002": second}
    assert [row["communication_bytes"] for row in as_rows(table) if row["target"] in ("base", "round-00001")] == [
        None,
        counted["round-00001"],
    ]
    shown = fedcli("eval", "table", cwd=small)
    assert "MB sent and fetched" in shown.stdout
    config = small / "fedcli.yaml"
    config.write_text(config.read_text().replace("federation:\n", "federation:\n  budget: 50kB\n"))
    doctor = fedcli("doctor", "--json", cwd=small)
    (found,) = [each for each in json.loads(doctor.stdout)["findings"] if each["name"] == "communication"]
    assert found["state"] == "warning"
    assert "federation.budget is 50.0 kB" in found["detail"]


@pytest.mark.slow
def test_a_study_shows_quality_within_a_budget_and_the_cost_of_a_score(tmp_path: Path) -> None:
    more = ("settings.federation.rounds=3", "settings.train.steps=2", "settings.federation.clients=3", "seeds=[0, 1]")
    algorithms = "algorithms=[{name: fedavg, label: FedAvg}, {name: scaffold, label: SCAFFOLD}]"
    options = settings(*more, algorithms, "eval.limit=20", "eval.every=1", "baselines=[base]")
    run_ok("study", "init", "demo", "study", *options, cwd=tmp_path)
    study = tmp_path / "study"
    run_ok("study", "run", cwd=study)
    cells = {
        (label, seed): study / f"cells/demo/seed-{seed}/{label}" for label in ("FedAvg", "SCAFFOLD") for seed in (0, 1)
    }
    costs: dict[tuple[str, int], Mapping[int, int]] = {}
    scores: dict[tuple[str, int], Mapping[int, float]] = {}
    for place, cell in cells.items():
        found = {number: json.loads((cell / f"rounds/{number:05d}/manifest.json").read_text()) for number in (1, 2, 3)}
        costs[place] = {
            number: manifest["cost"]["total_bytes_up"] + manifest["cost"]["total_bytes_down"]
            for number, manifest in found.items()
        }
        records = {
            number: json.loads((cell / f"eval/round-{number:05d}/demo@limit=20.json").read_text()) for number in found
        }
        scores[place] = {number: record["scores"]["exact_match"]["value"] for number, record in records.items()}
    whole = run_ok("study", "table", cwd=study)
    rows = {row["row"]: row for row in whole["scores"] if row["metric"] == "exact_match"}
    for label in ("FedAvg", "SCAFFOLD"):
        assert rows[label]["communication_bytes"] == fmean(costs[label, seed][3] for seed in (0, 1))
        assert whole["communication_bytes"]["demo"][label] == {str(seed): costs[label, seed][3] for seed in (0, 1)}
    assert rows["base"]["communication_bytes"] is None
    assert costs["SCAFFOLD", 0][3] > costs["FedAvg", 0][3]  # it sends and fetches states, too

    budget = int(1.2 * costs["FedAvg", 0][2])  # two of FedAvg's rounds, and one of SCAFFOLD's
    within = fedcli("study", "table", "--budget", f"{budget}B", "--json", cwd=study)
    rows = {row["row"]: row for row in json.loads(within.stdout)["scores"] if row["metric"] == "exact_match"}
    for label in ("FedAvg", "SCAFFOLD"):
        last = [max(n for n, size in costs[label, seed].items() if size <= budget) for seed in (0, 1)]
        assert last == [2, 2] if label == "FedAvg" else last == [1, 1]
        expected = fmean(scores[label, seed][number] for seed, number in zip((0, 1), last, strict=True))
        assert rows[label]["mean"] == pytest.approx(expected)

    value = max(scores["FedAvg", 0].values())
    goal = json.loads(fedcli("study", "table", "--goal", f"demo.exact_match={value}", "--json", cwd=study).stdout)[
        "goal"
    ]
    for label, by_seed in goal["demo"]["bytes"].items():
        for seed in (0, 1):
            reached = [number for number, found in sorted(scores[label, seed].items()) if found >= value]
            assert by_seed.get(str(seed)) == (costs[label, seed][reached[0]] if reached else None)
    files = sorted(path.name for path in (study / "tables").iterdir())
    assert files == ["table.csv", "table.json", "table.md", "table.tex"]
    refused = fedcli("study", "table", "--goal", "demo.exact_macth=1", cwd=study)
    assert (refused.returncode, "Did you mean demo.exact_match" in refused.stderr) == (2, True)


def test_a_studys_table_has_columns_of_bytes_beside_the_ranks() -> None:
    column = Column(benchmark="fpb", metric="accuracy")
    scores = {(label, column.shown): StudyScore({0: 0.5, 1: 0.25}) for label in ("base", "FedAvg", "FedProx")}
    rows = {label: label for label in ("base", "FedAvg", "FedProx")}
    moved = {"FedAvg": {0: 1_500_000, 1: 2_500_000}, "FedProx": {0: 500_000}}
    block = Block("demo", "demo", rows, (column,), scores, {}, "base", moved)
    table = StudyTable("", (block,), 2, None)
    assert "| FedAvg | 0.375 ± 0.177 | 2.00 |" in render(table, "markdown")
    assert "| base | 0.375 ± 0.177 |  |" in render(table, "markdown")
    assert [row["communication_bytes"] for row in study_rows(table)] == [None, 2_000_000, 500_000]
    goal = Goal.parse("fpb.accuracy=0.4")
    reached = {"FedAvg": Reached({0: 1_000_000}, 2), "FedProx": Reached({}, 2)}
    text = render(StudyTable("", (replace(block, goal=goal, reached=reached),), 2, None), "markdown")
    assert "| MB sent and fetched | MB to fpb accuracy 0.4 |" in text
    assert "| FedAvg | 0.375 ± 0.177 | 2.00 | 1.00 (1 of 2 seeds) |" in text
    assert "| FedProx | 0.375 ± 0.177 | 0.50 | not reached |" in text
    assert "MB" not in render(StudyTable("", (replace(block, communication={}),), 2, None), "markdown")


@pytest.mark.parametrize("text", ["fpb", "fpb.accuracy", "fpb.accuracy=high", "=1", "fpb=1", ".=1", "accuracy"])
def test_a_goal_is_a_column_and_a_number(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not BENCHMARK\.METRIC=VALUE"):
        Goal.parse(text)


def test_of_a_loss_less_is_the_goal() -> None:
    loss, accuracy = Goal.parse("rows.loss=2"), Goal.parse("fpb.accuracy=0.5")
    assert [loss.is_reached(value) for value in (2.5, 2.0, 1.0)] == [False, True, True]
    assert [accuracy.is_reached(value) for value in (0.4, 0.5, 0.6)] == [False, True, True]
