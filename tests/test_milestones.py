"""Scores of new rounds, as eval.every of fedcli.yaml asks: which rounds, by whom, and that no round waits for them."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.processes import SMALL, fedcli, settings, warm

from fedcli import Federation

ONE = (*SMALL, "federation.clients=2", "federation.per_round=1", "federation.rounds=5", "train.steps=1")
"""Settings of a federation of five rounds, each of one client."""
EVERY_SECOND = {"every": 2, "benchmarks": ["demo", "vicuna"], "limit": 2, "data": "rows"}
"""A benchmark that is scored, and one that samples and waits for its judge."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with round 0 open, and the questions of a benchmark in its folder rows."""
    folder = tmp_path_factory.mktemp("template")
    done = fedcli("init", *settings(*ONE), cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "rows/vicuna").mkdir(parents=True)
    questions = [
        {"question_id": number, "category": "writing", "turns": [f"Write of storm {number}."]} for number in range(3)
    ]
    (folder / "rows/vicuna/question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return folder


@pytest.fixture
def workspace(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "w"))


def ask(workspace: Path, **wanted: object) -> None:
    """Write the section eval of fedcli.yaml."""
    path = workspace / "fedcli.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"eval": wanted}))


def run(workspace: Path, *arguments: object, code: int = 0):
    """Run a command in another folder than the workspace; what it says of a failure is one clear error."""
    done = fedcli(*arguments, "-w", workspace, cwd=workspace.parent)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def train_round(workspace: Path) -> None:
    """Let the open round's only client train."""
    (client,) = json.loads(run(workspace, "status", "--json").stdout)["cohort"]
    run(workspace, "client", "train", "--id", client)


def scored(workspace: Path) -> dict[str, set[str]]:
    """Return the names of the benchmarks that have scores, by target."""
    found: dict[str, set[str]] = {}
    for path in workspace.glob("eval/*/*.json"):
        found.setdefault(path.parent.name, set()).add(path.stem)
    return found


def adapters(workspace: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(workspace.glob("rounds/*/adapter/adapter_model.safetensors"))]


def record(workspace: Path, number: int, name: str = "demo@limit=2") -> dict[str, Any]:
    return json.loads((workspace / f"eval/round-{number:05}/{name}.json").read_text())


BOTH = {"demo@limit=2", "vicuna@limit=2"}


@pytest.mark.slow
def test_run_scores_every_second_round_and_the_last_and_trains_what_it_would_without(template, workspace, tmp_path):
    plain = Path(shutil.copytree(template, tmp_path / "plain"))
    run(plain, "run")
    assert scored(plain) == {}
    ask(workspace, **EVERY_SECOND)
    done = run(workspace, "run")
    assert scored(workspace) == {"round-00002": BOTH, "round-00004": BOTH, "round-00005": BOTH}
    assert len(adapters(plain)) == 6
    assert adapters(workspace) == adapters(plain)
    lines = [line for line in done.stderr.splitlines() if " scored: " in line]
    assert [line.split()[1] for line in lines] == ["2", "4", "5"]
    assert all("demo@limit=2 exact_match 0." in line for line in lines)
    assert all("vicuna@limit=2 waits for judge" in line for line in lines)
    assert record(workspace, 2)["num_items"] == 2
    before = {number: record(workspace, number)["created"] for number in (2, 4, 5)}
    assert " scored: " not in run(workspace, "run").stderr  # it has been done
    assert {number: record(workspace, number)["created"] for number in (2, 4, 5)} == before
    shutil.rmtree(workspace / "eval")
    found = json.loads(run(workspace, "eval", "demo", "--round", 2, "--limit", 2, "--json").stdout)["scores"]
    assert found[0]["scores"] == record(workspace, 2)["scores"]


@pytest.mark.slow
def test_server_aggregate_and_server_run_score_the_same_rounds(workspace):
    ask(workspace, every=3, benchmarks=["demo"], limit=2)
    run(workspace, "run", "--rounds", 2)
    assert scored(workspace) == {}
    train_round(workspace)
    document = json.loads(run(workspace, "server", "aggregate", "--dry-run", "--json").stdout)
    assert "scored" not in document
    document = json.loads(run(workspace, "server", "aggregate", "--json").stdout)
    assert (document["status"], document["round"]) == ("published", 3)
    assert document["scored"][0]["round"] == 3
    assert document["scored"][0]["scores"][0]["scores"].keys() == {"exact_match"}
    train_round(workspace)
    done = run(workspace, "server", "aggregate")
    assert " scored: " not in done.stderr
    train_round(workspace)
    done = run(workspace, "server", "run")
    assert "round 5 scored: demo@limit=2 exact_match 0." in done.stderr
    assert scored(workspace) == {"round-00003": {"demo@limit=2"}, "round-00005": {"demo@limit=2"}}


