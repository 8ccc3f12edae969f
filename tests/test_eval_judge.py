"""mt-bench as a user runs it: real fedcli processes, and a judge over HTTP that has bad days."""

import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from support.judge_server import JudgeServer
from support.processes import ENVIRONMENT, command, fedcli
from support.scripted import ROWS

SHORT = ("--max-new-tokens", 8, "--data", ROWS)


def questions() -> list[dict]:
    return [json.loads(line) for line in (ROWS / "mt-bench/question.jsonl").read_text().splitlines()]


def rate(body: dict) -> str:
    """Give every first turn 8, and every second one 4."""
    is_second = any(question["turns"][1] in body["messages"][-1]["content"] for question in questions())
    return "Rating: [[4]]" if is_second else "It is good. Rating: [[8]]"


def judged(folder: Path, server: JudgeServer, *more: object) -> subprocess.CompletedProcess[str]:
    return fedcli(
        *("eval", "mt-bench", "--base", *SHORT, "--judge-model", "judge-1", "--judge-url", server.url, "--json", *more),
        cwd=folder,
    )


@pytest.mark.slow
def test_answers_wait_for_a_judge_and_a_rerun_asks_it_nothing(small: Path) -> None:
    num = 2 * len(questions())
    waiting = fedcli("eval", "mt-bench", "--base", *SHORT, cwd=small)
    assert waiting.returncode == 0, waiting.stderr
    assert f"base: {num} answers" in waiting.stderr
    assert "--judge-model" in waiting.stderr
    record = json.loads((small / "eval/base/mt-bench@max-new-tokens=8.json").read_text())
    assert (record["scores"], record["awaits"], record["num_unscored"]) == ({}, "judge", num)
    with JudgeServer(rate) as server:
        done = judged(small, server, "--yes")
        assert done.returncode == 0, done.stderr
        (record,) = json.loads(done.stdout)["scores"]
        values = {name: entry["value"] for name, entry in record["scores"].items() if not entry["is_detail"]}
        assert values == {"MT-1": 8, "MT-2": 4, "MT-Avg": 6}
        assert record["settings"]["judge"] == "judge-1"
        assert len(server.log) == num
        assert judged(small, server, "--yes").returncode == 0
        assert len(server.log) == num
    without = fedcli("eval", "mt-bench", "--base", *SHORT, "--json", cwd=small)  # it takes no score away
    (same,) = json.loads(without.stdout)["scores"]
    assert (same["scores"], same["awaits"]) == (record["scores"], None)
    items = [
        json.loads(line) for line in (small / "eval/base/mt-bench@max-new-tokens=8.jsonl").read_text().splitlines()
    ]
    assert [item["item"] for item in items] == [f"{q['question_id']}-{turn}" for q in questions() for turn in (1, 2)]
    shown = fedcli("eval", "table", "mt-bench", cwd=small)
    assert "MT-Avg" in shown.stdout
    assert "6.000" in shown.stdout


@pytest.mark.slow
def test_a_judge_that_is_killed_half_way_is_asked_nothing_twice(small: Path) -> None:
    """429, 500, garbage and a hang come first; the command dies by kill -9 while replies hang, and is run again."""
    num = 2 * len(questions())
    fine = num // 2
    script = ["429", "500", "not JSON", "no choices", *["well"] * fine]
    with JudgeServer(rate, script, then="hang") as server:
        running = subprocess.Popen(
            command("eval", "mt-bench", "--base", *SHORT, "--judge-model", "j", "--judge-url", server.url, "--yes"),
            cwd=small,
            env=ENVIRONMENT,
            stderr=subprocess.DEVNULL,
        )
        log = small / "eval/base/mt-bench.judgments.jsonl"
        server.wait(fine, "well")
        while not log.exists() or len(log.read_bytes().splitlines()) < fine:
            assert running.poll() is None
        running.kill()
        running.wait(60)
        first = Counter(server.asked())
        assert sum(first.values()) == fine
        server.then = "well"
        done = fedcli(
            *("eval", "mt-bench", "--base", *SHORT, "--judge-model", "j", "--judge-url", server.url, "--yes", "--json"),
            cwd=small,
        )
        assert done.returncode == 0, done.stderr
        assert set(Counter(server.asked()).values()) == {1}
        assert len(server.asked()) == num
    (record,) = json.loads(done.stdout)["scores"]
    assert record["num_unscored"] == 0
    assert record["scores"]["MT-Avg"]["value"] == 6


