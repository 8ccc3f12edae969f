"""MT-Bench and the Vicuna bench: what is asked, how replies of judges are read, and what becomes of them."""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.judge_server import JudgeServer
from support.scripted import ROWS, Scripted, session

from fedcli.errors import ConfigError, RequirementError, UsageError
from fedcli.eval.benchmark import Benchmark, ItemScore, Metric, Options, Session
from fedcli.eval.benchmarks import vicuna
from fedcli.eval.benchmarks.mt_bench import MT_BENCH, MT_BENCH_PAIRWISE, parse_rating, parse_verdict
from fedcli.eval.endpoint import Endpoint
from fedcli.eval.judge import Judge
from fedcli.eval.remembered import Usage
from fedcli.eval.requests import Generation
from fedcli.tasks.conversation import Turn
from fedcli.workspace.scores import AnswerLog

DATA = Path(os.environ.get("FEDCLI_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")

REPLIES: list[tuple[str, float | None]] = [
    ("[[7]]", 7),
    ("[[7.5]]", 7.5),
    ("Rating: [[10]]", 10),
    ("Rating: [[1]]", 1),
    ("The answer is correct and concise. Rating: [[8]]", 8),
    ("The assistant followed the instruction.\n\nRating: [[9]]", 9),
    ("The response is helpful, relevant and accurate.\n\n**Rating: [[9]]**", 9),
    ("Rating:[[6]]", 6),
    ("rating: [[4]].", 4),
    ("I would rate this [[3]] out of 10.", 3),
    ("My rating is [[2]]/10", 2),
    ("[[5]]\n\nThe answer lacks depth.", 5),
    ("Explanation: it is wrong.\nRating: [[1.0]]", 1),
    ("Rating: [[8.25]]", 8.25),
    ("Rating: [[10.0]]", 10),
    ("Rating: [[7.]]", 7),
    ("Rating: [[08]]", 8),
    ("Bewertung: [[6]]", 6),
    ("评分 [[9]]", 9),
    ("The reference says 5 cm, and so does the answer. Rating: [[10]]", 10),
    ("`[[4]]`", 4),
    ('"[[4]]"', 4),
    ("It cites [1] and [2], which is good. Rating: [[6]]", 6),
    ("x = a[0]; the code fails for a[3]. Rating: [[2]]", 2),
    ("The matrix [[a, b]] is right. Rating: [[9]]", 9),
    ("Rating: [7]", 7),
    ("Rating: [7.5]", 7.5),
    ("I give [10].", 10),
    ("Rating: [[7]", 7),
    ("Rating: [7]]", 7),
    ("First I thought [[5]], on reflection [[7]].", 5),
    ("Answer A: [[6]]. Answer B: [[6]].", 6),
    ("Accuracy [[8]], depth [[4]], overall [[6]]", 8),
    ("Rating: [6] or rather [[7]]", 7),
    ("", None),
    ("The answer is good.", None),
    ("Rating: 7", None),
    ("Rating: 7/10", None),
    ("Rating: [[7/10]]", None),
    ("Rating: [[rating]]", None),
    ("Rating: [[seven]]", None),
    ("Rating: [[N/A]]", None),
    ("Rating: [[ 7 ]]", None),
    ("Rating: [[7, 8]]", None),
    ("Rating: [[-3]]", None),
    ("Rating: [[0]]", None),
    ("Rating: [[11]]", None),
    ("Rating: [[100]]", None),
    ("Rating: [[0.5]]", None),
    ("I'm sorry, but I can't rate this content.", None),
    ("Rating: [[", None),
    ("Rating: ((7))", None),
]
"""What judges say, and the rating in it: FastChat's, but for None where FastChat has -1 or what no scale has."""


class ScriptedJudge:
    """The engine of a judge whose replies a test writes."""

    def __init__(self, reply: Callable[[str], str]) -> None:
        self.usage = Usage()
        self.asked: list[tuple[str, str]] = []
        self._reply = reply

    def generate(self, requests: list[Generation], on_answer: Callable[[int, str], None]) -> None:
        for index, request in enumerate(requests):
            system, user = request.prompt
            self.asked.append((system.text, user.text))
            on_answer(index, self._reply(user.text))

    def log_likelihoods(self, *_: object) -> None:
        raise AssertionError


@dataclass(frozen=True)
class WithBaseline(Session):
    baseline_answers: Mapping[str, str] | None = None


def judge(engine: ScriptedJudge, tmp_path: Path) -> Judge:
    return Judge("judge", lambda: engine, AnswerLog(tmp_path / "judgments.jsonl"))


def run(benchmark: Benchmark, engine: ScriptedJudge, tmp_path: Path, **settings) -> list[ItemScore]:
    return benchmark.run(session(benchmark, Scripted(echo), judge=judge(engine, tmp_path), **settings))


def echo(request: Generation) -> str:
    return f" Answer to {request.prompt[-1].text} \n"


def means(benchmark: Benchmark, items: list[ItemScore]) -> dict[str, float]:
    """Return the mean of each metric's marks, where it has some."""
    marks = {metric.name: [item.marks[metric.name] for item in items if metric.name in item.marks] for metric in
             benchmark.metrics}  # fmt: skip
    return {name: sum(values) / len(values) for name, values in marks.items() if values}


def is_second(text: str) -> bool:
    return text.startswith(("Rate the second", "Which is better in its second"))


@pytest.mark.parametrize(("reply", "rating"), REPLIES)
def test_a_rating_is_read_as_fastchat_reads_it(reply: str, rating: float | None) -> None:
    assert parse_rating(reply) == rating


def test_there_are_fifty_replies() -> None:
    assert len({reply for reply, _ in REPLIES}) >= 50


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("[[A]]", "A"), ("My final verdict is: [[B]].", "B"), ("Both are good. [[C]]", "C"),
        ("[[A]] as said: [[A]]", "A"),
        ("", None), ("[A]", None), ("[[D]]", None), ("[[a]]", None), ("A is better", None), ("[[A]] or [[B]]", None),
    ],
)  # fmt: skip
def test_a_verdict_is_read_where_there_is_one_only(reply: str, verdict: str | None) -> None:
    assert parse_verdict(reply) == verdict


