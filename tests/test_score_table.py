"""Scores side by side: what is marked, ranked, compared and left out, and which round is best."""

import csv
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.processes import fedcli
from support.scores import ACCURACY, F1, LOSS, MACRO_F1, keep

from fedcli.errors import FedError, NotReadyError, UsageError
from fedcli.eval.benchmark import Metric
from fedcli.eval.statistics import difference
from fedcli.scoring.render import save_table, to_markdown
from fedcli.scoring.table import Cell, Column, ScoreTable, best_rounds, make_table
from fedcli.workspace.baselines import read_baseline_record
from fedcli.workspace.layout import ADAPTER_NAME, Workspace


@pytest.fixture(scope="module")
def with_baselines(small_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with the baselines of clients 1 and 2; tests must not change it."""
    folder = Path(shutil.copytree(small_template, tmp_path_factory.mktemp("baselines") / "workspace"))
    for client in (1, 2):
        done = fedcli("train-alone", "--id", client, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def workspace(with_baselines: Path, tmp_path: Path) -> Workspace:
    return Workspace(Path(shutil.copytree(with_baselines, tmp_path / "workspace")))


def digest(workspace: Workspace, client: int) -> str:
    record = read_baseline_record(workspace, f"alone-{client}")
    assert record is not None
    return record.files[ADAPTER_NAME].sha256


def alone(
    workspace: Workspace, client: int, benchmark: str, marks: Mapping[Metric, Sequence[Any]], **more: Any
) -> None:
    keep(workspace, f"alone-{client}", benchmark, marks, adapter=digest(workspace, client), **more)


BASE, ONE, TWO = [1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 1]


def neutral(num_right: int) -> list[list[int]]:
    """Return the marks of four neutral sentences, the first of which are taken for neutral, and the others negative."""
    counts = {True: [0, 1, 0, 0, 1, 0, 0, 1, 0], False: [0, 0, 0, 1, 0, 0, 0, 1, 0]}
    return [counts[number < num_right] for number in range(4)]


@pytest.fixture
def filled(workspace: Workspace) -> Workspace:
    """The base, two clients alone and two rounds; FPB's accuracy and F1, and the loss of lm-eval's task."""
    f1 = {"base": 1, "alone-1": 2, "alone-2": 2, "round-00002": 4, "round-00010": 3}
    for target, hits in {"base": BASE, "round-00002": [1, 1, 1, 1], "round-00010": TWO}.items():
        keep(workspace, target, "fpb", {ACCURACY: hits, F1: neutral(f1[target])})
    for client, hits in ((1, ONE), (2, TWO)):
        alone(workspace, client, "fpb", {ACCURACY: hits, F1: neutral(f1[f"alone-{client}"])})
        alone(workspace, client, "task", {LOSS: [3.0, 2.0 + client]})
    keep(workspace, "base", "task", {LOSS: [5.0, 6.0]})
    keep(workspace, "round-00002", "task", {LOSS: [1.0, 2.0]})
    return workspace


def column(table: ScoreTable, title: str) -> Column:
    return next(column for column in table.columns if column.title == title)


def cells(table: ScoreTable, title: str) -> dict[str, Cell]:
    found = column(table, title)
    return {target: table.cells[target, found] for target in table.targets if (target, found) in table.cells}


def test_targets_and_columns_have_their_order(filled: Workspace) -> None:
    keep(filled, "base", "hhh", {Metric("accuracy"): [1], Metric("honest"): [1]})
    table = make_table(filled)
    assert table.targets == ("base", "alone-1", "alone-2", "round-00002", "round-00010")
    # weighted_f1 before macro_f1, as FPB has them, and a task that is not fedcli's own behind the others
    keep(filled, "base", "fpb", {ACCURACY: BASE, F1: neutral(1), MACRO_F1: neutral(1)})
    titles = [found.title for found in make_table(filled).columns]
    assert titles == ["fpb accuracy", "fpb weighted_f1", "fpb macro_f1", "hhh accuracy", "hhh honest", "task loss"]


def test_the_best_and_the_second_best_are_marked_and_equal_ones_share_a_mark(filled: Workspace) -> None:
    ranks = {target: cell.rank for target, cell in cells(make_table(filled), "fpb accuracy").items()}
    assert ranks == {"round-00002": 1, "alone-2": 2, "round-00010": 2, "alone-1": 4, "base": 5}
    values = to_markdown(make_table(filled)).partition("## Difference")[0]
    assert "| round-00002 | **1.000 [1.000, 1.000]** | **1.000 [1.000, 1.000]** | **1.500 [1.000, 2.000]** |" in values
    assert "| round-00010 | <u>0.750 [" in values
    assert values.count("**") == 2 * 3 + 2  # the best of three columns, and the words that explain the mark
    assert values.count("<u>") == 2 + 1 + 1 + 1  # two are second in accuracy; the words again


def test_a_smaller_loss_is_the_better_one(filled: Workspace) -> None:
    found = cells(make_table(filled), "task loss")
    assert {target: cell.rank for target, cell in found.items()} == {
        "round-00002": 1, "alone-1": 2, "alone-2": 3, "base": 4
    }  # fmt: skip
    assert found["round-00002"].difference is not None
    assert found["round-00002"].difference.value == -4


def test_ranks_are_averaged_over_the_columns_that_all_targets_have(filled: Workspace) -> None:
    # the loss is left out, as round 10 has none; accuracy: 5, 4, 2.5, 1, 2.5; F1: 5, 3.5, 3.5, 1, 2
    expected = {"base": 5, "alone-1": 3.75, "alone-2": 3, "round-00002": 1, "round-00010": 2.25}
    assert make_table(filled).average_rank == expected
    shutil.rmtree(filled.eval / "round-00010")
    # accuracy: 4, 3, 2, 1; F1: 4, 2.5, 2.5, 1; loss: 4, 2, 3, 1
    expected = {"base": 4, "alone-1": 2.5, "alone-2": 2.5, "round-00002": 1}
    assert make_table(filled).average_rank == expected


def test_one_target_has_no_rank_and_no_difference(workspace: Workspace) -> None:
    keep(workspace, "base", "fpb", {ACCURACY: BASE})
    table = make_table(workspace)
    assert table.average_rank == {}
    assert "average rank" not in to_markdown(table)
    assert "Difference" not in to_markdown(table)


def test_differences_to_the_base_are_paired(filled: Workspace) -> None:
    found = cells(make_table(filled), "fpb accuracy")
    expected = difference(ACCURACY, [dict(enumerate(TWO))], [dict(enumerate(BASE))])
    assert found["round-00010"].difference == expected
    assert expected is not None
    assert expected.value == 0.5
    assert found["base"].difference is None


def test_differences_to_the_best_alone_are_to_each_metrics_own_best(filled: Workspace) -> None:
    for target in ("base", "round-00002"):
        keep(filled, target, "hhh", {ACCURACY: [1]})
    table = make_table(filled, against="best-alone")
    assert cells(table, "hhh accuracy")["round-00002"].difference is None  # no client alone has a score there
    accuracy, loss = cells(table, "fpb accuracy"), cells(table, "task loss")
    leads = [cells["round-00002"].difference for cells in (accuracy, loss)]
    assert [lead.value for lead in leads if lead] == [1 - 3 / 4, 1.5 - 3]  # alone-2's accuracy, and alone-1's loss
    assert accuracy["alone-2"].difference is loss["alone-1"].difference is None
    assert accuracy["alone-1"].difference is not None
    assert "## Difference to best-alone" in to_markdown(table)


def test_differences_to_any_target_and_to_none_that_is_unknown(filled: Workspace) -> None:
    found = cells(make_table(filled, against="round-00010"), "fpb accuracy")
    assert found["round-00002"].difference is not None
    assert found["round-00002"].difference.value == 0.25
    assert all(
        cell.difference is None for cell in cells(make_table(filled, against="round-00010"), "task loss").values()
    )
    with pytest.raises(UsageError, match="--against round-0010: it has no scores here") as caught:
        make_table(filled, against="round-0010")
    assert caught.value.hint.startswith("Did you mean round-00010")


def test_scores_on_other_data_or_by_another_judge_are_not_compared_and_it_is_said(filled: Workspace) -> None:
    keep(filled, "round-00002", "task", {LOSS: [1.0, 2.0]}, data="other.jsonl")
    keep(filled, "base", "vicuna", {Metric("score", "points"): [1.0]}, judge="gpt-4")
    keep(filled, "round-00002", "vicuna", {Metric("score", "points"): [9.0]}, judge="llama")
    table = make_table(filled)
    for title in ("task loss", "vicuna score"):
        assert cells(table, title)["round-00002"].difference is None
    assert cells(table, "task loss")["alone-1"].difference is not None
    assert table.notes == (
        "task: not all targets were scored on the same data, by the same judge",
        "vicuna: not all targets were scored on the same data, by the same judge",
    )


def test_a_variant_is_a_column_of_its_own(filled: Workspace) -> None:
    keep(filled, "base", "fpb", {ACCURACY: [1]}, variant="limit=1")
    keep(filled, "round-00002", "fpb", {ACCURACY: [0]}, variant="limit=1")
    table = make_table(filled, names=["fpb"])
    titles = [found.title for found in table.columns]
    assert titles == ["fpb accuracy", "fpb weighted_f1", "fpb@limit=1 accuracy"]
    limited = cells(table, "fpb@limit=1 accuracy")
    assert {target: cell.score.value for target, cell in limited.items()} == {"base": 1, "round-00002": 0}
    assert limited["round-00002"].difference is not None
    assert limited["round-00002"].difference.value == -1
    assert cells(table, "fpb accuracy")["base"].score.value == 0.25


def test_details_are_shown_where_they_are_asked_for(filled: Workspace) -> None:
    keep(filled, "base", "demo", {Metric("exact_match"): [1], Metric("margin", "nats", is_detail=True): [2]})
    titles = [[found.title for found in make_table(filled, details=details).columns] for details in (False, True)]
    assert [*titles[0][:1], "demo margin", *titles[0][1:]] == titles[1]
    keep(filled, "base", "demo", {Metric("margin", "nats", is_detail=True): [2]})
    with pytest.raises(NotReadyError, match="there are no scores of demo yet"):
        make_table(filled, names=["demo"])


def test_averages_over_parts_are_compared_item_by_item(workspace: Workspace) -> None:
    parts = {"fpb": 4, "fiqa": 3, "tfns": 2}
    for target, hit in (("base", 0), ("round-00001", 1)):
        for part, size in parts.items():
            keep(workspace, target, part, {ACCURACY: [hit] + [0] * (size - 1)})
        average = sum(hit / size for size in parts.values()) / 3
        keep(workspace, target, "finance", {Metric("Avg:3 accuracy"): [average]})
        (workspace.eval / target / "finance.jsonl").unlink()
    found = cells(make_table(workspace, names=["finance"]), "finance Avg:3 accuracy")
    lead = found["round-00001"].difference
    assert lead is not None
    assert lead.value == pytest.approx((1 / 4 + 1 / 3 + 1 / 2) / 3)
    assert lead.num_items == 9


def test_a_group_or_names_choose_the_columns(filled: Workspace) -> None:
    keep(filled, "base", "hhh", {ACCURACY: [1]})
    assert [found.title for found in make_table(filled, group="safety").columns] == ["hhh accuracy"]
    assert {found.benchmark for found in make_table(filled, names=["finance"]).columns} == {"fpb"}  # one of its parts
    with pytest.raises(UsageError, match="unknown group 'finanse'") as caught:
        make_table(filled, group="finanse")
    assert "finance" in caught.value.hint
    with pytest.raises(UsageError, match="unknown benchmark 'fbp'") as caught:
        make_table(filled, names=["fbp"])
    assert "fpb" in caught.value.hint
    with pytest.raises(NotReadyError, match="there are no scores of medical yet"):
        make_table(filled, group="medical")


def test_a_baseline_that_was_trained_anew_is_left_out_where_it_was_not_scored_again(filled: Workspace) -> None:
    keep(filled, "alone-1", "fpb", {ACCURACY: [1, 1, 1, 1]}, adapter="0" * 64)
    table = make_table(filled)
    assert {*cells(table, "fpb accuracy")} == {"base", "alone-2", "round-00002", "round-00010"}
    assert "alone-1" in cells(table, "task loss")
    assert table.notes == ("alone-1 has been trained anew or removed: its scores on fpb are left out",)
    lead = cells(make_table(filled, against="best-alone"), "fpb accuracy")["round-00002"].difference
    assert lead is not None
    assert lead.value == 0.25  # to alone-2: the old alone-1 would be as good as the round
    shutil.rmtree(filled.baseline("alone-2"))
    assert make_table(filled, names=["fpb"]).targets == ("base", "round-00002", "round-00010")


def test_what_a_reader_must_know_is_noted(filled: Workspace) -> None:
    keep(filled, "base", "vicuna", {}, awaits="judge")
    keep(filled, "base", "hhh", {ACCURACY: [1]}, notes=["8 items; the published set has 221"])
    notes = make_table(filled).notes
    assert notes == ("base, hhh: 8 items; the published set has 221", "base, vicuna: waits for judge")
    assert "- base, vicuna: waits for judge" in to_markdown(make_table(filled))


def test_without_scores_there_is_no_table(workspace: Workspace) -> None:
    with pytest.raises(NotReadyError, match="there are no scores yet"):
        make_table(workspace)
    keep(workspace, "base", "vicuna", {}, awaits="judge")
    with pytest.raises(NotReadyError, match="there are no scores yet"):
        make_table(workspace)


# The files, and what the command prints


def test_markdown_csv_and_json_say_the_same(filled: Workspace) -> None:
    done = fedcli("eval", "table", "--json", cwd=filled.root)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    files = [filled.eval / f"table.{kind}" for kind in ("md", "csv", "json")]
    assert printed.pop("files") == [str(path) for path in files]
    assert printed == json.loads(files[2].read_text())
    rows = printed["scores"]
    assert len(rows) == 5 + 5 + 4
    assert printed["average_rank"] == make_table(filled).average_rank
    in_csv = list(csv.DictReader(io.StringIO(files[1].read_text())))
    assert in_csv == [{name: "" if cell is None else str(cell) for name, cell in row.items()} for row in rows]
    values, _, differences = files[0].read_text().partition("## Difference to base")
    for row in rows:
        line = next(line for line in values.splitlines() if line.startswith(f"| {row['target']} |"))
        assert f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in line
        if row["difference"] is not None:
            line = next(line for line in differences.splitlines() if line.startswith(f"| {row['target']} |"))
            assert f"{row['difference']:+.3f} [{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]" in line
    assert "| round-00010 | " in values
    assert "|  | 2.25 |" in values  # round 10 has no loss


def test_the_command_prints_every_value_and_names_its_files_by_what_was_asked(filled: Workspace) -> None:
    done = fedcli("eval", "table", "fpb", "--group", "finance", "--against", "best-alone", cwd=filled.root)
    assert done.returncode == 0, done.stderr
    printed = " ".join(done.stdout.split())
    for target in ("base", "alone-1", "alone-2", "round-00002", "round-00010"):
        assert target in printed
    assert "difference to best-alone" in printed
    assert "0.750" in printed
    assert "task" not in printed
    assert "table-fpb-group-finance.md" in done.stderr
    assert (filled.eval / "table-fpb-group-finance.csv").is_file()
    assert make_table(filled).targets  # tables beside the scores are no scores


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["table", "fbp"], 2, "unknown benchmark 'fbp'"),
        (["table", "--group", "finances"], 2, "unknown group 'finances'"),
        (["table", "--against", "round-3"], 2, "--against round-3"),
        (["table", "medqa"], 6, "there are no scores of medqa yet"),
        (["best", "--metric", "fpb.acuracy"], 2, "no round has been scored in 'fpb.acuracy'"),
        (["best"], 2, "no metric is named\n  Name one: fedcli eval best demo"),
        (["best", "fpb", "--metric", "mmlu"], 2, "two metrics are named, fpb and mmlu"),
    ],
)
def test_what_is_not_there_is_told(filled: Workspace, arguments: list[str], code: int, message: str) -> None:
    done = fedcli("eval", *arguments, cwd=filled.root)
    assert done.returncode == code
    assert message in done.stderr
    assert done.stdout == ""


# The best round


def test_the_best_round_has_the_highest_value_or_the_lowest_loss(filled: Workspace) -> None:
    keep(filled, "round-00010", "task", {LOSS: [0.5, 0.5]})
    keep(filled, "client-1-round-00011", "fpb", {ACCURACY: [1, 1, 1, 1]})
    assert [number for number, _ in best_rounds(filled, "fpb")] == [2, 10]
    assert [(number, entry.value) for number, entry in best_rounds(filled, "task.loss")] == [(10, 0.5), (2, 1.5)]
    assert best_rounds(filled, "fpb") == best_rounds(filled, "fpb.accuracy")
    done = fedcli("eval", "best", "--metric", "task", "--json", cwd=filled.root)
    found = json.loads(done.stdout)
    assert (found["metric"], found["best"]) == ("task", 10)
    assert [entry["round"] for entry in found["rounds"]] == [10, 2]
    done = fedcli("eval", "best", "fpb", cwd=filled.root)
    assert done.stdout == "round 2: fpb 1.0000 [1.0000, 1.0000], of 2 rounds\n"


def test_of_equal_rounds_the_earlier_is_best_and_the_first_metric_is_the_benchmarks_own(filled: Workspace) -> None:
    keep(filled, "round-00010", "fpb", {ACCURACY: [1, 1, 1, 1], Metric("a"): [0]})
    assert [number for number, _ in best_rounds(filled, "fpb")] == [2, 10]
    keep(filled, "round-00010", "fpb", {ACCURACY: [1, 1]}, variant="limit=2")
    assert [number for number, _ in best_rounds(filled, "fpb@limit=2")] == [10]


def test_an_unknown_metric_is_an_error_with_near_matches(filled: Workspace) -> None:
    for metric, near in (("fpb.acuracy", "fpb.accuracy"), ("tasks", "task"), ("fpb.weighted-f1", "fpb.weighted_f1")):
        with pytest.raises(UsageError) as caught:
            best_rounds(filled, metric)
        assert near in caught.value.hint


def test_without_scored_rounds_there_is_no_best(workspace: Workspace) -> None:
    keep(workspace, "base", "fpb", {ACCURACY: BASE})
    with pytest.raises(NotReadyError, match="no round has been scored yet") as caught:
        best_rounds(workspace, "fpb")
    assert "eval.every" in caught.value.hint
    assert isinstance(caught.value, FedError)
    assert save_table(workspace, make_table(workspace), "table")
