"""Benchmarks of code: published solutions pass, everything else fails, and pass@k and BLEU are what others compute."""

import gzip
import itertools
import json
import math
import os
import random
import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import pytest
from support.scripted import ROWS, Scripted, session

from fedcli.data.file_rows import Row
from fedcli.errors import ConfigError, UsageError
from fedcli.eval.benchmark import Benchmark, ItemScore, Options
from fedcli.eval.benchmarks import bleu, ds1000, humaneval, humanevalpack, mbpp
from fedcli.eval.benchmarks.code import extract_code, pass_at_k
from fedcli.eval.requests import Generation
from fedcli.eval.sandbox import Program, Sandbox
from fedcli.tasks.conversation import Turn

DATA = Path(os.environ.get("FEDCLI_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
FIX, SYNTHESIZE = humanevalpack.BENCHMARKS
CONALA, CONCODE = bleu.BENCHMARKS


def rows_of(path: Path) -> list[dict]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in content.splitlines()]


def own_rows(benchmark: Benchmark) -> list[dict]:
    (path,) = (ROWS / benchmark.name).iterdir()
    return rows_of(path)


def real(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not here; FEDCLI_TEST_DATA names its folder")
    return DATA / name


def shown(request: Generation) -> str:
    return request.prompt if isinstance(request.prompt, str) else request.prompt[-1].content


def answering(answers: dict[str, str]) -> Scripted:
    """Return a model that answers prompts which end in a key."""
    return Scripted(lambda request: next(answer for end, answer in answers.items() if shown(request).endswith(end)))


def in_turn(answers: Iterable[str]) -> Scripted:
    left = iter(answers)
    return Scripted(lambda _: next(left))


def passed(items: list[ItemScore]) -> list[float]:
    return [item.marks["pass@1"] for item in items]


def outcomes(items: list[ItemScore]) -> list[str]:
    return [item.record["samples"][0]["outcome"] for item in items]


@pytest.mark.slow
def test_the_canonical_solutions_of_all_164_humaneval_problems_pass(sandbox: Sandbox) -> None:
    path = real("humaneval/HumanEval.jsonl.gz")
    model = answering({row["prompt"]: row["canonical_solution"] for row in rows_of(path)})
    items = humaneval.BENCHMARK.run(session(humaneval.BENCHMARK, model, DATA, run_code=sandbox))
    assert [item.item for item in items] == [f"HumanEval/{number}" for number in range(164)]
    assert passed(items) == [1.0] * 164 == [1.0] * humaneval.BENCHMARK.size


@pytest.mark.slow
@pytest.mark.parametrize("limit", [50, pytest.param(None, marks=pytest.mark.slow)])
def test_the_references_of_all_500_mbpp_test_tasks_pass(limit: int | None, sandbox: Sandbox) -> None:
    rows = rows_of(real("mbpp/mbpp.jsonl"))
    model = answering({f"{row['test_list'][-1]}\n[BEGIN]\n": row["code"] for row in rows})
    options = Options(limit=limit)
    items = mbpp.BENCHMARK.run(session(mbpp.BENCHMARK, model, DATA, options=options, run_code=sandbox))
    assert [item.item for item in items] == [f"MBPP/{number}" for number in range(11, 11 + (limit or 500))]
    assert [(item.item, item.record["samples"]) for item in items if item.marks != {"pass@1": 1.0}] == []
    assert mbpp.BENCHMARK.size == 500


@pytest.mark.slow
def test_the_references_of_the_474_other_mbpp_tasks_pass_too(sandbox: Sandbox) -> None:
    rows = [row for row in rows_of(real("mbpp/mbpp.jsonl")) if not 11 <= row["task_id"] <= 510]
    programs = [Program(row["code"], 30, mbpp.checks(Row(row, f"task {row['task_id']}"))) for row in rows]
    runs = sandbox.run_all(programs)
    assert [row["task_id"] for row, run in zip(rows, runs, strict=True) if not run.passed] == []
    assert len(rows) == 474


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "    return None",
        "    return sum(",
        "return 2",
        "I am sorry, I cannot write code.",
        "    import os; os._exit(0)",
        "    raise SystemExit(0)",
        "    return [x for x in numbers",
        "\0",
        "```python\n```",
        "```python",
        pytest.param("    import time; time.sleep(60)", marks=pytest.mark.slow),
    ],
)
def test_wrong_empty_malformed_and_endless_answers_fail(sandbox: Sandbox, answer: str) -> None:
    work = session(humaneval.BENCHMARK, Scripted(lambda _: answer), run_code=sandbox, options=Options(limit=1))
    (item,) = humaneval.BENCHMARK.run(work)
    assert item.marks == {"pass@1": 0.0}
    assert item.record["samples"][0]["answer"] == answer
    assert outcomes([item]) == ["timed out" if "sleep" in answer else "failed"]