def unscored(workspace: Path) -> list[dict[str, Any]]:
    return json.loads(run(workspace, "status", "--json").stdout)["unscored"]


def test_a_round_that_the_api_merged_is_scored_like_one_that_the_command_merged(workspace):
    ask(workspace, every=1, benchmarks=["demo"], limit=2)
    train_round(workspace)
    federation = Federation.open(workspace)
    federation.server.aggregate(dry_run=True)
    assert not list(workspace.glob("eval/*/*.unscored.json"))
    federation.server.aggregate()
    (note,) = workspace.glob("eval/*/*.unscored.json")
    note.write_bytes(b"{")
    assert "Remove that file" in run(workspace, "status", code=7).stderr
    note.unlink()
    assert [made.round for made in federation.server.score()] == [1]
    assert scored(workspace) == {"round-00001": {"demo@limit=2"}}


@pytest.mark.slow
def test_a_benchmark_that_fails_stops_no_round_is_shown_and_is_tried_again_by_a_person_alone(workspace, template):
    shutil.rmtree(workspace / "rows/vicuna")
    ask(workspace, **EVERY_SECOND | {"every": 1})
    train_round(workspace)
    document = json.loads(run(workspace, "server", "aggregate", "--json").stdout)
    assert (document["status"], document["round"]) == ("published", 1)
    (of_round,) = document["scored"]
    assert "vicuna@limit=2: the data of vicuna is not here: question.jsonl" in of_round["error"]
    assert [record["benchmark"] for record in of_round["scores"]] == ["demo"]  # what could be scored
    assert scored(workspace)["round-00001"] >= {"demo@limit=2"}
    (note,) = unscored(workspace)
    failure = note["failure"]
    assert (note["round"], note["name"], failure["exit_code"]) == (1, "vicuna@limit=2", 8)
    (workspace / "rows/vicuna").symlink_to(template / "rows/vicuna")  # and yet:
    for code in (6, 6):
        assert "scored" not in run(workspace, "server", "aggregate", code=code).stderr
    assert "no scores are due" in run(workspace, "server", "score").stdout
    assert unscored(workspace) == [note]
    shown = run(workspace, "status").stdout
    assert "no score   round 1 on vicuna@limit=2: the data of vicuna is not here" in shown
    assert failure["again"] in shown
    assert failure["again"].startswith("fedcli eval vicuna --round 1 --limit 2 --data ")
    run(workspace, *failure["again"].split()[1:])
    assert unscored(workspace) == []
    assert record(workspace, 1, "vicuna@limit=2")["awaits"] == "judge"


@pytest.mark.slow
def test_run_tries_a_failing_benchmark_once_for_each_round(workspace):
    shutil.rmtree(workspace / "rows/vicuna")
    ask(workspace, **EVERY_SECOND | {"benchmarks": ["vicuna"]})
    lines = [line for times in (2, 2) for line in run(workspace, "run", "--rounds", times).stderr.splitlines()]
    told = [line for line in lines if "could not be scored" in line]
    assert [line.split()[1] for line in told] == ["2", "4"]
    assert [note["round"] for note in unscored(workspace)] == [2, 4]


LOADS = """
from fedcli.cli import main
from transformers import AutoModelForCausalLM
load, loads = AutoModelForCausalLM.from_pretrained, []
AutoModelForCausalLM.from_pretrained = lambda *given, **named: loads.append(0) or load(*given, **named)
assert main({arguments!r}) == 0
print("loads", len(loads))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("server", "aggregate"),
        pytest.param(("run", "--rounds", 2), marks=pytest.mark.slow),
        pytest.param(("run", "--rounds", 2, "--workers", 2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_process_loads_the_base_once_whatever_it_scores(workspace, command):
    ask(workspace, every=1, benchmarks=["demo", "demo-tuning"], limit=2)
    if command[0] == "server":
        train_round(workspace)
    done = warm()("-c", LOADS.format(arguments=[*map(str, command), "-w", str(workspace)]), cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loads 1"
    assert {len(names) for names in scored(workspace).values()} == {2}


@pytest.mark.parametrize(
    "command",
    [
        ("server", "aggregate"),
        *(pytest.param(each, marks=pytest.mark.slow) for each in (("run",), ("server", "run"))),
    ],
    ids=str,
)
def test_an_unknown_benchmark_is_told_before_anything_is_trained_or_merged(workspace, command):
    train_round(workspace)
    ask(workspace, every=2, benchmarks=["tfsn"])
    done = run(workspace, *command, code=3)
    assert done.stderr.startswith("fedcli: error: eval.benchmarks: unknown benchmark 'tfsn'\n  Did you mean tfns?")
    assert len(adapters(workspace)) == 1


def test_a_section_eval_that_makes_no_sense_is_told(workspace):
    ask(workspace, every=2)
    assert "every is set, and no benchmarks are" in run(workspace, "run", code=3).stderr
    ask(workspace, every=0, benchmarks=["demo"])
    assert "eval.every" in run(workspace, "run", code=3).stderr


def kill_when_scoring(workspace: Path, *arguments: object) -> None:
    """Run a command, and kill it when the first scores are about to be kept."""
    code = f"""
