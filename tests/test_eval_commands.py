"""`fedcli eval` as a user meets it: what is scored, what survives a kill, what is asked again, and mistakes.

The rows are TFNS's (text,label), written here; the answers are those of the built-in model and its adapters.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.processes import SMALL, fedcli, settings, warm
from support.scripted import ROWS

from fedcli.eval.registry import BENCHMARKS
from fedcli.model.base import find_base
from fedcli.model.lora import lora_config
from fedcli.workspace.layout import Workspace
from fedcli.workspace.locks import hold

SHARED = Path(os.environ.get("FEDCLI_TEST_DATA", Path(__file__).parents[2] / "shared/data"))
TWEETS = 24
WEIGHTS = "adapter_model.safetensors"


def write_tweets(path: Path, count: int, word: str = "shares") -> Path:
    """Write TFNS's validation file with texts of many lengths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows([f"$AB{n} {word} " * (1 + n % 9) + f"up, {n} percent", n % 3] for n in range(count))
    return path.parent


class Place:
    """A workspace whose federation has finished, and a folder with tweets beside it."""

    def __init__(self, folder: Path) -> None:
        self.workspace = folder / "w"
        self.base = folder / "base"
        self.data = folder / "rows"

    def run(self, *arguments: object, code: int = 0, environment: dict[str, str] | None = None):
        """Run `fedcli eval ...` in the workspace; what fails must do so with one clear error."""
        done = warm()("eval", *arguments, cwd=self.workspace, environment=environment)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.count("fedcli: error: ") == (code != 0)
        return done

    def score(self, *arguments: object) -> dict[str, dict[str, Any]]:
        """Score something, and return the records by target."""
        if "--data" not in arguments:
            arguments = (*arguments, "--data", self.data)
        done = self.run(*arguments, "--json")
        assert done.stderr == ""
        return {record["target"]: record for record in json.loads(done.stdout)["scores"]}

    def items(self, target: str, name: str) -> list[dict[str, Any]]:
        path = self.workspace / "eval" / target / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def answers(self, target: str, name: str = "tfns") -> Path:
        """Return the file of all answers."""
        return self.workspace / "eval" / target / f"{name}.answers.jsonl"

    def num_answers(self, target: str, name: str = "tfns") -> int:
        return len(self.answers(target, name).read_text().splitlines())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A federation of two rounds on a copy of the built-in model, with the baselines alone-0 and pooled."""
    place = Place(tmp_path_factory.mktemp("finished"))
    shutil.copytree(find_base("builtin:tiny", revision=None, root=Path()), place.base)
    place.workspace.mkdir()
    # A learning rate that changes what the base says within two steps
    overrides = settings(*SMALL, f"model.base={place.base}", "train.learning_rate=0.02")
    for command in (["init", ".", *overrides], ["run"], ["train-alone", "--id", 0], ["train-pooled"]):
        done = fedcli(*command, cwd=place.workspace)
        assert done.returncode == 0, done.stderr
    write_tweets(place.data / "tfns/sent_valid.csv", TWEETS)
    return place


@pytest.fixture
def place(finished: Place, tmp_path: Path) -> Place:
    """A copy of the finished federation, with no scores; the base model stays where it was."""
    shutil.copytree(finished.workspace, tmp_path / "w", ignore=shutil.ignore_patterns("eval"))
    shutil.copytree(finished.data, tmp_path / "rows")
    own = Place(tmp_path)
    own.base = finished.base
    return own


def write_adapter(folder: Path, modules: dict[str, int], *, rank: int = 4, width: int = 64, layers: int = 2) -> Path:
    """Write an adapter in PEFT's layout for a Llama, of modules with their input's size; its values change answers."""
    generator = np.random.default_rng(1)
    arrays = {
        f"base_model.model.model.layers.{layer}.{module}.lora_{side}.weight": generator.normal(size=shape)
        for layer in range(layers)
        for module, size in modules.items()
        for side, shape in (("A", (rank, size)), ("B", (width, rank)))
    }
    folder.mkdir()
    save_file({name: array.astype(np.float32) / 3 for name, array in arrays.items()}, folder / WEIGHTS)
    config = lora_config(rank=rank, alpha=8, dropout=0, target_modules=[*modules], base=None)
    config["target_modules"] = [module.rpartition(".")[2] for module in modules]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# Targets


@pytest.mark.slow
def test_every_kind_of_target_is_scored_in_one_process(place) -> None:
    other = write_adapter(place.workspace.parent / "other", {"self_attn.k_proj": 64, "mlp.down_proj": 176}, rank=2)
    copy = shutil.copytree(place.base, place.workspace.parent / "copy")
    found = place.score(
        *("tfns-likelihood", "--base", "--round", 1, "--round", "latest", "--client", 0, "--alone", 0, "--pooled"),
        *("--adapter", "rounds/00002/adapter", "--adapter", other, "--adapter", "rounds/00001/adapter"),
        *("--model", f"{copy}/"),
    )
    kinds = ["base", "alone-0", "pooled", "client-0-round-00001", "round-00001", "round-00002"]
    assert list(found)[:6] == kinds
    latest, outside, first, model = list(found)[6:]
    assert [name.rpartition("-")[0] for name in (latest, outside, first, model)] == [
        "adapter-adapter",
        "adapter-other",
        "adapter-adapter",
        "model-copy",
    ]
    items = {target: place.items(target, "tfns-likelihood") for target in found}
    assert items[latest] == items["round-00002"]
    assert items[first] == items["round-00001"]  # after an adapter of other modules was in the model
    assert items[model] == items["base"]
    different = [*kinds, outside]
    assert len({json.dumps(items[target]) for target in different}) == len(different)
    assert found[latest]["scores"] == found["round-00002"]["scores"]
    assert found["base"]["num_items"] == TWEETS


def test_without_a_target_all_that_the_workspace_holds_is_scored(place) -> None:
    assert list(place.score("tfns", "--limit", 1)) == ["base", "alone-0", "pooled", "round-00002"]


@pytest.mark.slow
def test_a_clients_last_valid_update_is_scored_and_an_invalid_later_one_passed_over(place) -> None:
    (before,) = place.score("tfns", "--client", 1, "--limit", 2)
    inbox = place.workspace / "inbox" / "1"
    shutil.copytree(inbox / "round-00001", inbox / "round-00002")  # of another round than it says
    (inbox / "round-00003").mkdir()  # of a round that there is not
    assert list(place.score("tfns", "--client", 1, "--limit", 2)) == [before] == ["client-1-round-00001"]
    weights = inbox / "round-00001" / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert list(place.score("tfns", "--client", 1, "--limit", 2)) == ["client-1-round-00000"]
    shutil.rmtree(inbox)
    assert "client 1 has sent no valid update" in place.run("tfns", "--client", 1, code=6).stderr


FAULTS = [
    *("narrower", "other modules", "torn", "no json"),
    *(pytest.param(fault) for fault in ("deeper", "shallower", "other names")),
]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_of_another_base_is_refused(place, fault) -> None:
    sizes = {"narrower": {"width": 32}, "deeper": {"layers": 3}, "shallower": {"layers": 1}}.get(fault, {})
    folder = write_adapter(place.workspace.parent / "outside", {"self_attn.q_proj": sizes.get("width", 64)}, **sizes)
    weights, described = folder / WEIGHTS, folder / "adapter_config.json"
    if fault == "other modules":
        described.write_text(described.read_text().replace("q_proj", "c_attn"))
    if fault == "other names":
        weights.write_bytes(weights.read_bytes().replace(b"self_attn", b"attention"))
    if fault == "torn":
        weights.write_bytes(weights.read_bytes()[:100])
    if fault == "no json":
        described.write_text("{")
    done = place.run("tfns", "--adapter", folder, "--data", place.data, "--limit", 2, code=3)
    assert f"{folder} holds no adapter of this base model" in done.stderr
    assert list(place.workspace.glob("eval/*/tfns@limit=2.json")) == []


# Answers that survive


def kill_after(place: Place, num_answers: int, *arguments: object, torn: bool = False) -> None:
    """Run `fedcli eval` until so many answers are kept, and kill it there, before or in the middle of the next."""
    code = f"""