def test_both_turns_are_asked_at_the_temperature_of_their_category() -> None:
    model = Scripted(echo)
    items = MT_BENCH.run(session(MT_BENCH, model))
    assert [(request.temperature, request.max_new_tokens) for request in model.asked] == [
        (0.7, 1024), (0.0, 1024), (0.0, 1024), (0.1, 1024), (0.7, 1024), (0.0, 1024), (0.0, 1024), (0.1, 1024),
    ]  # fmt: skip
    assert model.asked[0].prompt == (Turn("user", "Write two lines about a lighthouse."),)
    assert model.asked[4].prompt == (
        Turn("user", "Write two lines about a lighthouse."),
        Turn("assistant", "Answer to Write two lines about a lighthouse."),
        Turn("user", "Now make them rhyme."),
    )
    assert [item.item for item in items] == ["81-1", "81-2", "111-1", "111-2", "121-1", "121-2", "151-1", "151-2"]


def test_without_a_judge_answers_are_kept_and_nothing_is_scored() -> None:
    for benchmark, first in ((MT_BENCH, "Answer to Write two lines about a lighthouse."),
                             (MT_BENCH_PAIRWISE, "Answer to Write two lines about a lighthouse."),
                             (vicuna.BENCHMARK, "Answer to How can I fall asleep sooner?")):  # fmt: skip
        items = benchmark.run(session(benchmark, Scripted(echo)))
        assert all(item.marks == {} for item in items)
        assert items[0].record["answer"] == first
        assert len(items) == (4 if benchmark is vicuna.BENCHMARK else 8)


def test_options_replace_the_settings() -> None:
    for benchmark in (MT_BENCH, vicuna.BENCHMARK):
        model = Scripted(echo)
        options = Options(limit=2, temperature=0.3, max_new_tokens=9)
        items = benchmark.run(session(benchmark, model, options=options))
        assert {(request.temperature, request.max_new_tokens) for request in model.asked} == {(0.3, 9)}
        assert len(items) == len(model.asked) == (4 if benchmark is MT_BENCH else 2)