import os, signal
from fedcli.cli import main
from fedcli.scoring import evaluate as evaluation
evaluation.publish_scores = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main({[*map(str, arguments), "-w", str(workspace)]!r})
"""
    assert warm()("-c", code, cwd=workspace).returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("command", [("run", "--rounds", 1), pytest.param(("server", "aggregate"))], ids=str)
def test_a_scoring_that_was_killed_is_done_after_the_next_merge_however_often_it_was(workspace, command):
    ask(workspace, every=2, benchmarks=["demo"], limit=2)
    run(workspace, "run", "--rounds", 1)
    answers = workspace / "eval/round-00002/demo.answers.jsonl"
    for number in (2, 3):  # a round is published before scoring begins, also where an older one has still no scores
        train_round(workspace)
        kill_when_scoring(workspace, "server", "aggregate")
        assert len(adapters(workspace)) == number + 1
        assert scored(workspace) == {"round-00002": {"demo@limit=2.unscored"}}
        assert [(note["round"], note["failure"]) for note in unscored(workspace)] == [(2, None)]
    kept = answers.read_bytes()
    assert kept.count(b"\n") == 2
    train_round(workspace)
    done = run(workspace, *command)
    told = [line for line in done.stderr.splitlines() if " scored: " in line]
    assert [line.split()[1] for line in told] == ["2", "4"]
    assert "round 2 scored: demo@limit=2 exact_match 0." in told[0]
    assert scored(workspace).keys() == {"round-00002", "round-00004"}
    assert answers.read_bytes() == kept  # nothing was asked again
    assert unscored(workspace) == []


@pytest.mark.slow
def test_a_round_whose_server_was_killed_between_its_publication_and_its_scores_is_scored(workspace):
    ask(workspace, every=1, benchmarks=["demo"], limit=2)
    for number in (1, 2):
        train_round(workspace)
        run(workspace, "server", "aggregate", "--no-score")
        assert len(adapters(workspace)) == number + 1
    for note in workspace.glob("eval/round-00002/*"):
        note.unlink()  # as the kill left it
    train_round(workspace)
    told = run(workspace, "server", "aggregate").stderr
    assert [line.split()[1] for line in told.splitlines() if " scored: " in line] == ["1", "2", "3"]


@pytest.mark.slow
def test_what_is_due_is_shown_kept_from_gc_and_forgotten_where_nobody_asks_for_it_any_more(workspace):
    ask(workspace, every=1, benchmarks=["demo"], limit=2)
    train_round(workspace)
    run(workspace, "server", "aggregate", "--no-score")
    assert "to score   round 1 on demo@limit=2: `fedcli server score`" in run(workspace, "status").stdout
    train_round(workspace)
    run(workspace, "server", "aggregate", "--no-score")
    path = workspace / "fedcli.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"retention": {"keep_last": 1}}))
    kept = json.loads(run(workspace, "gc", "--dry-run", "--json").stdout)["kept"]
    assert kept["1"] == "its scores are not finished"
    ask(workspace)
    assert run(workspace, "server", "score").stdout == "nothing to do: no scores are due\n"
    assert unscored(workspace) == []
    ask(workspace, every=1, benchmarks=["demo"], limit=1)
    document = json.loads(run(workspace, "server", "score", "--json").stdout)
    assert [found["round"] for found in document["scored"]] == [2]  # the latest only: it was not asked for before
    assert scored(workspace) == {"round-00002": {"demo@limit=1"}}


@pytest.mark.slow
def test_while_nobody_has_answered_server_aggregate_still_does_a_scoring_that_was_killed(workspace):
    ask(workspace, every=1, benchmarks=["demo"], limit=2)
    train_round(workspace)
    kill_when_scoring(workspace, "server", "aggregate")
    done = run(workspace, "server", "aggregate", code=6)
    assert "round 1 scored: demo@limit=2 exact_match 0." in done.stderr
    assert scored(workspace) == {"round-00001": {"demo@limit=2"}}