import os, signal
from fedcli.cli import main
from fedcli.workspace import scores
written, kept = os.write, 0
def write(descriptor, contents):
    global kept
    if b'"answer"' in bytes(contents):
        kept += 1
    if kept > {num_answers}:
        {"written(descriptor, bytes(contents)[: len(contents) // 2])" if torn else "pass"}
        os.kill(os.getpid(), signal.SIGKILL)
    return written(descriptor, contents)
os.write = write
main({["eval", *map(str, arguments)]!r})
"""
    assert warm()("-c", code, cwd=place.workspace).returncode == -signal.SIGKILL
    assert place.num_answers("base") == num_answers + torn


@pytest.mark.slow
@pytest.mark.parametrize("torn", [False, True], ids=["between answers", "in the middle of one"])
def test_after_a_kill_only_what_is_missing_is_asked_and_the_scores_are_the_same(place, finished, torn) -> None:
    asked = ("tfns", "--base", "--data", place.data)
    undisturbed = finished.score("tfns", "--base")["base"]
    kill_after(place, 10, *asked, "--batch-size", 1, torn=torn)
    assert not (place.workspace / "eval/base/tfns.json").exists()
    kept = place.answers("base").read_text().splitlines()[:10]
    resumed = place.score(*asked, "--batch-size", 5)["base"]
    lines = place.answers("base").read_text().splitlines()
    assert lines[:10] == kept
    assert len(lines) == TWEETS + torn  # none is asked twice, and the half of one is passed over
    assert resumed["scores"] == undisturbed["scores"]
    assert place.items("base", "tfns") == finished.items("base", "tfns")
    assert place.score(*asked)["base"]["scores"] == undisturbed["scores"]
    assert len(place.answers("base").read_text().splitlines()) == TWEETS + torn


@pytest.mark.slow
def test_a_long_evaluation_that_is_killed_from_outside_goes_on(place) -> None:
    write_tweets(place.data / "tfns/sent_valid.csv", 600)
    asked = ("tfns", "--base", "--data", place.data, "--max-new-tokens", 2)
    ended: list[int] = []
    command = ("eval", *asked, "--batch-size", 1)
    thread = Thread(target=lambda: ended.append(warm()(*command, cwd=place.workspace).returncode))
    thread.start()
    deadline = time.monotonic() + 300
    while not place.answers("base").exists() or place.num_answers("base") < 20:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(json.loads((place.workspace / "eval/base/.tfns.lock").read_text())["pid"], signal.SIGKILL)
    thread.join()
    assert ended == [-signal.SIGKILL]
    kept = place.num_answers("base")
    assert 20 <= kept < 600
    record = place.score(*asked)["base"]
    assert place.num_answers("base") <= 600 + 1  # what was kept was not asked again; a line may be torn
    assert record["num_items"] == 600
    items = place.items("base", "tfns@max-new-tokens=2")
    some = place.score(*asked, "--adapter", "rounds/00000/adapter", "--limit", 200)  # B is zero: it says what base does
    (outside,) = (target for target in some if target != "base")
    fresh = place.items(outside, "tfns@limit=200,max-new-tokens=2")
    assert [item["answer"] for item in fresh] == [item["answer"] for item in items[:200]]


@pytest.mark.slow
def test_a_target_that_another_process_scores_is_busy_and_other_targets_are_not(place) -> None:
    lock = Workspace(place.workspace).eval_lock("base", "tfns")
    with hold(lock, "the test"):
        for arguments in (("tfns", "--base"), ("tfns", "--base", "--limit", 3)):  # they share the answers
            done = place.run(*arguments, "--data", place.data, code=5)
            assert "another process is busy with tfns of base" in done.stderr
            assert str(os.getpid()) in done.stderr
        assert list(place.score("tfns", "--round", 2, "--limit", 2)) == ["round-00002"]
    assert list(place.score("tfns", "--base", "--limit", 2)) == ["base"]


# What is asked again


@pytest.fixture
def unloadable(place) -> Iterator[Callable[[], None]]:
    """Break the workspace's base model, which is the place's own then, when called."""
    own = place.workspace.parent / "base"
    shutil.copytree(place.base, own)
    text = (place.workspace / "fedcli.yaml").read_text()
    assert str(place.base) in text
    (place.workspace / "fedcli.yaml").write_text(text.replace(str(place.base), str(own)))
    return lambda: shutil.rmtree(own)


@pytest.mark.slow
def test_what_has_been_answered_needs_no_model_and_what_has_not_does(place, unloadable) -> None:
    targets = ("--base", "--round", 2, "--client", 0, "--alone", 0, "--adapter", "rounds/00001/adapter")
    before = place.score("tfns", *targets)
    unloadable()
    after = place.score("tfns", *targets)
    assert [record["scores"] for record in after.values()] == [record["scores"] for record in before.values()]
    again = place.score("tfns", *targets, "--limit", 4)  # a part of what was asked
    assert all(record["num_items"] == 4 for record in again.values())
    for changed in (("--template", "vicuna"), ("--max-new-tokens", 3), ("--temperature", 0.5)):
        assert "base model not found" in place.run("tfns", "--base", "--data", place.data, *changed, code=8).stderr
    write_tweets(place.data / "tfns/sent_valid.csv", TWEETS, word="bonds")
    assert "base model not found" in place.run("tfns", "--base", "--data", place.data, code=8).stderr


@pytest.mark.slow
def test_a_changed_setting_asks_again_and_the_old_one_still_has_its_answers(place) -> None:
    first = place.score("tfns", "--base", "--limit", 6)["base"]
    items = place.items("base", "tfns@limit=6")
    num_answers = 6
    for changed in (("--template", "vicuna"), ("--max-new-tokens", 3), ("--temperature", 0.9)):
        found = place.score("tfns", "--base", "--limit", 6, *changed)["base"]
        num_answers += 6
        assert place.num_answers("base") == num_answers
        assert found["variant"] != first["variant"]
    assert place.score("tfns", "--base", "--limit", 8)["base"]["num_items"] == 8
    assert place.num_answers("base") == num_answers + 2
    assert place.score("tfns", "--base", "--limit", 6)["base"]["scores"] == first["scores"]
    assert place.items("base", "tfns@limit=6") == items
    write_tweets(place.data / "tfns/sent_valid.csv", TWEETS, word="bonds")
    place.score("tfns", "--base", "--limit", 6)
    assert place.num_answers("base") == num_answers + 8
    assert [item["text"] for item in place.items("base", "tfns@limit=6")] != [item["text"] for item in items]


@pytest.mark.slow
def test_a_baseline_that_was_trained_anew_and_another_adapter_of_the_name_have_answers_of_their_own(place) -> None:
    name = "tfns-likelihood"
    outside = place.workspace.parent / "adapter"
    shutil.copytree(place.workspace / "rounds/00001/adapter", outside)
    targets = ("--alone", 0, "--adapter", outside, "--limit", 3)
    first = place.score(name, *targets)
    before = {target: place.items(target, f"{name}@limit=3") for target in first}
    text = (place.workspace / "fedcli.yaml").read_text()
    (place.workspace / "fedcli.yaml").write_text(text.replace("learning_rate: 0.02", "learning_rate: 0.01"))
    assert fedcli("train-alone", "--id", 0, cwd=place.workspace).returncode == 0
    shutil.rmtree(outside)
    shutil.copytree(place.workspace / "rounds/00002/adapter", outside)
    second = place.score(name, *targets)
    after = {target: place.items(target, f"{name}@limit=3") for target in second}
    (alone, old), (alone_anew, new) = first, second
    assert alone == alone_anew == "alone-0"
    assert after[alone] != before[alone]
    assert old != new
    assert after[new] != before[old]
    assert place.num_answers("alone-0", name) == 2 * 3 * 3


def test_prompts_that_were_cut_are_told_with_the_scores_also_by_a_run_that_asks_nothing(place) -> None:
    write_tweets(place.data / "tfns/sent_valid.csv", 4, word="shares " * 600)
    for _ in range(2):
        record = place.score("tfns", "--base")["base"]
        assert [note for note in record["notes"] if "lost their beginning" in note] == [
            "4 prompts (each choice counts) of those that were asked last are longer than the model's context, "
            "and lost their beginning"
        ]
        assert record["num_generated_tokens"] > 0


# Mistakes and accidents


MISTAKES: list[tuple[int, list[str], list[str]]] = [
    (2, ["tfsn", "--base"], ["unknown benchmark 'tfsn'", "Did you mean tfns?", "fedcli eval list"]),
    (2, ["tfns", "--base", "--data", "/nowhere"], ["--data /nowhere: no such folder"]),
    (2, ["tfns", "--client", "7"], ["there is no client 7", "ids 0 to 2"]),
    (2, ["tfns", "--alone", "1"], ["there is no baseline alone-1", "fedcli train-alone --id 1"]),
    (6, ["tfns", "--round", "99"], ["there is no round 99 yet"]),
    (2, ["tfns", "--round", "last"], ["--round last: no such round", "latest"]),
    (2, ["tfns", "--base", "--template", "vicunia"], ["unknown template 'vicunia'", "Did you mean vicuna?"]),
    (
        2,
        ["tfns", "--base", "--backend", "vllm"],
        ["no --backend any more", "vllm serve", "--api NAME --api-url http://"],
    ),
    (2, ["tfns", "--adapter", "/nowhere"], ["--adapter /nowhere holds no adapter_config.json"]),
    (8, ["tfns", "--model", "/nowhere"], ["/nowhere does not exist", "--model"]),
    (8, ["tfns", "--api", "gpt-4o"], ["gpt-4o needs a key", "OPENAI_API_KEY"]),
    (8, ["tfns", "--api", "m", "--api-url", "http://127.0.0.1:9/v1"], ["http://127.0.0.1:9/v1", "cannot be reached"]),
    (2, ["tfns", "--api", "m", "--api-url", "localhost:9"], ["localhost:9 is no URL"]),
    (2, ["tfns", "--base", "--include", "."], ["--include is for `fedcli eval lm-eval TASK`"]),
    (2, ["lm-eval"], ["no task is named"]),
    (8, ["nwgi", "--base"], ["the data of nwgi is not here: nwgi*test*.jsonl", "https://", "--data DIR", "nwgi/"]),
    (8, ["vicuna", "--base", "--judge-model", "gpt-4"], ["gpt-4 needs a key", "OPENAI_API_KEY"]),
]


@pytest.mark.parametrize(("code", "arguments", "named"), MISTAKES, ids=str)
def test_a_mistake_is_told_in_one_clear_error(finished, code, arguments, named) -> None:
    if "--data" not in arguments:
        arguments = [*arguments, "--data", str(finished.data)]
    done = finished.run(*arguments, "--json", code=code, environment={"OPENAI_API_KEY": ""})
    error = json.loads(done.stdout)["error"]
    assert error["exit_code"] == code
    assert all(part in f"{error['message']} {error['hint']}" for part in named), error
    assert done.stderr == f"fedcli: error: {error['message']}\n  {error['hint']}\n"


def test_an_unreachable_judge_stops_the_scoring_and_the_answers_are_kept(place) -> None:
    judge = ("--judge-model", "m", "--judge-url", "http://127.0.0.1:9/v1", "--yes")
    done = place.run("vicuna", "--base", "--limit", 2, "--max-new-tokens", 4, "--data", ROWS, *judge, code=8)
    assert "the endpoint http://127.0.0.1:9/v1 (m) cannot be reached" in done.stderr
    place.score("vicuna", "--base", "--limit", 2, "--max-new-tokens", 4, "--data", ROWS)
    assert place.num_answers("base", "vicuna") == 2


def test_benchmarks_are_found_by_the_environment_and_by_a_relative_folder(place) -> None:
    given = {"FEDCLI_BENCHMARKS": f"/nowhere:{place.data}"}
    assert place.run("tfns", "--base", "--limit", 2, environment=given).stderr == ""
    place.run("tfns", "--base", "--limit", 2, environment={"FEDCLI_BENCHMARKS": "../rows"})
    place.score("tfns", "--base", "--limit", 2, "--data", "../rows")
    assert place.num_answers("base") == 2


def test_a_row_that_is_not_as_published_is_named(place) -> None:
    path = place.data / "tfns/sent_valid.csv"
    path.write_text("text,label\na,1\nb,7\n")
    done = place.run("tfns", "--base", "--data", place.data, code=3)
    assert f"{path}, row 2: label is '7', not 0, 1 or 2" in done.stderr


@pytest.mark.slow
def test_a_full_disk_stops_an_evaluation_and_what_was_answered_is_kept(place) -> None:
    limited = f"""