def test_means_are_of_turns_of_all_and_of_categories(tmp_path: Path) -> None:
    def rate(text: str) -> str:
        return "[[8]]" if "lighthouse" in text and not is_second(text) else "[[3.5]]" if is_second(text) else "[[2]]"

    items = run(MT_BENCH, ScriptedJudge(rate), tmp_path)
    assert means(MT_BENCH, items) == {
        "MT-1": (8 + 2 + 2 + 2) / 4,
        "MT-2": 3.5,
        "MT-Avg": (8 + 3 * 2 + 4 * 3.5) / 8,
        "writing": 5.75,
        "math": 2.75,
        "coding": 2.75,
        "humanities": 2.75,
    }
    assert items[0].record == {
        "category": "writing",
        "question": "Write two lines about a lighthouse.",
        "answer": "Answer to Write two lines about a lighthouse.",
        "judgment": "[[8]]",
    }


def test_the_judge_sees_the_publishers_prompt_and_the_reference_where_there_is_one(tmp_path: Path) -> None:
    engine = ScriptedJudge(lambda text: "[[5]]")
    run(MT_BENCH, engine, tmp_path)
    assert {system for system, _ in engine.asked} == {"You judge answers."}
    texts = [text for _, text in engine.asked]
    assert texts[0] == (
        'Rate the answer from 1 to 10, as "[[rating]]".\n\n[Question]\nWrite two lines about a lighthouse.\n\n'
        "[Answer]\nAnswer to Write two lines about a lighthouse."
    )
    assert texts[3] == (
        "Rate the second answer.\n\n[Reference]\nA rectangle is 3 cm by 4 cm. How long is its diagonal?\n"
        "The diagonal is 5 cm, by Pythagoras.\nAnd its area?\nThe area is 12 square cm.\n\n[Answers]\n"
        "Answer to A rectangle is 3 cm by 4 cm. How long is its diagonal?\nAnswer to And its area?"
    )
    assert "returns {} for an empty list" in texts[4], "braces in a question are text"
    assert ["[Reference]" in text for text in texts] == [False, False, True, True, True, True, False, False]


def test_what_does_not_parse_twice_is_left_out_of_the_mean(tmp_path: Path) -> None:
    engine = ScriptedJudge(lambda text: "no idea" if "lighthouse" in text else "[[4]]")
    items = run(MT_BENCH, engine, tmp_path)
    assert means(MT_BENCH, items)["MT-Avg"] == 4
    assert [item.item for item in items if not item.marks] == ["81-1", "81-2"]
    assert items[0].record["judgments"] == ["no idea", "no idea"]
    assert len(engine.asked) == 10


def test_vicuna_is_rated_without_references_at_temperature_0_7(tmp_path: Path) -> None:
    model, engine = Scripted(echo), ScriptedJudge(lambda text: "Rating: [[9]]" if "C++" in text else "[[6]]")
    benchmark = vicuna.BENCHMARK
    items = benchmark.run(session(benchmark, model, judge=judge(engine, tmp_path)))
    assert {(request.temperature, request.max_new_tokens) for request in model.asked} == {(0.7, 2048)}
    assert means(benchmark, items) == {"Vicuna": 6.75}
    assert [item.item for item in items] == ["1", "31", "61", "68"]
    assert all("[Reference]" not in text for _, text in engine.asked)
    broken = run(benchmark, ScriptedJudge(lambda text: "?"), tmp_path / "..")
    assert [item.marks for item in broken] == [{}] * 4


# Pairwise


def compared(tmp_path: Path, reply: Callable[[str], str], baseline: Mapping[str, str] | None) -> list[ItemScore]:
    plain = session(MT_BENCH_PAIRWISE, Scripted(echo), judge=judge(ScriptedJudge(reply), tmp_path))
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    fields["baseline_answers"] = baseline
    return MT_BENCH_PAIRWISE.run(WithBaseline(**fields))


BASELINE = {f"{question}-{turn}": f"theirs {question}-{turn}" for question in (81, 111, 121, 151) for turn in (1, 2)}


