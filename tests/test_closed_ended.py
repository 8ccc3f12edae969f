"""The closed-ended benchmarks: publishers' rows become lm-eval's, and hand-made answers get the known scores."""

import csv
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.scripted import ROWS, Scripted, session

from fedcli.errors import ConfigError, RequirementError
from fedcli.eval.benchmark import Benchmark, ItemScore, Options
from fedcli.eval.benchmarks import lm_eval_tasks as table
from fedcli.eval.benchmarks.lm_eval_names import BBH_TASKS, MMLU_GROUPS
from fedcli.eval.benchmarks.local_rows import boxed
from fedcli.eval.requests import Likelihood

DATA = Path(os.environ.get("FEDCLI_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")


def real(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not here; FEDCLI_TEST_DATA names its folder")
    return DATA


def says(benchmark: Benchmark, text: str, *, item: int = 0, folder: Path | None = None) -> dict[str, object]:
    """Return the marks of one item under one answer."""
    return dict(benchmark.run(session(benchmark, Scripted(lambda request: text), folder))[item].marks)


def chooses(benchmark: Benchmark, right: Callable[[Likelihood], bool], folder: Path | None = None) -> list[ItemScore]:
    """Return the items under a model for which the chosen continuations are the likelier ones."""
    model = Scripted(log_prob=lambda request: 0.0 if right(request) else -1.0)
    return benchmark.run(session(benchmark, model, folder))


def accuracy(items: list[ItemScore], metric: str = "accuracy") -> float:
    marks = [item.marks[metric] for item in items if metric in item.marks]
    return sum(marks) / len(marks)


def rewritten(tmp_path: Path, benchmark: str, file: str, change: Callable[[str], str]) -> Path:
    """Return a copy of a benchmark's rows with one file changed."""
    folder = Path(shutil.copytree(ROWS / benchmark, tmp_path / benchmark))
    path = folder / file
    path.write_text(change(path.read_text()))
    return tmp_path


GSM8K = [
    # answer, accuracy (the last number), strict (the number behind "The answer is")
    (0, "She sells 9, and 9 * 2 = 18. The answer is 18.", 1, 1),
    (0, " 18", 1, 0),
    (0, "#### 18", 1, 0),
    (0, "She gets $18.", 1, 0),
    (0, "The answer is 18.0.", 0, 0),
    (0, "The answer is 18 dollars, of 20.", 0, 1),
    (0, "The answer is 19.", 0, 0),
    (0, "The answer is eighteen.", 0, 0),
    (0, "", 0, 0),
    (1, "The answer is 1,800.", 1, 1),
    (1, "The answer is 1800.", 1, 1),
    (1, "The answer is $1,800.", 1, 0),
    (3, "The answer is -6.", 1, 1),
    (3, "The answer is 6.", 0, 0),
]


@pytest.mark.parametrize(("item", "answer", "loose", "strict"), GSM8K)
def test_gsm8k_wants_the_exact_number(item: int, answer: str, loose: float, strict: float) -> None:
    assert says(table.GSM8K, answer, item=item) == {"accuracy": loose, "accuracy-strict": strict}


MATH = [
    # answer to a question whose answer is \frac{1}{4}: accuracy, and lm-eval's own, which looks for dollar signs only
    ("So it is $\\boxed{\\frac{1}{4}}$.", 1, 0),
    ("\\boxed{\\frac{1}{4}}", 1, 0),
    ("Not \\boxed{\\frac{1}{2}} but \\boxed{\\frac{1}{4}}.", 1, 0),
    ("$\\frac{1}{4}$", 1, 1),
    (" $\\frac14$.", 1, 1),
    ("1/4", 1, 1),
    ("\\boxed{\\frac{1}{2}}", 0, 0),
    ("\\boxed{\\frac{1}{4}", 0, 0),
    ("The answer is 1/4.", 0, 0),
    ("0.25", 0, 0),
    ("", 0, 0),
]


@pytest.mark.parametrize(("answer", "accuracy", "unboxed"), MATH)
def test_math_compares_what_is_in_the_last_box(answer: str, accuracy: float, unboxed: float) -> None:
    marks = says(table.MATH, answer)
    assert marks == {"accuracy": accuracy, "accuracy-unboxed": unboxed, "algebra": accuracy}


def test_a_box_ends_at_the_brace_that_balances_it() -> None:
    assert boxed("\\boxed{\\frac{a}{b^{2}}} and }") == "\\frac{a}{b^{2}}"
    assert boxed("\\boxed{1} \\boxed{2}") == "2"
    assert boxed("\\boxed{1") is None
    assert boxed("no box { }") is None


@pytest.mark.parametrize(
    ("answer", "mark"),
    [("(B)", 1), (" (B)", 1), (" (B)\n", 1), ("B", 0), ("(b)", 0), ("(A)", 0), ("(B) 01/01/2000", 0), ("", 0)],
)
def test_bbh_wants_the_answer_and_nothing_else(answer: str, mark: float) -> None:
    assert says(table.BBH, answer, item=5) == {"accuracy": mark, "date_understanding": mark}


@pytest.mark.parametrize(
    ("answer", "mark"),
    [
        ("Today is 01/01/2000. So the answer is (B).", 1),
        ("So the answer is B.", 0),
        ("So the answer is (B)", 0),  # lm-eval's pattern wants something behind the answer
        ("(B)", 0),
        ("So the answer is (C).", 0),
        ("", 0),
    ],
)
def test_bbh_with_reasoning_wants_the_answer_behind_its_phrase(answer: str, mark: float) -> None:
    assert says(table.BBH_COT, answer, item=5) == {"accuracy": mark, "date_understanding": mark}


DROP = [
    # by hand from the paper's F1: bags of words without articles, numbers equal or nothing, best alignment of spans
    (0, "44", 1.0, 1.0),
    (0, "44 yards", 0.0, 0.67),
    (0, "44-yard", 1.0, 1.0),  # a second annotator's answer
    (0, "45", 0.0, 0.0),
    (0, "", 0.0, 0.0),
    (1, "Ann Lee", 0.0, 0.5),
    (1, "the Owls", 0.0, 0.0),
    (1, "Ann Lee and Bo Ray", 0.0, 0.29),  # p 2/5 and r 1 for one span, nothing for the other
    (2, "30 June 1904", 1.0, 1.0),
    (2, "the 30 June 1904", 1.0, 1.0),
    (2, "June 1904", 0.0, 0.8),
    (3, "10.0", 1.0, 1.0),
]


@pytest.mark.parametrize(("item", "answer", "em", "f1"), DROP)
def test_drop_gives_exact_match_and_f1(item: int, answer: str, em: float, f1: float) -> None:
    assert says(table.DROP, answer, item=item) == pytest.approx({"em": em, "f1": f1}, abs=0.0051)


CHOICES = [
    (table.MMLU, [" B", " C", " A", " D", " B", " C", " D"]),
    (table.MMLU_MEDICAL, [" B", " C", " A", " D"]),
    (table.MEDQA, [" B", " A", " C"]),
    (table.MEDMCQA, [" A", " D", " B"]),
    (table.PUBMEDQA, [" yes", " no", " maybe"]),
    (
        table.CRASS,
        [" The glass would have stayed whole.", " She would have got wet.", " The plant would have withered."],
    ),
]


@pytest.mark.parametrize(("benchmark", "right"), CHOICES, ids=[benchmark.name for benchmark, _ in CHOICES])
def test_a_choice_is_right_if_its_likelihood_is_the_highest(benchmark: Benchmark, right: list[str]) -> None:
    prompts = [item.record["prompt"] for item in chooses(benchmark, lambda request: True)]
    key = dict(zip(prompts, right, strict=True))
    assert [i.marks["accuracy"] for i in chooses(benchmark, lambda r: r.continuation == key[r.prompt])] == [1] * len(
        key
    )
    assert [i.marks["accuracy"] for i in chooses(benchmark, lambda r: r.continuation != key[r.prompt])] == [0] * len(
        key
    )


@pytest.mark.parametrize("benchmark", table.BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_items_are_unique_and_have_marks_of_known_metrics_only(benchmark: Benchmark) -> None:
    items = benchmark.run(session(benchmark, Scripted()))
    assert len({item.item for item in items}) == len(items) >= 3
    assert {name for item in items for name in item.marks} <= {metric.name for metric in benchmark.metrics}
    headline = {metric.name for metric in benchmark.metrics if not metric.is_detail}
    assert all(headline <= item.marks.keys() for item in items)
    json.dumps([[item.marks, item.record] for item in items])
    few = benchmark.run(session(benchmark, Scripted(), options=Options(limit=1)))
    assert {item.item for item in few} == {item.item for item in items if item.item.endswith("/0")}


def test_a_score_on_some_of_the_subjects_says_so() -> None:
    items = chooses(table.MMLU, lambda request: request.continuation == " C")
    assert {item.record["covers"] for item in items} == {"2 of 57 tasks"}
    assert accuracy(items) == pytest.approx(2 / 7)
    assert accuracy(items, "stem") == accuracy(items, "anatomy") == pytest.approx(1 / 4)
    assert accuracy(items, "humanities") == accuracy(items, "philosophy") == pytest.approx(1 / 3)
    assert "covers" not in chooses(table.CRASS, lambda request: True)[0].record


def test_names_of_tasks_are_those_of_lm_eval() -> None:
    from fedcli.eval.lm_eval_bridge import quiet_lm_eval, task_manager

    with quiet_lm_eval():
        mmlu, bbh = task_manager("mmlu/default").task_index, task_manager("bbh/fewshot").task_index
    for group, subjects in MMLU_GROUPS.items():
        assert {f"mmlu_{subject}" for subject in subjects} == mmlu[f"mmlu_{group}_tasks"].tags
    assert {f"bbh_fewshot_{task}" for task in BBH_TASKS} == {*bbh} - {"bbh_fewshot"}


def test_drops_examples_come_with_their_answers() -> None:
    prompt = str(table.DROP.run(session(table.DROP, Scripted()))[0].record["prompt"])
    assert prompt.count("\n\n") == 3
    assert "How many ships were left?7\n\n" in prompt


BAD = [
    (table.MMLU, "mmlu", "test/anatomy_test.csv", lambda text: text.replace(",B\n", ",E\n"), "anatomy_test.csv, row 1"),
    (table.MMLU, "mmlu", "dev/anatomy_dev.csv", lambda text: text.replace("In the ear,", ""), "anatomy_dev.csv, row 1"),
    (table.BBH, "bbh", "boolean_expressions.json", lambda text: text.replace('"target"', '"t"', 1), "example 1"),
    (table.BBH, "bbh", "boolean_expressions.json", lambda text: text[:-2], "is not JSON"),
    (
        table.DROP,
        "drop",
        "drop_dataset_dev.json",
        lambda text: text.replace('"number": "10"', '"number": ""'),
        "test_2",
    ),
    (table.CRASS, "crass", "task.json", lambda text: text.replace(": 1", ": 0", 1), "example 1"),
    (table.GSM8K, "gsm8k", "test.jsonl", lambda text: text.replace("#### 0", "0"), "test.jsonl, line 3"),
    (table.MATH, "math", "test/algebra/2.json", lambda text: text.replace("boxed", "box"), "algebra/2.json"),
    (table.MEDQA, "medqa", "phrases_no_exclude_test.jsonl", lambda text: text.replace('x": "C"', 'x": "E"'), "line 3"),
    (table.MEDQA, "medqa", "phrases_no_exclude_test.jsonl", lambda text: text.replace("answer_idx", "key"), "line 1"),
    (table.MEDMCQA, "medmcqa", "dev.json", lambda text: text.replace('"cop": 1', '"cop": 0'), "dev.json, line 1"),
    (table.PUBMEDQA, "pubmedqa", "ori_pqal.json", lambda text: text.replace('"no"', '"never"'), "1002"),
]


@pytest.mark.parametrize(("benchmark", "name", "file", "change", "where"), BAD)
def test_a_row_that_is_not_as_published_is_named(
    benchmark: Benchmark, name: str, file: str, change: Callable[[str], str], where: str, tmp_path: Path
) -> None:
    folder = rewritten(tmp_path, name, file, change)
    assert (folder / name / file).read_text() != (ROWS / name / file).read_text()
    with pytest.raises(ConfigError, match=re.escape(where)):
        benchmark.run(session(benchmark, Scripted(), folder))


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(RequirementError, match=r"gsm8k is not here: test\.jsonl"):
        table.GSM8K.run(session(table.GSM8K, Scripted(), tmp_path))
    shutil.copytree(ROWS / "mmlu" / "test", tmp_path / "mmlu" / "test")
    with pytest.raises(RequirementError, match=r"dev/anatomy_dev\.csv"):
        table.MMLU.run(session(table.MMLU, Scripted(), tmp_path))
    items = table.MMLU.run(session(table.MMLU, Scripted(), tmp_path, options=Options(shots=0)))
    assert str(items[0].record["prompt"]).count("Answer:") == 1


def as_lines(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_rows_of_the_hub_give_the_same_items_as_the_publishers_files(tmp_path: Path) -> None:
    medmcqa = [json.loads(line) for line in (ROWS / "medmcqa" / "dev.json").read_text().splitlines()]
    pubmedqa = json.loads((ROWS / "pubmedqa" / "ori_pqal.json").read_text())
    math = [json.loads(path.read_text()) for path in sorted((ROWS / "math" / "test").glob("*/*.json"))]
    rows = {
        "medmcqa/validation.jsonl": [row | {"cop": row["cop"] - 1} for row in medmcqa],
        "math/test.jsonl": math,
        "pubmedqa/test.jsonl": [
            {
                "pubid": int(key),
                "question": row["QUESTION"],
                "context": {"contexts": row["CONTEXTS"], "labels": row["LABELS"], "meshes": row["MESHES"]},
                "long_answer": row["LONG_ANSWER"],
                "final_decision": row["final_decision"],
            }
            for key, row in pubmedqa.items()
            if key != "1004"  # no test item of the publisher's
        ],
    }
    for name, lines in rows.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(as_lines(lines))
    for benchmark in (table.MEDMCQA, table.MATH, table.PUBMEDQA):
        hub = benchmark.run(session(benchmark, Scripted(), tmp_path))
        assert hub == benchmark.run(session(benchmark, Scripted()))


def test_drop_reads_the_flat_rows_of_the_hub(tmp_path: Path) -> None:
    row = {"section_id": "s", "passage": "Two owls met 3 foxes.", "question": "How many foxes?", "query_id": "q"}
    answer = {"number": "3", "date": {"day": "", "month": "", "year": ""}, "spans": []}
    more = {"number": [""], "date": [{"day": "", "month": "", "year": ""}], "spans": [["3 foxes"]]}
    (tmp_path / "drop").mkdir()
    (tmp_path / "drop" / "validation.jsonl").write_text(
        as_lines(
            [
                row | {"answers_spans": {"spans": ["3"], "types": ["number"]}},
                row | {"answer": answer, "validated_answers": more},
            ]
        )
    )
    (tmp_path / "drop" / "train.jsonl").write_text(as_lines([row | {"answer": answer}] * 4))
    assert [says(table.DROP, "3 foxes", item=item, folder=tmp_path)["em"] for item in (0, 1)] == [0, 1]


def test_always_c_scores_the_share_of_c_on_real_mmlu() -> None:
    folder = real("mmlu")
    items = chooses(table.MMLU, lambda request: request.continuation == " C", folder)
    answers = {
        path.name.removesuffix("_test.csv"): [
            row["answer"] for row in csv.DictReader(path.read_text().splitlines(keepends=True))
        ]
        for path in (folder / "mmlu" / "test").glob("*.csv")
    }
    for subject, given in answers.items():
        assert accuracy(items, subject) == pytest.approx(given.count("2") / len(given))
    assert len(items) == sum(map(len, answers.values()))
    assert {item.record["covers"] for item in items} == {"8 of 57 tasks"}


def test_the_right_answers_of_real_rows_score_one() -> None:
    folder = real("gsm8k")
    rows = [json.loads(line) for line in (folder / "gsm8k" / "test.jsonl").read_text().splitlines()]
    assert len(rows) == 1319
    key = {f"Q: {row['question']}\nA:": row["answer"].rpartition("#### ")[2] for row in rows}
    model = Scripted(lambda request: "So it is. The answer is " + key[request.prompt.rpartition("\n\n")[2]] + ".")
    items = table.GSM8K.run(session(table.GSM8K, model, folder, options=Options(limit=200)))
    assert (len(items), accuracy(items), accuracy(items, "accuracy-strict")) == (200, 1.0, 1.0)


def test_the_right_answers_of_real_bbh_and_crass_score_one() -> None:
    folder = real("bbh")
    examples = [e for path in (folder / "bbh").glob("*.json") for e in json.loads(path.read_text())["examples"]]
    key = {example["input"]: example["target"] for example in examples}
    num_right = sum(key[example["input"]] == example["target"] for example in examples)  # two contradict others
    model = Scripted(lambda request: " " + key[request.prompt.rpartition("\nQ: ")[2].removesuffix("\nA:")] + "\n")
    items = table.BBH.run(session(table.BBH, model, folder))
    assert (len(items), accuracy(items)) == (1615, num_right / 1615)
    assert num_right == 1613
    questions = json.loads((folder / "crass" / "crass_examples.json").read_text())
    right = {f"Q: {q['input']}\n": next(c for c, score in q["target_scores"].items() if score == 1) for q in questions}
    items = chooses(
        table.CRASS,
        lambda request: request.continuation == " " + right[request.prompt.partition("  choice: ")[0]],
        folder,
    )
    assert (len(items), accuracy(items)) == (43, 1.0)
