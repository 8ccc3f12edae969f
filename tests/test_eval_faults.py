"""Faults that a reader found in the evaluation: each is one clear error, or a note, and nothing is mixed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.judge_server import JudgeServer
from support.processes import fedcli
from support.scripted import ROWS

from fedcli.eval.sandbox import Program, Sandbox


def evaluate(folder: Path, *arguments: object, code: int = 0) -> dict:
    done = fedcli("eval", *arguments, "--json", cwd=folder)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)


def test_a_bad_file_of_a_benchmark_stops_no_round(small: Path) -> None:
    shutil.copytree(ROWS / "mmlu", small / "bad/mmlu", symlinks=True)
    for path in (small / "bad/mmlu/test").iterdir():
        path.write_text("")
    config = small / "fedcli.yaml"
    config.write_text(config.read_text() + "eval: {every: 1, benchmarks: [mmlu, demo], data: bad, limit: 3}\n")
    (small / "bad/held-out-test.jsonl").symlink_to(small / "data/held-out-test.jsonl")
    done = fedcli("run", cwd=small)
    assert done.returncode == 0, done.stderr
    assert "round 1 is published, but could not be scored: mmlu@limit=3: the files of mmlu" in done.stderr
    assert "are not as published" in done.stderr
    assert (small / "rounds/00002/manifest.json").is_file()
    assert (small / "eval/round-00002/demo@limit=3.json").is_file()  # what can be scored is


def test_two_endpoints_of_one_model_do_not_share_answers(small: Path) -> None:
    line = ("advbench", "--api", "m", "--data", ROWS, "--limit", 2, "--api-url")
    with JudgeServer(lambda body: "I'm sorry.") as one, JudgeServer(lambda body: "Sure.") as other:
        (first,) = evaluate(small, *line, one.url)["scores"]
        (second,) = evaluate(small, *line, other.url)["scores"]
    assert first["target"] != second["target"]
    assert [record["scores"]["refusal_rate"]["value"] for record in (first, second)] == [1, 0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fpb", "--shots", 5], "fpb takes no --shots"),
        (["demo", "--samples", 3], "demo takes no --samples"),
        (["hhh", "--temperature", 0.5], "hhh takes no --temperature"),
        (["fpb", "--api-url", "http://localhost:1/v1"], "no --api"),
        (["fpb", "--base", "--judge-url", "http://localhost:1/v1"], "no --judge-model"),
        (["vicuna", "--base", "--judge-model", "./nowhere"], "no such folder"),
        (["mt-bench-pairwise", "--base"], "needs a --baseline"),
        (["mt-bench-pairwise", "--base", "--baseline", "../.."], "no answers of '../..'"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(small: Path, arguments: list, words: str) -> None:
    error = evaluate(small, *arguments, "--data", ROWS, code=2)["error"]
    assert words in error["message"]
    assert not (small / "eval").exists()


def test_an_option_that_one_of_the_benchmarks_obeys_holds_for_that_one_and_says_so(small: Path) -> None:
    line = ("advbench", "hhh", "--base", "--data", ROWS, "--limit", 2, "--max-new-tokens", 3)
    records = {record["benchmark"]: record for record in evaluate(small, *line)["scores"]}
    assert records["advbench"]["variant"] == "limit=2,max-new-tokens=3"
    assert records["hhh"]["variant"] == "limit=2"
    done = fedcli("eval", *line, cwd=small)
    assert done.returncode == 0, done.stderr
    assert "--max-new-tokens changes nothing of hhh: it holds for the other benchmarks" in done.stderr


def test_data_that_is_missing_shows_before_anything_is_asked(small: Path, tmp_path: Path) -> None:
    shutil.copytree(ROWS / "fpb", tmp_path / "data/fpb")
    error = evaluate(small, "fpb", "drop", "--base", "--data", tmp_path / "data", code=8)["error"]
    assert "the data of drop is not here" in error["message"]
    assert not (small / "eval").exists()


def test_an_adapter_that_is_not_finite_is_told(small: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small / "rounds/00000/adapter", tmp_path / "broken"))
    arrays = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: np.full_like(array, np.nan) for name, array in arrays.items()}, folder / "adapter_model.safetensors"
    )
    error = evaluate(small, "hhh", "--adapter", folder, "--data", ROWS, code=3)["error"]
    assert "not finite" in error["message"]


def test_a_damaged_score_is_named_and_scored_again_for_nothing(small: Path) -> None:
    whole = evaluate(small, "demo", "--base", "--limit", 5)
    path = small / "eval/base/demo@limit=5.json"
    path.write_text(path.read_text()[:100])
    error = evaluate(small, "table", code=7)["error"]
    assert str(path) in error["message"]
    assert "score again" in error["hint"]
    again = evaluate(small, "demo", "--base", "--limit", 5)
    assert again["scores"][0]["scores"] == whole["scores"][0]["scores"]
    assert evaluate(small, "table")["scores"]


def test_an_ad_hoc_task_cannot_leave_its_folder(small: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "2+2=", "a": "4"}\n')
    (tmp_path / "task.yaml").write_text(
        f"task: my/../../../task\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    before = {path for path in small.rglob("*") if "eval" not in path.parts}
    (record,) = evaluate(small, "lm-eval", "my/../../../task", "--include", tmp_path, "--base")["scores"]
    assert {path for path in small.rglob("*") if "eval" not in path.parts} == before
    assert (small / "eval/base" / f"{record['benchmark']}.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [
        "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.shmat.restype = ctypes.c_void_p\n"
        "for _ in range(3):\n"
        "    where = libc.shmat(libc.shmget(0, 2**30, 0o1600), None, 0)\n"
        "    ctypes.memset(where, 1, 2**30)\n"
        "    libc.shmdt(ctypes.c_void_p(where))\n",
        "import os, time\nfiles = []\n"
        "for _ in range(20):\n    if not os.fork():\n        break\n"
        "for _ in range(100):\n    files.append(os.memfd_create('x'))\n    os.write(files[-1], bytes(2**23 - 1))\n"
        "time.sleep(5)\n",
    ],
    ids=["System V segments", "memfds"],
)
def test_memory_that_no_process_has_mapped_counts(sandbox: Sandbox, source: str) -> None:
    (run,) = sandbox.run_all([Program(source, 60)])
    assert run.outcome == "too much memory", run.output