def test_only_who_wins_in_both_orders_wins(tmp_path: Path) -> None:
    def reply(text: str) -> str:
        mine_first = text.index("Answer to") < text.index("theirs")
        if "lighthouse" in text:
            return "[[A]]" if mine_first else "[[B]]"  # wins
        if "rectangle" in text:
            return "[[B]]" if mine_first else "[[A]]"  # loses
        if "Python" in text:
            return "[[A]]"  # whoever is first
        return "[[C]]" if mine_first else "[[A]]"  # a tie, then a loss

    items = compared(tmp_path, reply, BASELINE)
    assert [item.marks["win_rate"] for item in items] == [1, 1, 0, 0, 0.5, 0.5, 0.5, 0.5]
    assert means(MT_BENCH_PAIRWISE, items) == {"win_rate": 0.5, "win": 0.25, "tie": 0.5, "loss": 0.25}
    assert items[1].record["baseline"] == "theirs 81-2"
    assert items[4].record["shown second"] == {"judgment": "[[A]]"}


def test_a_comparison_without_a_verdict_in_one_order_is_left_out(tmp_path: Path) -> None:
    items = compared(
        tmp_path, lambda text: "?" if text.index("theirs") < text.index("Answer to") else "[[A]]", BASELINE
    )
    assert [item.marks for item in items] == [{}] * 8


@pytest.mark.parametrize("baseline", [None, {}, {"81-1": "theirs"}])
def test_a_comparison_needs_the_answers_of_the_other(tmp_path: Path, baseline: Mapping[str, str] | None) -> None:
    with pytest.raises(UsageError, match=r"there is none to '81-[12]'"):
        compared(tmp_path, lambda text: "[[A]]", baseline)


# Files


def copy(tmp_path: Path, benchmark: str = "mt-bench") -> Path:
    """Return a copy of the tests' own files."""
    for file in (ROWS / benchmark).rglob("*.jsonl"):
        there = tmp_path / "data" / file.relative_to(ROWS / benchmark)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(file.read_bytes())
    return tmp_path / "data"