def test_a_pair_of_models_is_compared_in_both_orders(small: Path) -> None:
    assert fedcli("eval", "mt-bench", "--base", "--round", 0, *SHORT, cwd=small).returncode == 0
    with JudgeServer(lambda body: "[[A]]") as server:
        done = fedcli(
            *("eval", "mt-bench-pairwise", "--round", 0, "--baseline", "base", *SHORT),
            *("--judge-model", "j", "--judge-url", server.url, "--yes", "--json"),
            cwd=small,
        )
        assert done.returncode == 0, done.stderr
        assert len(server.log) == 2 * len(questions())  # both say the same, so both orders are one question
    (record,) = json.loads(done.stdout)["scores"]
    values = {name: entry["value"] for name, entry in record["scores"].items()}
    assert values == {"win_rate": 0.5, "win": 0, "tie": 1, "loss": 0}  # whoever is shown first: a tie


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--judge-model", "gpt-4"], 8, ["OPENAI_API_KEY", "is not set"]),
        (["--judge-model", "j", "--judge-url", "http://127.0.0.1:9/v1", "--yes"], 8, ["127.0.0.1:9", "reached"]),
        (["--judge-model", "j", "--judge-url", "ftp://here"], 2, ["ftp://here", "no URL"]),
    ],
)
def test_a_judge_that_cannot_be_asked_is_one_clear_error(
    small: Path, arguments: list[str], code: int, words: list[str]
) -> None:
    done = fedcli("eval", "mt-bench", "--base", *SHORT, *arguments, cwd=small)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("fedcli: error") == 1
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_the_cost_is_asked_for_before_the_first_judgment(small: Path) -> None:
    with JudgeServer(rate) as server:
        refused = judged(small, server)
        assert refused.returncode == 2
        assert f"{2 * len(questions())} questions" in refused.stderr
        assert "--yes" in refused.stderr
        assert server.log == []
    assert (small / "eval/base/mt-bench.answers.jsonl").stat().st_size > 0  # the answers are kept


def test_a_folder_with_a_model_judges_too(small: Path) -> None:
    """The tiny model says nothing that parses: every judgment is tried twice, and none is scored."""
    base = Path(__file__).parents[1] / "fedcli/model/builtin/tiny"
    done = fedcli("eval", "vicuna", "--base", *SHORT, "--limit", 1, "--judge-model", base, "--json", "--yes", cwd=small)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)["scores"]
    assert (record["scores"], record["awaits"], record["num_unscored"]) == ({}, None, 1)
    assert record["settings"]["judge"].startswith("tiny-")


def test_a_model_behind_an_endpoint_is_scored(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "OPENAI_API_KEY", "unused")
    with JudgeServer(lambda body: "I'm sorry, but no.") as server:
        line = ("eval", "advbench", "--api", "gpt-9", "--api-url", server.url, "--data", ROWS, "--json")
        done = fedcli(*line, cwd=small)
        assert done.returncode == 0, done.stderr
        (record,) = json.loads(done.stdout)["scores"]
        assert record["target"].startswith("api-gpt-9-")  # and what tells this endpoint from others
        assert record["scores"]["refusal_rate"]["value"] == 1
        assert fedcli(*line, cwd=small).returncode == 0
        assert len(server.log) == record["num_items"]
        likelihood = fedcli("eval", "hhh", "--api", "gpt-9", "--api-url", server.url, "--data", ROWS, cwd=small)
    assert likelihood.returncode == 2
    assert "likelihoods" in likelihood.stderr