def test_humaneval_prompts_are_completed_as_they_are_greedily(sandbox: Sandbox) -> None:
    model = Scripted()
    humaneval.BENCHMARK.run(session(humaneval.BENCHMARK, model, options=Options(max_new_tokens=99)))
    stop = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")
    assert model.asked == [Generation(row["prompt"], 99, stop) for row in own_rows(humaneval.BENCHMARK)]


def test_of_several_samples_each_counts(sandbox: Sandbox) -> None:
    good = {row["prompt"]: row["canonical_solution"] for row in own_rows(humaneval.BENCHMARK)}
    model = Scripted(lambda request: good[request.prompt] if request.sample < 3 else "    return None")
    work = session(humaneval.BENCHMARK, model, run_code=sandbox, options=Options(samples=12, limit=2))
    items = humaneval.BENCHMARK.run(work)
    expected = {"pass@1": 3 / 12, "pass@10": 1.0}  # nine fail: ten always hold one that passes
    assert [dict(item.marks) for item in items] == [pytest.approx(expected)] * 2
    assert [request.sample for request in model.asked] == [*range(12)] * 2
    assert {(request.temperature, request.top_p) for request in model.asked} == {(0.8, 0.95)}
    humaneval.BENCHMARK.run(session(humaneval.BENCHMARK, model, options=Options(samples=2, temperature=0.2, limit=1)))
    assert [(request.temperature, request.top_p) for request in model.asked[24:]] == [(0.2, 0.95)] * 2


def test_pass_at_k_is_the_share_of_choices_with_a_sample_that_passes() -> None:
    for num_samples in range(1, 9):
        for num_passed in range(num_samples + 1):
            results = [True] * num_passed + [False] * (num_samples - num_passed)
            for k in range(1, num_samples + 1):
                chosen = [any(choice) for choice in itertools.combinations(results, k)]
                assert pass_at_k(num_samples, num_passed, k) == pytest.approx(sum(chosen) / len(chosen), abs=1e-15)


def test_pass_at_k_is_the_papers_product() -> None:
    for num_samples, num_passed, k in [(200, 1, 100), (200, 37, 10), (1000, 3, 100), (100, 0, 100), (10, 10, 1)]:
        fails = math.prod(Fraction(num_samples - num_passed - i, num_samples - i) for i in range(k))
        assert pass_at_k(num_samples, num_passed, k) == pytest.approx(float(1 - fails), abs=1e-15)
    assert pass_at_k(200, 1, 100) == 0.5
    assert pass_at_k(5, 2, 3) == pytest.approx(0.9)  # 1 - C(3, 3) / C(5, 3)


