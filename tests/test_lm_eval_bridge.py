"""lm-eval's tasks under fedcli's models: the same questions, answers and scores as under lm-eval's own model."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.lm_eval_own import lm_evals_model, lm_evals_own, ours
from support.processes import ENVIRONMENT
from support.scripted import ROWS, Scripted, session

from fedcli.data.source import read_rows
from fedcli.errors import RequirementError, UsageError
from fedcli.eval.benchmark import Benchmark, Options
from fedcli.eval.benchmarks import lm_eval_tasks as table
from fedcli.eval.benchmarks.lm_eval_by_name import lm_eval_benchmark
from fedcli.eval.requests import Generation
from fedcli.model.base import find_base
from fedcli.model.loading import load_base

DATA = Path(os.environ.get("FEDCLI_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load_base(find_base("builtin:tiny", revision=None, root=Path()), trust_remote_code=False)


def real(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not here; FEDCLI_TEST_DATA names its folder")
    return DATA


@pytest.fixture(scope="module")
def lm_evals_tiny(tiny: tuple[Any, Any]) -> Any:
    """The tiny model as lm-eval's own kind of model."""
    return lm_evals_model(tiny)


@pytest.mark.slow
def test_mmlu_scores_as_lm_eval_with_its_own_model(tiny: tuple[Any, Any], lm_evals_tiny: Any, tmp_path: Path) -> None:
    folder, limit = real("mmlu"), 8
    items = ours(table.MMLU_MEDICAL, tiny, folder, limit=limit)
    assert len(items) == 6 * limit
    for subject in ("anatomy", "professional_medicine"):  # short, and cut from the left: more than 1,024 tokens
        splits = {
            split: [
                {
                    "question": row.fields["question"],
                    "choices": [row.fields[f"choice{number}"] for number in range(4)],
                    "answer": int(row.fields["answer"]),
                }
                for row in read_rows(folder / "mmlu" / split / f"{subject}_{split}.csv")
            ]
            for split in ("test", "dev")
        }
        results = lm_evals_own(f"mmlu_{subject}", splits, lm_evals_tiny, tmp_path, limit, shots=5)
        mine = [item for item in items if item.item.startswith(f"mmlu_{subject}/")]
        assert sum(item.marks["accuracy"] for item in mine) / limit == results["results"][f"mmlu_{subject}"]["acc,none"]
        for item, sample in zip(mine, results["samples"][f"mmlu_{subject}"], strict=True):
            assert item.record["prompt"] == sample["arguments"][0][0]
            theirs = [answer[0][0] for answer in sample["resps"]]
            assert [*item.record["log_probs"].values()] == pytest.approx(theirs, abs=1e-3)
            assert item.marks["accuracy"] == sample["acc"]


@pytest.mark.slow
def test_gsm8k_scores_as_lm_eval_with_its_own_model(tiny: tuple[Any, Any], lm_evals_tiny: Any, tmp_path: Path) -> None:
    folder, limit = real("gsm8k"), 20
    items = ours(table.GSM8K, tiny, folder, limit=limit)
    rows = [dict(row.fields) for row in read_rows(folder / "gsm8k" / "test.jsonl")[:limit]]
    results = lm_evals_own("gsm8k_cot", {"test": rows}, lm_evals_tiny, tmp_path, limit, shots=8)
    scores = results["results"]["gsm8k_cot"]
    assert sum(item.marks["accuracy"] for item in items) / limit == scores["exact_match,flexible-extract"]
    assert sum(item.marks["accuracy-strict"] for item in items) / limit == scores["exact_match,strict-match"]
    for filter_ in ("flexible-extract", "strict-match"):
        samples = [sample for sample in results["samples"]["gsm8k_cot"] if sample["filter"] == filter_]
        assert [item.record["prompt"] for item in items] == [sample["arguments"][0][0] for sample in samples]
        assert [item.record["answer"] for item in items] == [sample["resps"][0][0] for sample in samples]
        assert [item.record["extracted"][filter_] for item in items] == [s["filtered_resps"][0] for s in samples]


class Mixed:
    """Answers to GSM8K as a model might give them, some of them right."""

    rank = 0
    world_size = 1

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        forms = ["The answer is {}.", "#### {}", "${}", "It is {}.0", "The answer is {} of 9.", "no idea", "= {}."]
        self._answers = {
            row["question"]: forms[number % len(forms)].format(row["answer"].rpartition("#### ")[2])
            for number, row in enumerate(rows)
        }

    def answer(self, prompt: str) -> str:
        return self._answers[prompt.rpartition("\n\nQ: ")[2].removesuffix("\nA:")]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        return [self.answer(request.args[0]) for request in requests]