import os, resource, sys
from fedcli.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
code = main({["eval", "tfns", "--base", "--data", str(place.data), "--batch-size", "2"]!r})
sys.stdout.flush(), sys.stderr.flush(), os._exit(code)
"""
    done = warm()("-c", limited, cwd=place.workspace)
    assert done.returncode == 4, done.stderr
    path = place.answers("base")
    for part in (f"fedcli: error: cannot write {path}: File too large", "nothing is lost"):
        assert part in done.stderr
    kept = path.read_bytes().count(b"\n")
    assert 5 <= kept < TWEETS
    record = place.score("tfns", "--base")["base"]
    assert record["num_items"] == TWEETS
    assert path.read_bytes().count(b"\n") in (TWEETS, TWEETS + 1)  # of one, half was written


def test_a_read_only_folder_of_scores_is_told(place) -> None:
    folder = place.workspace / "eval"
    folder.mkdir()
    if os.geteuid() == 0:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True, text=True)
        if mounted.returncode != 0:
            pytest.skip(f"cannot mount here: {mounted.stderr.strip()}")
    else:
        folder.chmod(0o555)
    try:
        done = place.run("tfns", "--base", "--data", place.data, code=4)
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", folder], check=True)
    assert f"cannot write {folder}" in done.stderr


# What there is


def test_the_list_names_every_benchmark_with_its_metrics_and_marks_what_is_here(tmp_path) -> None:
    write_tweets(tmp_path / "rows/tfns/sent_valid.csv", 1)
    listed = {}
    for data in ([], ["--data", tmp_path / "rows"]):
        done = fedcli("eval", "list", *data, "--json", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        document = json.loads(done.stdout)
        assert [entry["name"] for entry in document] == list(BENCHMARKS)
        for entry in document:
            assert isinstance(entry["group"], str)
            assert entry["metrics"] == [metric.name for metric in BENCHMARKS[entry["name"]].metrics]
            assert entry["metrics"]
        listed[bool(data)] = {entry["name"]: entry["data"] for entry in document}
    assert listed[False]["tfns"] in ("publisher", "cached")
    assert (listed[True]["tfns"], listed[True]["finance"]) == ("local", listed[False]["finance"])
    group = json.loads(fedcli("eval", "list", "--group", "finance", "--json", cwd=tmp_path).stdout)
    assert {entry["name"] for entry in group} == {
        name for name, benchmark in BENCHMARKS.items() if "finance" in benchmark.groups
    }
    assert fedcli("eval", "list", "--group", "finanse", cwd=tmp_path).returncode == 2


def test_the_list_marks_the_shared_data_as_local(tmp_path) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED}")
    listed = json.loads(fedcli("eval", "list", "--data", SHARED, "--json", cwd=tmp_path).stdout)
    local = {entry["name"] for entry in listed if entry["data"] == "local"}
    wanted = {"fpb", "fiqa", "tfns", "nwgi", "finance", "fpb-likelihood", "hhh", "advbench", "mt-bench", "vicuna"}
    assert wanted | {"mmlu", "bbh", "crass", "gsm8k", "humaneval", "mbpp"} <= local
    assert all("data" not in entry["missing"] for entry in listed if entry["name"] in local)


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_runs_end_to_end_on_rows_of_the_publishers_format(finished, name, request) -> None:
    benchmark = BENCHMARKS[name]
    allowed = ["--allow-code-execution"] if "code-execution" in benchmark.needs else []
    if allowed:
        request.getfixturevalue("sandbox")
    if benchmark.answers_of is not None:
        finished.run(benchmark.answers_of, "--round", 0, "--limit", 2, "--data", ROWS)
        allowed = ["--baseline", "round-00000"]
    found = finished.run(name, "--base", "--limit", 2, "--data", ROWS, *allowed, "--json")
    *parts, record = json.loads(found.stdout)["scores"]
    assert [part["benchmark"] for part in parts] == list(benchmark.parts)
    assert (record["benchmark"], record["target"]) == (name, "base")
    assert record["variant"] == ("baseline=round-00000,limit=2" if benchmark.answers_of else "limit=2")
    assert record["num_items"] >= 1
    awaits = "judge" if "judge" in benchmark.needs else None
    assert record["awaits"] == awaits
    if awaits is None:
        assert record["scores"]
        assert record["scores"].keys() <= {metric.name for metric in benchmark.metrics}
        assert all(entry["low"] <= entry["value"] <= entry["high"] for entry in record["scores"].values())
    items = [] if parts else finished.items("base", f"{name}@{record['variant']}")
    assert len({item["item"] for item in items}) == len(items) == (0 if parts else record["num_items"])