@pytest.mark.parametrize("benchmark", [humaneval.BENCHMARK, mbpp.BENCHMARK, FIX, SYNTHESIZE, ds1000.BENCHMARK])
def test_without_a_sandbox_the_answers_are_kept_without_marks(benchmark: Benchmark) -> None:
    items = benchmark.run(session(benchmark, Scripted(lambda _: "said"), options=Options(samples=2)))
    assert [item.marks for item in items] == [{}] * len(items)
    assert [item.record["samples"] for item in items] == [[{"answer": "said"}] * 2] * len(items)
    assert len({item.item for item in items}) == len(items) > 2
    assert benchmark.needs == ("code-execution",)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        ("    return 1\n", "    return 1\n"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```\n", "x = 1\n"),
        ("Here it is:\n\n```py\n  x = 1\n```\nAnd a use of it:\n```python\nprint(x)\n```", "  x = 1\n"),
        ("Here it is:\n```python\nx = 1", "x = 1"),
        ("```\nx = 1", "x = 1"),
        ("    return 1\n```\nThis returns 1.", "    return 1\n"),
        ("Sure.\r\n```python\r\nx = 1\r\n```", "x = 1\r\n"),
        ("  ```python\n  x = 1\n  ```", "  x = 1\n"),
        ("a = 'not ``` a fence'", "a = 'not ``` a fence'"),
        ("```python\n```", ""),
        ("", ""),
    ],
)
def test_code_is_found_in_an_answer(answer: str, code: str) -> None:
    assert extract_code(answer) == code


def test_mbpp_asks_as_the_paper_does_with_tasks_2_to_4_as_examples() -> None:
    model = Scripted()
    mbpp.BENCHMARK.run(session(mbpp.BENCHMARK, model))
    prompt = model.asked[0].prompt
    assert prompt.startswith(
        "You are an expert Python programmer, and here is your task: Write a function to find the largest of three "
        "numbers. Your code should pass these tests:\n\nassert largest(1, 2, 3) == 3\nassert largest(5, 4, 1) == 5\n"
        "assert largest(0, 0, 0) == 0\n[BEGIN]\ndef largest(a, b, c):\n  return max(a, b, c)\n[DONE]\n\n"
        "You are an expert Python programmer, and here is your task: Write a python function to reverse a string."
    )
    assert re.findall(r"^def (\w+)", prompt, re.MULTILINE) == ["largest", "reverse", "squares"]
    assert prompt.endswith("assert vowels('xyz') == 0\n[BEGIN]\n")
    assert [request.stop for request in model.asked] == [("[DONE]",)] * 3
    mbpp.BENCHMARK.run(session(mbpp.BENCHMARK, model, options=Options(shots=0)))
    assert [shown(request).count("[BEGIN]") for request in model.asked[3:]] == [1] * 3
    mbpp.BENCHMARK.run(session(mbpp.BENCHMARK, model, options=Options(shots=4)))
    assert "[BEGIN]\ndef double(n):\n  return 2 * n\n[DONE]\n\n" in model.asked[6].prompt


def test_mbpp_has_ten_examples_and_says_which_are_missing() -> None:
    with pytest.raises(UsageError, match="10 examples"):
        mbpp.BENCHMARK.run(session(mbpp.BENCHMARK, Scripted(), options=Options(shots=11)))
    with pytest.raises(ConfigError, match="task 5"):
        mbpp.BENCHMARK.run(session(mbpp.BENCHMARK, Scripted(), options=Options(shots=5)))


def test_mbpp_tests_run_behind_a_setup_that_uses_the_answers_classes(sandbox: Sandbox) -> None:
    rows = own_rows(mbpp.BENCHMARK)
    good = answering({f"{row['test_list'][-1]}\n[BEGIN]\n": row["code"] for row in rows})
    assert passed(mbpp.BENCHMARK.run(session(mbpp.BENCHMARK, good, run_code=sandbox))) == [1, 1, 1]
    bad = Scripted(lambda _: "def vowels(word): return 4\ndef depth(link): return 2\ndef tens(n): return 10\n")
    assert passed(mbpp.BENCHMARK.run(session(mbpp.BENCHMARK, bad, run_code=sandbox))) == [0, 0, 0]