def test_gsm8k_scores_mixed_answers_as_lm_eval(tmp_path: Path) -> None:
    folder, limit = real("gsm8k"), 105
    rows = [dict(row.fields) for row in read_rows(folder / "gsm8k" / "test.jsonl")[:limit]]
    mixed = Mixed(rows)
    model = Scripted(lambda request: mixed.answer(str(request.prompt)))
    items = table.GSM8K.run(session(table.GSM8K, model, folder, options=Options(limit=limit)))
    scores = lm_evals_own("gsm8k_cot", {"test": rows}, mixed, tmp_path, limit, shots=8)["results"]["gsm8k_cot"]
    loose = sum(item.marks["accuracy"] for item in items) / limit
    strict = sum(item.marks["accuracy-strict"] for item in items) / limit
    assert 0.5 < loose == scores["exact_match,flexible-extract"] < 0.6  # four forms of seven
    assert 0.2 < strict == scores["exact_match,strict-match"] < 0.3  # two forms of seven


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **settings: object) -> None:
    """Write a task of one's own as lm-eval has it: a YAML file, and rows in a file beside it."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test"} | settings
    (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML


CAPITALS = [{"q": "France?", "a": "Paris"}, {"q": "Italy?", "a": "Rome"}, {"q": "Spain?", "a": "Madrid"}]


def asks_for_capitals(folder: Path, **settings: object) -> Benchmark:
    exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    corpus = {"metric": "bleu", "aggregation": "bleu", "higher_is_better": True}
    defaults = {
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": "\n"},
        "metric_list": [exact, corpus],
    }
    write_task(folder, "capitals", CAPITALS, **(defaults | settings))
    return lm_eval_benchmark(["capitals"], folder)


def asked(benchmark: Benchmark, options: Options | None = None) -> list[Generation]:
    model = Scripted()
    benchmark.run(session(benchmark, model, options=options))
    return [request for request in model.asked if isinstance(request, Generation)]


def test_a_task_of_ones_own_folder_is_scored(tmp_path: Path) -> None:
    benchmark = asks_for_capitals(tmp_path)
    assert [metric.name for metric in benchmark.metrics] == ["exact_match"]  # BLEU of a corpus is no mean over items
    items = benchmark.run(session(benchmark, Scripted(lambda r: "Rome" if r.prompt == "Italy?" else "Berlin")))
    assert [(item.item, dict(item.marks)) for item in items] == [
        ("capitals/0", {"exact_match": 0.0}),
        ("capitals/1", {"exact_match": 1.0}),
        ("capitals/2", {"exact_match": 0.0}),
    ]
    assert items[1].record == {"prompt": "Italy?", "expected": "Rome", "answer": "Rome"}


def test_metrics_of_several_filters_are_told_apart(tmp_path: Path) -> None:
    first = {"function": "take_first"}
    pattern = {"function": "regex", "regex_pattern": "is (\\w+)"}
    filters = [{"name": "raw", "filter": [first]}, {"name": "behind-is", "filter": [pattern, first]}]
    benchmark = asks_for_capitals(tmp_path, filter_list=filters)
    items = benchmark.run(session(benchmark, Scripted(lambda request: "It is Paris.")))
    assert items[0].marks == {"exact_match:raw": 0.0, "exact_match:behind-is": 1.0}
    assert items[0].record["extracted"] == {"raw": "It is Paris.", "behind-is": "Paris"}


def test_groups_and_several_tasks_become_one_benchmark(tmp_path: Path) -> None:
    asks_for_capitals(tmp_path)
    choice = {"output_type": "multiple_choice", "doc_to_choice": ["Paris", "Rome", "Madrid"]}
    write_task(tmp_path, "choose", CAPITALS, doc_to_text="{{q}}", doc_to_target="{{a}}", **choice)
    (tmp_path / "both.yaml").write_text(json.dumps({"group": "both", "task": ["capitals", "choose"]}))
    benchmark = lm_eval_benchmark(["both", "choose"], tmp_path)
    assert [metric.name for metric in benchmark.metrics] == ["exact_match", "acc", "acc_norm"]
    model = Scripted(log_prob=lambda request: float(request.continuation == " Paris"))
    items = {item.item: item for item in benchmark.run(session(benchmark, model))}
    assert len(items) == 6
    assert items["choose/0"].marks == {"acc": 1.0, "acc_norm": 1.0}
    assert items["choose/0"].record["log_probs"] == {" Paris": 1.0, " Rome": 0.0, " Madrid": 0.0}
    assert items["choose/1"].record["expected"] == "Rome"


@pytest.mark.parametrize(
    ("settings", "options", "expected"),
    [
        ({"until": "\n"}, {}, (256, ("\n",), 0.0, 1.0)),
        (
            {"until": ["a", "b"], "max_gen_toks": 7, "do_sample": False, "temperature": 0.5},
            {},
            (7, ("a", "b"), 0.0, 1.0),
        ),
        ({"until": [], "do_sample": True, "temperature": 0.5, "top_p": 0.9}, {}, (256, (), 0.5, 0.9)),
        ({"until": "\n"}, {"max_new_tokens": 3, "temperature": 0.7}, (3, ("\n",), 0.7, 1.0)),
        ({"until": "\n", "do_sample": True, "temperature": 0.5}, {"temperature": 0.0}, (256, ("\n",), 0.0, 1.0)),
    ],
)
def test_a_tasks_settings_reach_the_model_and_options_come_first(
    tmp_path: Path, settings: dict[str, object], options: dict[str, Any], expected: tuple[object, ...]
) -> None:
    request, *_ = asked(asks_for_capitals(tmp_path, generation_kwargs=settings), Options(**options))
    assert (request.max_new_tokens, request.stop, request.temperature, request.top_p) == expected


def test_repeats_are_several_samples_of_one_prompt(tmp_path: Path) -> None:
    requests = asked(asks_for_capitals(tmp_path, repeats=3), Options(limit=2))
    assert [(request.prompt, request.sample) for request in requests] == [
        (prompt, sample) for prompt in ("France?", "Italy?") for sample in (0, 1, 2)
    ]


def test_shots_are_the_first_of_the_examples_and_never_more_than_there_are() -> None:
    def prompt(benchmark: Benchmark, shots: int) -> str:
        (item,) = benchmark.run(session(benchmark, Scripted(), options=Options(limit=1, shots=shots)))[:1]
        return str(item.record["prompt"])

    assert prompt(table.GSM8K, 0).count("Q:") == 1
    assert prompt(table.MMLU, 2).count("Answer:") == 3
    for benchmark, shots, problem in [
        (table.MMLU, 6, "which has 5"),
        (table.DROP, 4, "which has 4"),  # lm-eval draws one more
        (table.CRASS, 1, "its own questions"),
    ]:
        with pytest.raises(UsageError, match=problem):
            prompt(benchmark, shots)


def test_perplexity_of_texts_is_refused(tmp_path: Path) -> None:
    mean = [{"metric": "byte_perplexity", "aggregation": "mean"}]
    benchmark = asks_for_capitals(
        tmp_path, output_type="loglikelihood_rolling", generation_kwargs=None, metric_list=mean
    )
    with pytest.raises(UsageError, match="perplexity of whole texts"):
        benchmark.run(session(benchmark, Scripted()))


def test_tasks_that_cannot_be_scored_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none of its metrics is a mean"):
        asks_for_capitals(tmp_path, metric_list=[{"metric": "bleu", "aggregation": "bleu", "higher_is_better": True}])
    benchmark = asks_for_capitals(tmp_path, unsafe_code=True)
    with pytest.raises(UsageError, match="runs code"):
        benchmark.run(session(benchmark, Scripted()))
    with pytest.raises(UsageError, match="no such folder"):
        lm_eval_benchmark(["capitals"], tmp_path / "nowhere")


def test_rows_that_cannot_be_had_are_named(tmp_path: Path) -> None:
    benchmark = asks_for_capitals(tmp_path)
    (tmp_path / "capitals.jsonl").unlink()
    with pytest.raises(RequirementError, match="cannot load capitals"):
        benchmark.run(session(benchmark, Scripted()))


@pytest.mark.slow  # lm-eval reads the whole registry for it
def test_an_unknown_task_is_answered_with_near_names() -> None:
    with pytest.raises(UsageError, match="no task 'helaswag'") as caught:
        lm_eval_benchmark(["helaswag"])
    assert "hellaswag" in caught.value.hint


def test_the_models_progress_is_shown_and_lm_evals_is_not(capfd: pytest.CaptureFixture[str]) -> None:
    def answer(request: Generation) -> str:
        print("a step", file=sys.stderr)
        return ""

    table.GSM8K.run(session(table.GSM8K, Scripted(answer), options=Options(limit=2)))
    assert capfd.readouterr() == ("", "a step\na step\n")


def in_process(script: str, home: Path) -> str:
    """Return what a process prints that has a home folder of its own and no network."""
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith(("HF_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROWS.parent)],
        env=environment | {"HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


RUN_ALL = """
import sys
from fedcli.eval.benchmarks import lm_eval_by_name, lm_eval_tasks as table
print(sorted({"lm_eval", "datasets", "torch", "transformers", "numpy"} & set(sys.modules)))
sys.path.insert(0, sys.argv[1])
from support.scripted import Scripted, session
for benchmark in table.BENCHMARKS:
    benchmark.run(session(benchmark, Scripted()))
"""
RUN_ALL_FROM_THE_HUB = """
import sys
sys.path.insert(0, sys.argv[1])
from fedcli.errors import RequirementError
from fedcli.eval.benchmark import Session
from fedcli.eval.benchmarks import lm_eval_tasks as table
from fedcli.eval.data import Files
from support.scripted import Scripted
for benchmark in table.BENCHMARKS:
    try:
        benchmark.run(Session(Scripted(), Files(benchmark.name, benchmark.data, ())))
    except RequirementError as error:
        assert "the hub does not give it: " in error.message and benchmark.data.url in error.hint, error.message
        print(benchmark.name)
"""


@pytest.mark.slow
def test_the_table_loads_nothing_heavy_and_local_rows_leave_nothing_in_the_home_folder(tmp_path: Path) -> None:
    assert in_process(RUN_ALL, tmp_path) == "[]\n"
    assert [*tmp_path.rglob("*")] == []


def test_without_files_and_network_the_data_is_named_and_where_to_get_it(tmp_path: Path) -> None:
    printed = in_process(RUN_ALL_FROM_THE_HUB, tmp_path)
    assert printed.split() == [benchmark.name for benchmark in table.BENCHMARKS]
