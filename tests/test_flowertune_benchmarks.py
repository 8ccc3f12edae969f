"""What FlowerTune's boards have beside the paper's benchmarks: CareQA, MMLU's parts, and MultiPL-E."""

import json
import os
import re
from pathlib import Path

import pytest
from support.scripted import ROWS, Scripted, session

from fedcli.errors import ConfigError, RequirementError
from fedcli.eval import programs
from fedcli.eval.benchmark import ItemScore, Options
from fedcli.eval.benchmarks import lm_eval_tasks as table
from fedcli.eval.benchmarks import multiple
from fedcli.eval.benchmarks.lm_eval_names import MMLU_GROUPS
from fedcli.eval.listing import list_benchmarks
from fedcli.eval.registry import BENCHMARKS, find_benchmarks
from fedcli.eval.requests import Generation, Likelihood
from fedcli.eval.sandbox import Sandbox

GROUPS = {
    "flowertune-general": {"mmlu-stem", "mmlu-social-sciences", "mmlu-humanities"},
    "flowertune-finance": {"fpb", "fiqa", "tfns"},
    "flowertune-medical": {"pubmedqa", "medmcqa", "medqa", "careqa"},
    "flowertune-code": {"mbpp", "humaneval", "multiple-js", "multiple-cpp"},
}


@pytest.mark.parametrize("group", GROUPS)
def test_a_boards_benchmarks_are_a_group(group: str) -> None:
    assert {benchmark.name for benchmark in find_benchmarks([group])} == GROUPS[group]


def test_mmlus_parts_are_its_groups_and_count_the_published_questions() -> None:
    sizes = {benchmark.name: benchmark.size for benchmark in table.MMLU_PARTS}
    assert sizes == {"mmlu-stem": 3153, "mmlu-social-sciences": 3077, "mmlu-humanities": 4705}
    assert sum(sizes.values()) + 3107 == table.MMLU.size  # the fourth group, "other"
    for benchmark, group in zip(table.MMLU_PARTS, ("stem", "social_sciences", "humanities"), strict=True):
        assert [metric.name for metric in benchmark.metrics] == ["accuracy", *MMLU_GROUPS[group]]


# CareQA


@pytest.mark.slow
def test_careqa_is_asked_as_lm_eval_asks_and_scored_by_the_likeliest_letter() -> None:
    rows = json.loads((ROWS / "careqa/CareQA_en.json").read_text())
    model = Scripted(log_prob=lambda request: 0.0 if request.continuation == " D" else -1.0)
    items = table.CAREQA.run(session(table.CAREQA, model))
    letters = ["ABCD"[row["cop"] - 1] for row in rows]
    assert [item.marks["accuracy"] for item in items] == [float(letter == "D") for letter in letters] == [0, 1, 1]
    row = rows[0]
    choices = "".join(f"{letter}. {row[f'op{number}']}\n" for number, letter in enumerate("ABCD", 1))
    prompt = f"Question: {row['question']}\nChoices:\n{choices}Answer:"
    assert model.asked[:4] == [Likelihood(prompt, f" {letter}") for letter in "ABCD"]
    assert str(model.asked[8].prompt).startswith("Question: In relation to the immune mechanism")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [('"cop": 1', '"cop": 0', "cop from 1 to 4"), ('"op2"', '"o2"', "op2 (str)"), ('"row-1"', '"row-9"', "")],
)
def test_a_row_of_careqa_that_is_not_as_published_is_named(old: str, new: str, told: str, tmp_path: Path) -> None:
    text = (ROWS / "careqa/CareQA_en.json").read_text().replace(old, new, 1)
    if not told:
        text, told = text.replace('"question": "Which organ makes bile?"', '"question": null'), "question (str)"
    (tmp_path / "CareQA_en.json").write_text(text)
    with pytest.raises(
        ConfigError, match=re.escape(f"CareQA_en.json, row 1 is not as published: it should hold {told}")
    ):
        table.CAREQA.run(session(table.CAREQA, Scripted(), tmp_path))


# MultiPL-E

RIGHT = {
    "js": ("  return 2 * x;\n}", "  return xs.filter((x) => x % 2 == 0);\n}"),
    "cpp": (
        "    return 2 * x;",
        "    std::vector<long> r;\n    for (long x : xs) if (x % 2 == 0) r.push_back(x);\n    return r;",
    ),
    "sh": ("    echo $((2 * $1))", '    echo "${1##* }"'),
}
WRONG = {
    "js": {
        "  return x;\n}": "failed",
        "  return 2 * x": "failed",
        "": "failed",
        "  process.exit(0);\n}": "failed",  # the publisher's harness counts it as right
        '  console.log("@MARK@"); process.exit(0);\n}': "failed",
        "  return 2 * x;\n}\nprocess.on('exit', () => { process.exitCode = 1; });": "failed",
        "  require('fs').writeFileSync('/etc/here', '1'); return 2 * x;\n}": "failed",
    },
    "cpp": {
        "    return x;": "failed",
        "    return 2 * x": "failed",
        "": "failed",
        "    exit(0);": "failed",
    },
    "sh": {"    echo $1": "failed", "    exit 0": "failed", "}; exit 0; twice() {": "failed", "": "failed"},
}
OF = {language.name: BENCHMARKS[f"multiple-{language.name}"] for language in multiple.LANGUAGES}