def fenced(row: dict, body: str) -> str:
    return f"Here you are.\n```python\n{row['declaration']}{body}```\nIt works."


@pytest.mark.parametrize("benchmark", [FIX, pytest.param(SYNTHESIZE, marks=pytest.mark.slow)])
def test_humanevalpack_takes_whole_functions_and_bodies(benchmark: Benchmark, sandbox: Sandbox) -> None:
    rows = [row for row in own_rows(benchmark) if row["task_id"].startswith("Python")]
    answers: list[Callable[[dict], str]] = [
        lambda row: fenced(row, row["canonical_solution"]),
        lambda row: f"def {row['signature']}:\n{row['canonical_solution']}",  # without the declaration's imports
        lambda row: row["canonical_solution"],
    ]
    for answer in answers:
        model = in_turn(map(answer, rows))
        items = benchmark.run(session(benchmark, model, run_code=sandbox))
        assert [item.item for item in items] == [row["task_id"] for row in rows]
        assert passed(items) == [1.0] * len(rows)
    model = in_turn(fenced(row, row["buggy_solution"]) for row in rows)
    assert passed(benchmark.run(session(benchmark, model, run_code=sandbox))) == [0.0] * len(rows)


def test_humanevalpack_asks_in_its_publishers_words() -> None:
    model = Scripted()
    FIX.run(session(FIX, model))
    SYNTHESIZE.run(session(SYNTHESIZE, model))
    row = own_rows(FIX)[1]
    fix = f"{row['declaration']}{row['buggy_solution']}\n{row['test']}\nFix bugs in initials."
    assert model.asked[1].prompt == (Turn("user", fix),)
    assert shown(model.asked[3]).startswith("Write a Python function `count_even(numbers: List[int]) -> int` to solve")


def test_ds1000_runs_its_rows_own_harness(sandbox: Sandbox) -> None:
    rows = own_rows(ds1000.BENCHMARK)
    model = answering({row["prompt"]: row["reference_code"] for row in rows})
    items = ds1000.BENCHMARK.run(session(ds1000.BENCHMARK, model, run_code=sandbox))
    assert [item.item for item in items] == ["Pandas/0", "Numpy/1", "Sklearn/2", "Tensorflow/3"]
    assert [dict(item.marks) for item in items] == [
        {"pass@1": 1.0, "Pandas": 1.0},
        {"pass@1": 1.0, "Numpy": 1.0},
        {"pass@1": 1.0, "Sklearn": 1.0},
        {},
    ], [item.record for item in items]
    assert items[3].record["missing_libraries"] == ["library_that_is_not_here"]
    assert shown(model.asked[0]).startswith("Write a short code following the given format and indentation.")


@pytest.mark.slow
def test_ds1000_answers_that_break_a_rule_or_are_wrong_fail(sandbox: Sandbox) -> None:
    for answer in ("best = None\nfor y in x: best = y if best is None else max(best, y)", "best = 3", "", "import tf"):
        model = Scripted(lambda _, answer=answer: f"<code>\n{answer}\n")
        items = ds1000.BENCHMARK.run(session(ds1000.BENCHMARK, model, run_code=sandbox))
        assert [item.marks.get("pass@1") for item in items] == [0, 0, 0, None]


@pytest.mark.parametrize(
    "answer",
    [
        "    x = 1\n",
        "<code>\n    x = 1\n</code>",
        "Here:\n<code>\n    x = 1\n",
        "```python\n    x = 1\n```",
        "<code>\n```python\n    x = 1\n```\n",
        "```python\n<code>\n    x = 1\n</code>\n```",
    ],
)
def test_a_ds1000_solution_keeps_its_indentation(answer: str) -> None:
    assert ds1000.extract_solution(answer).rstrip("\n") == "    x = 1"


