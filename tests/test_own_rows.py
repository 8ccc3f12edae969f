"""Held-out rows of one's own: their loss and their pairs, in the forms that training rows may have."""

import json
from pathlib import Path

import pytest
from support.processes import Run, runner
from support.scripted import Scripted, session

from fedcli.errors import ConfigError
from fedcli.eval.benchmark import ItemScore, Options
from fedcli.eval.benchmarks.own_rows import BENCHMARK
from fedcli.eval.requests import Likelihood
from fedcli.eval.statistics import score

CHAT = {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d e"}]}


def run(folder: Path, log_prob: dict[str, float], options: Options | None = None) -> list[ItemScore]:
    assert BENCHMARK.run is not None
    model = Scripted(log_prob=lambda request: log_prob.get(request.continuation, 0.0))
    return BENCHMARK.run(session(BENCHMARK, model, folder, options=options))


def values(items: list[ItemScore]) -> dict[str, float]:
    found = {}
    for metric in BENCHMARK.metrics:
        if marks := {item.item: item.marks[metric.name] for item in items if metric.name in item.marks}:
            found[metric.name] = score(metric, [marks]).value
    return found


def test_the_loss_is_of_all_tokens_and_a_row_without_a_response_has_no_score(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,answer\none,x y z\ntwo,v\nthree,\n")
    items = run(tmp_path, {"x y z": -6.0, "v": -0.5})
    assert values(items) == {"loss": pytest.approx(6.5 / 4), "exact_match": 0.0}
    assert [item.record for item in items if not item.marks] == [{"left_out": "empty response"}]
    assert len(run(tmp_path, {}, Options(limit=1))) == 1


def test_rows_may_be_chats_and_the_last_response_is_scored(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(CHAT) + "\n")
    assert values(run(tmp_path, {"c d e": -3.0}))["loss"] == 1.0


def test_of_pairs_the_likelier_response_counts(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": name, "rejected": "worse"} for name in ("one", "two", "three", "four")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = values(run(tmp_path, {"one": -1.0, "two": -9.0, "three": -2.0, "four": -3.0, "worse": -4.0}))
    assert found == {"preference_accuracy": 0.75, "margin": pytest.approx((3 - 5 + 2 + 1) / 4)}


def test_rows_that_cannot_be_used_are_an_error_with_the_cure(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "a"}\n')
    with pytest.raises(ConfigError, match="none of 1 rows is usable"):
        run(tmp_path, {})


@pytest.mark.slow
def test_a_workspace_of_own_rows_says_how_they_are_scored_and_scores_them(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fedcli: Run = runner(capsys)
    monkeypatch.chdir(small)
    for path in (small / "data").glob("held-out-*"):
        path.unlink()
    code, _, err = fedcli("eval", "demo")
    assert (code, "`fedcli eval rows --data FILE`" in err) == (8, True)
    code, _, err = fedcli("eval", "rows")
    assert (code, "--data FILE" in err, "docs/EVALUATION.md" in err) == (8, True, True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/rows.jsonl").write_text('{"instruction": "Say one.", "output": "One."}\n{"instruction": "x"}\n')
    code, out, err = fedcli("eval", "rows", "--base", "--data", tmp_path / "mine")
    assert (code, "rows loss" in out) == (0, True)
    assert "base, rows: rows that are left out: 1 malformed" in err


def test_the_question_is_that_of_the_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Say one.", "output": "One."}\n')
    model = Scripted()
    assert BENCHMARK.run is not None
    (item,) = BENCHMARK.run(session(BENCHMARK, model, tmp_path))
    (asked,) = model.asked
    assert isinstance(asked, Likelihood)
    assert (asked.prompt[0].content, asked.continuation) == ("Say one.", "One.")
    assert item.record["expected"] == "One."