def answered(language: str, answers: list[str], sandbox: Sandbox | None, **options: int) -> list[ItemScore]:
    left = iter(answers)
    model = Scripted(lambda _: next(left))
    return OF[language].run(session(OF[language], model, run_code=sandbox, options=Options(**options)))


@pytest.mark.parametrize("language", ["sh", "js", pytest.param("cpp", marks=pytest.mark.slow)])
def test_right_answers_pass(language: str, sandbox: Sandbox) -> None:
    items = answered(language, list(RIGHT[language]), sandbox)
    assert [(dict(item.marks), item.record["samples"][0]["output"].strip()) for item in items] == [
        ({"pass@1": 1.0}, "")
    ] * 2


@pytest.mark.parametrize(
    ("language", "answer"),
    [
        pytest.param(language, answer, marks=[] if (language, answer) == ("sh", "    exit 0") else pytest.mark.slow)
        for language, answers in WRONG.items()
        for answer in answers
    ],
)
def test_wrong_broken_and_early_answers_fail(language: str, answer: str, sandbox: Sandbox) -> None:
    (item,) = answered(language, [answer], sandbox, limit=1)
    assert dict(item.marks) == {"pass@1": 0.0}
    assert item.record["samples"][0]["outcome"] == WRONG[language][answer]


@pytest.mark.slow
def test_of_ten_samples_each_counts_and_an_endless_one_is_ended(sandbox: Sandbox) -> None:
    answers = ["  return 2 * x;\n}"] * 3 + ["  return x;\n}"] * 6 + ["  while (true) {}\n}"]
    (item,) = answered("js", answers, sandbox, limit=1, samples=10)
    assert dict(item.marks) == pytest.approx({"pass@1": 3 / 10, "pass@10": 1.0})
    assert "had not ended after 15 seconds" in item.record["samples"][-1]["output"]


def test_a_prompt_is_asked_without_the_blank_around_it_up_to_the_rows_stops() -> None:
    model = Scripted()
    OF["cpp"].run(session(OF["cpp"], model))
    rows = [json.loads(line) for line in (ROWS / "multiple/humaneval-cpp.jsonl").read_text().splitlines()]
    assert model.asked == [Generation(row["prompt"].strip(), 512, ("\n}",)) for row in rows]


def test_rows_of_another_language_are_refused(tmp_path: Path) -> None:
    text = (ROWS / "multiple/humaneval-sh.jsonl").read_text()
    (tmp_path / "humaneval-js.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=r"line 1 is not as published: its 'language' is 'sh', and it should be 'js'"):
        OF["js"].run(session(OF["js"], Scripted(), tmp_path))
    (tmp_path / "humaneval-sh.jsonl").write_text(text.replace('["\\n}"]', "[]"))
    with pytest.raises(ConfigError, match="'stop_tokens' is no list of texts"):
        OF["sh"].run(session(OF["sh"], Scripted(), tmp_path))


def test_a_compiler_that_the_sandbox_cannot_start_is_named_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(programs.ENVIRONMENT, "PATH", str(tmp_path))
    with pytest.raises(RequirementError, match=r"^multiple-sh runs its answers with bash, and .*: /\S*bash is not in "):
        programs.require_programs("multiple-sh", ("bash",))
    (tmp_path / "bash").symlink_to(tmp_path / "own")
    (tmp_path / "own").write_text("")
    os.chmod(tmp_path / "own", 0o755)
    assert programs.missing_programs(["bash", "no-such-compiler"]) == {
        "bash": f"{tmp_path}/bash is a link to {tmp_path}/own, which the sandbox does not show",
        "no-such-compiler": "it is not installed",
    }


def test_the_list_says_what_a_benchmark_runs_its_answers_with() -> None:
    listed = {entry.benchmark.name: entry.document() for entry in list_benchmarks("multiple", [])}
    assert listed.keys() == {*(f"multiple-{n}" for n in OF), *(f"multiple-mbpp-{n}" for n in OF)}
    missing = programs.missing_programs(["g++"])
    assert [text for text in listed["multiple-cpp"]["missing"] if text.startswith("g++")] == [
        f"{name} ({why})" for name, why in missing.items()
    ]