@pytest.mark.parametrize("benchmark", [CONALA, CONCODE])
def test_the_published_answers_have_the_full_score(benchmark: Benchmark) -> None:
    (path,) = (ROWS / benchmark.name).iterdir()
    rows = json.loads(path.read_text()) if benchmark is CONALA else rows_of(path)
    model = in_turn(f"```\n{row['snippet' if benchmark is CONALA else 'code']}\n```" for row in rows)
    assert corpus_bleu(benchmark, benchmark.run(session(benchmark, model))) == pytest.approx(100)
    assert corpus_bleu(benchmark, benchmark.run(session(benchmark, Scripted()))) == 0


def corpus_bleu(benchmark: Benchmark, items: list[ItemScore]) -> float:
    (metric,) = benchmark.metrics
    assert metric.of_sum is not None
    return metric.of_sum([sum(column) for column in zip(*(item.marks["BLEU"] for item in items), strict=True)])


def test_bleu_of_the_sums_is_sacrebleus_corpus_score() -> None:
    import sacrebleu

    pick = random.Random(5)
    words = ["values", ".", "sort", "(", "reverse", "=", "True", ")", "x[0]", "'a, b'", "3.5", "\n", "é"]
    for length in (1, 3, 40):
        references = [" ".join(pick.choices(words, k=pick.randint(1, 15))) for _ in range(length)]
        answers = [" ".join(pick.choices([*words, *reference.split()], k=9)) for reference in references]
        answers[0] = pick.choice(["", references[0]])
        marks = [bleu.count_ngrams(*pair) for pair in zip(answers, references, strict=True)]
        found = bleu.bleu_of_sum([sum(column) for column in zip(*marks, strict=True)])
        assert found == sacrebleu.corpus_bleu(answers, [references]).score


def test_conala_asks_for_the_rewritten_intent_and_concode_for_the_sentence_alone() -> None:
    model = Scripted()
    conala, concode = (benchmark.run(session(benchmark, model)) for benchmark in (CONALA, CONCODE))
    assert [item.item for item in conala] == ["501/0", "502/1", "502/2", "503/3"]
    assert [item.item for item in concode] == ["0", "1", "2"]
    python = "Answer the following instructions in one line of Python code:\n"
    java = "Answer the following instructions in a one line of Java code:\n"
    assert [shown(request) for request in model.asked] == [
        f"{python}sort list `values` in descending order",
        f"{python}join the strings of list `words` by ', '",
        f"{python}join list `words` with commas",
        f"{python}number of lines of a file `path`",
        f"{java}Returns the number of items",
        f"{java}removes all items",
        f"{java}Says whether no item fits in any more",
    ]


@pytest.mark.parametrize(
    ("benchmark", "name", "change", "word"),
    [
        (humaneval.BENCHMARK, "HumanEval.jsonl", {"test": None}, "test"),
        (mbpp.BENCHMARK, "mbpp.jsonl", {"task_id": "two"}, "task_id"),
        (mbpp.BENCHMARK, "mbpp.jsonl", {"test_list": []}, "test_list"),
        (FIX, "humanevalpack.jsonl", {"buggy_solution": 3}, "buggy_solution"),
        (ds1000.BENCHMARK, "ds1000.jsonl", {"metadata": {"library": "Pandas"}}, "metadata"),
        (ds1000.BENCHMARK, "ds1000.jsonl", {"metadata": {"library": "Turtle", "problem_id": 1}}, "metadata"),
        (CONCODE, "dev.json", {"code": ""}, "dev.json"),
        (CONCODE, "dev.json", {"nl": None}, "nl"),
    ],
)
def test_a_row_that_is_not_as_published_is_named_before_anything_is_asked(
    benchmark: Benchmark, name: str, change: dict, word: str, tmp_path: Path
) -> None:
    rows = own_rows(benchmark)
    rows[1] |= change
    (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    model = Scripted()
    with pytest.raises(ConfigError) as caught:
        benchmark.run(session(benchmark, model, tmp_path))
    assert f"{name}, line 2: " in caught.value.message
    assert word in caught.value.message + caught.value.hint
    assert model.asked == []