@pytest.mark.parametrize(
    "row",
    [
        {"category": "stem", "turns": ["a", "b"]},
        {"question_id": 1, "turns": ["a", "b"]},
        {"question_id": 1, "category": "stem", "turns": ["a"]},
        {"question_id": 1, "category": "stem", "turns": "ab"},
        {"question_id": 1, "category": "stem", "turns": ["a", 2]},
        {"question_id": 81, "category": "stem", "turns": ["a", "b"]},
    ],
)
def test_a_row_that_is_no_question_is_named_with_its_line(tmp_path: Path, row: dict) -> None:
    folder = copy(tmp_path)
    with (folder / "question.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=r"question\.jsonl, line 5"):
        MT_BENCH.run(session(MT_BENCH, Scripted(), folder))


@pytest.mark.parametrize("name", ["judge_prompts.jsonl", "reference_answer/gpt-4.jsonl"])
def test_files_of_the_judge_that_are_missing_show_before_anything_is_generated(tmp_path: Path, name: str) -> None:
    folder, model = copy(tmp_path), Scripted()
    (folder / name).unlink()
    with pytest.raises(RequirementError, match=name) as caught:
        MT_BENCH.run(session(MT_BENCH, model, folder, judge=judge(ScriptedJudge(lambda text: "[[5]]"), tmp_path)))
    assert "FastChat" in caught.value.hint
    assert model.asked == []
    assert len(MT_BENCH.run(session(MT_BENCH, model, folder))) == 8


@pytest.mark.parametrize(
    ("name", "old", "new", "named"),
    [
        ("judge_prompts.jsonl", '"single-v1"', '"single-v9"', "single-v1"),
        ("judge_prompts.jsonl", "{answer}", "{anser}", "anser"),
        ("judge_prompts.jsonl", "{answer}", "{answer", "line 5"),
        ("judge_prompts.jsonl", "system_prompt", "system", "system_prompt"),
        ("reference_answer/gpt-4.jsonl", '"question_id": 121', '"question_id": 122', "question 121"),
        ("reference_answer/gpt-4.jsonl", "choices", "chioces", "line 1"),
    ],
)  # fmt: skip
def test_files_that_are_not_fastchats_are_named(tmp_path: Path, name: str, old: str, new: str, named: str) -> None:
    folder = copy(tmp_path)
    (folder / name).write_text((folder / name).read_text().replace(old, new))
    with pytest.raises(ConfigError, match=named):
        MT_BENCH.run(session(MT_BENCH, Scripted(), folder, judge=judge(ScriptedJudge(lambda text: "[[5]]"), tmp_path)))


@pytest.mark.parametrize("inside", ["data", "data/mt_bench"])
def test_judge_prompts_are_found_where_fastchat_has_them(tmp_path: Path, inside: str) -> None:
    folder = copy(tmp_path)
    (folder / "mt_bench").mkdir()
    (folder / "question.jsonl").rename(folder / "mt_bench/question.jsonl")
    (folder / "reference_answer").rename(folder / "mt_bench/reference_answer")
    engine = ScriptedJudge(lambda text: "[[5]]")
    items = MT_BENCH.run(session(MT_BENCH, Scripted(), tmp_path / inside, judge=judge(engine, tmp_path)))
    assert means(MT_BENCH, items)["MT-Avg"] == 5


@pytest.mark.skipif(not DATA.is_dir(), reason="no folder of public rows ($FEDCLI_TEST_DATA)")
def test_fastchats_own_files_are_asked_whole(tmp_path: Path) -> None:
    for benchmark, num_items, num_references in ((MT_BENCH, 160, 60), (vicuna.BENCHMARK, 80, 0)):
        engine = ScriptedJudge(lambda text: "Rating: [[6]]")
        found = benchmark.run(session(benchmark, Scripted(echo), DATA, judge=judge(engine, tmp_path)))
        assert len(found) == benchmark.size == num_items
        assert sum("[The Start of Reference Answer]" in text or "Reference answer:" in text
                   for _, text in engine.asked) == num_references  # fmt: skip
        assert set(means(benchmark, found).values()) == {6}
        assert set(means(benchmark, found)) == {metric.name for metric in benchmark.metrics}
    others = {item.item: "theirs" for item in MT_BENCH.run(session(MT_BENCH, Scripted(echo), DATA))}
    plain = session(MT_BENCH_PAIRWISE, Scripted(echo), DATA, judge=judge(ScriptedJudge(lambda text: "[[B]]"), tmp_path))
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    items = MT_BENCH_PAIRWISE.run(WithBaseline(**fields | {"baseline_answers": others}))
    assert means(MT_BENCH_PAIRWISE, items) == {"win_rate": 0.5, "win": 0, "tie": 1, "loss": 0}


# Over HTTP


def test_mt_bench_end_to_end_with_a_judge_that_falters(tmp_path: Path) -> None:
    script = ["429", "well", "500", "hang", "not JSON", "well", "no choices", "429, wait 1.5 s"]

    def reply(body: dict) -> str:
        text = body["messages"][-1]["content"]
        if "lighthouse" in text and not is_second(text) and body["temperature"] == 0:
            return "What a nice answer!"
        return "Rating: [[7]]" if is_second(text) else "Rating: [[9.5]]"

    with JudgeServer(reply, script) as server:
        for _ in range(2):
            endpoint = Endpoint("gpt-4", server.url, concurrency=4, timeout=3)
            memory = AnswerLog(tmp_path / "judgments.jsonl")
            model = Scripted(echo)
            items = MT_BENCH.run(session(MT_BENCH, model, judge=Judge("gpt-4", endpoint.reach, memory)))
            found = means(MT_BENCH, items)
            assert (found["MT-1"], found["MT-2"], found["MT-Avg"]) == (9.5, 7, 8.25)
    assert Counter(asked.outcome for asked in server.log) == Counter([*script, *["well"] * 7])
    answered = Counter((asked.text, asked.body["temperature"]) for asked in server.log if asked.outcome == "well")
    assert len(answered) == 9
    assert set(answered.values()) == {1}
    assert {temperature for _, temperature in answered} == {0.0, 0.7}


def test_metrics_say_their_unit_and_direction() -> None:
    assert MT_BENCH.metrics[:3] == (Metric("MT-1", "points"), Metric("MT-2", "points"), Metric("MT-Avg", "points"))
    assert vicuna.BENCHMARK.metrics == (Metric("Vicuna", "points"),)
