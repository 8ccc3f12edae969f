"""Task grpo without its trainer: reward functions, rows, and what the configuration and a party refuse."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pydantic import ValidationError
from support.models import TINY, load_plain
from support.processes import runner

from fedcli.client.answering import check_able, check_rows, scorer
from fedcli.config import parse_config
from fedcli.data.encoded import EncodedRows
from fedcli.data.encoding import Encoder
from fedcli.data.file_rows import Row
from fedcli.data.formats import RowReader
from fedcli.errors import ConfigError, RequirementError
from fedcli.tasks import GRPO, REWARDS
from fedcli.tasks.bounded_regex import match_all
from fedcli.tasks.conversation import Question, Turn
from fedcli.tasks.rewards import Answer, Reward, last_number
from fedcli.training.dp_sgd import check_task
from fedcli.workspace.floors import Asked, Floors, faults
from fedcli.workspace.registrations import PartyRecord
from fedcli.workspace.train_records import TrainRecord

TRAIN = {
    **{"steps": 2, "batch_size": 8, "micro_batch_size": None, "max_length": 64, "learning_rate": 1e-3, "beta": None},
    "schedule": {"learning_rate": 1e-3, "learning_rate_min": 1e-6, "rounds": 2},
    **{"weight_decay": 0.0, "max_grad_norm": 1.0, "template": "alpaca", "seed": 0},
}
ASKED = {"generations": 4, "max_new_tokens": 8, "reward": "number", "kl": 0.0}


def question(prompt: str, answer: str) -> Question:
    return Question((Turn("user", prompt),), answer)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 1,234.50.", 1234.5),
        ("12, 13", 13),
        ("x = -3", -3),
        ("5 - 3 = 2-3", 3),
        ("1e3", 1000),
        (".5", 0.5),
        ("1,23", 23),
        ("$1,000,000!", 1e6),
        ("no number", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_number_rewards_answers_whose_last_number_is_the_rows() -> None:
    answers = [Answer("2 + 2 = 4", "4.0"), Answer("4, or rather 5", "4"), Answer("four", "4"), Answer("1,000", "1000")]
    assert REWARDS["number"].score(answers) == [1, 0, 0, 1]
    assert REWARDS["number"].faults(["4", "four"]) == [None, "there is no finite number in it"]


def test_regex_rewards_answers_that_match_as_a_whole() -> None:
    answers = [Answer(" green\n", "green"), Answer("greenish", "green"), Answer("a red b", ".*red.*"), Answer("a", "[")]
    assert REWARDS["regex"].score(answers) == [1, 0, 1, 0]
    found = REWARDS["regex"].faults(["green", "[", "a" * 1001])
    assert found[:2] == [None, "it is no regular expression of Python"]
    assert found[2] == "it has 1001 characters, and 1000 are allowed"


def test_a_hostile_pattern_ends_and_keeps_no_other_from_its_turn() -> None:
    started = time.monotonic()
    hostile = [("(a+)+$", "a" * 40 + "b"), ("(?:a{0,65000}){65000}" * 40, "a"), ("(" * 400 + ")" * 400, "a")]
    found = match_all([("a+", "aaa"), *hostile, ("b", "b")], seconds=0.2)
    assert (found[0], found[-1]) == (True, True)
    assert found[1] is False
    assert time.monotonic() - started < 20


@pytest.mark.skipif(sys.platform != "linux", reason="bubblewrap")
def test_python_runs_an_answers_program_against_the_rows_tests_in_the_sandbox() -> None:
    try:
        score = scorer(REWARDS["python"])
    except RequirementError as error:
        pytest.skip(str(error))
    tests = "assert add(2, 3) == 5"
    programs = ["```python\ndef add(a, b):\n    return a + b\n```", "def add(a, b):\n    return 1", "raise SystemExit"]
    assert score([Answer(text, tests) for text in programs]) == [1, 0, 0]
    assert REWARDS["python"].faults([tests, "assert (", "assert 1 == 1"])[0] is None
    assert all(REWARDS["python"].faults(["assert (", "assert 1 == 1"]))


@pytest.mark.parametrize(
    ("form", "fields", "said"),
    [
        ("prompt-answer", {"prompt": "2 + 2?", "answer": 4}, ("2 + 2?", "4")),
        ("prompt-answer", {"prompt": [{"role": "user", "content": "2?"}], "solution": "2"}, ("2?", "2")),
        ("gsm8k", {"question": "How many?", "answer": "6 x 7 = <<6*7=42>>42\n#### 1,042"}, ("How many?", "1,042")),
        (
            "mbpp",
            {"text": "Add.", "test_list": ["assert add(1, 2) == 3"], "test_setup_code": ""},
            ("Add.\nYour code should pass these tests:\n\nassert add(1, 2) == 3", "assert add(1, 2) == 3"),
        ),
    ],
)
def test_rows_of_the_usual_shapes_are_questions(form: str, fields: dict, said: tuple[str, str]) -> None:
    ((_, item),) = RowReader(form).read([Row(fields, "row 1")])
    assert (item.prompt[-1].content, item.check) == said


@pytest.mark.parametrize(
    ("form", "fields"),
    [
        ("prompt-answer", {"prompt": "2 + 2?"}),
        ("gsm8k", {"question": "How many?", "answer": "42"}),
        ("mbpp", {"text": "Add.", "test_list": "assert add(1, 2) == 3"}),
    ],
)
def test_a_row_without_an_answer_is_left_out(form: str, fields: dict) -> None:
    reader = RowReader(form)
    assert list(reader.read([Row(fields, "row 1")])) == []
    assert reader.left_out.total() == 1


@pytest.fixture(scope="module")
def rows() -> EncodedRows:
    items = [question("2 + 2?", "4"), question("Say green.", "green " * 200)]
    return Encoder(load_plain(TINY)[1]).encode(items, 80)


def test_what_is_checked_is_kept_whole_with_its_row(rows: EncodedRows) -> None:
    assert [row.check for row in rows] == ["4", "green " * 200]
    assert (rows.num_truncated, max(map(len, (row.sides[0].ids for row in rows)))) == (0, 80)
    read = EncodedRows.of_arrays(rows.arrays())
    assert [row.check for row in read] == [row.check for row in rows]
    both = EncodedRows.of_arrays(rows.arrays())
    both.extend(read)
    assert [row.check for row in both] == 2 * [row.check for row in rows]
    prompt = Encoder(load_plain(TINY)[1]).prompts([(Turn("user", "2 + 2?"),)])[0]
    assert rows[0].sides[0].ids[: rows[0].sides[0].prompt_length].tolist() == prompt


def test_rows_that_the_reward_cannot_check_are_an_error_with_their_number_and_an_example(rows: EncodedRows) -> None:
    with pytest.raises(ConfigError, match=r"client 1: 1 of 2 rows .*train.reward number cannot check; first, .green"):
        check_rows(rows, REWARDS["number"], "client 1", positions=None, max_new_tokens=8)
    with pytest.raises(ConfigError, match="more than the base's 60 positions"):
        check_rows(rows, replace(REWARDS["regex"], faults=Reward.faults), "client 1", positions=60, max_new_tokens=60)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "train.reward is not set, and task grpo needs one: number, regex, python"),
        ({"reward": "nmber"}, "unknown reward function 'nmber'. Did you mean number"),
        ({"reward": "number", "generations": 5}, "train.generations 5 does not divide batch_size 16"),
        ({"reward": "number", "generations": 1}, "train.generations"),
        ({"reward": "number", "max_new_tokens": 10**6}, "train.max_new_tokens"),
        ({"reward": "number", "privacy": "row"}, "task grpo and privacy.unit row exclude each other"),
    ],
)
def test_what_cannot_be_trained_is_a_configuration_error(changes: dict, told: str) -> None:
    train = {key: value for key, value in changes.items() if key != "privacy"}
    document: dict = {"task": "grpo", "train": train}
    if "privacy" in changes:
        document |= {"privacy": {"unit": "row", "clip": 1.0, "noise": 1.0}, "federation": {"signatures": "off"}}
    with pytest.raises(ConfigError) as caught:
        parse_config(document, Path("fedcli.yaml"))
    assert told in str(caught.value)


def test_rows_cannot_be_private_one_by_one() -> None:
    with pytest.raises(ConfigError, match="marks each answer of the model by the others"):
        check_task(GRPO)


def test_a_manifest_of_another_task_has_none_of_its_keys_and_a_batch_has_fewer_rows_than_answers() -> None:
    plain, asked = TrainRecord.model_validate(TRAIN), TrainRecord.model_validate(TRAIN | ASKED)
    assert not {*plain.model_dump()} & {*ASKED}
    assert {key: asked.model_dump()[key] for key in ASKED} == ASKED
    assert (plain.num_drawn, asked.num_drawn, asked.rows_per_step) == (16, 4, 2)
    with pytest.raises(ValidationError, match="generations does not divide batch_size"):
        TrainRecord.model_validate(TRAIN | ASKED | {"generations": 3})
    refused = faults(Floors(rows=8, batch_size=4), Asked(0, asked, (), 100))
    assert [allow for _, allow in refused] == ["rows=4", "batch_size=2"]


def federation(allowed: bool = False) -> SimpleNamespace:
    """What is looked at of a federation of task grpo before a model is loaded."""
    head = SimpleNamespace(number=3, manifest=SimpleNamespace(task="grpo"))
    evaluation = SimpleNamespace(allow_code_execution=allowed)
    return SimpleNamespace(head=head, config=SimpleNamespace(eval=evaluation), workspace=None)


def test_a_party_that_lacks_the_reward_function_or_allows_no_code_is_told() -> None:
    asked = TrainRecord.model_validate(TRAIN | ASKED)
    assert check_able(federation(), None, asked) is REWARDS["number"]
    with pytest.raises(RequirementError, match="the reward function 'theirs', which is not installed here"):
        check_able(federation(), None, asked.model_copy(update={"reward": "theirs"}))
    code = asked.model_copy(update={"reward": "python"})
    party = SimpleNamespace(client=2, num_rows=8, allow_code_execution=False)
    with pytest.raises(ConfigError, match="runs code that the model wrote") as caught:
        check_able(federation(), party, code)
    assert "fedcli client join --id 2 --data SOURCE --allow-code-execution" in caught.value.hint
    party.allow_code_execution = True
    assert check_able(federation(), party, code) is REWARDS["python"]
    with pytest.raises(ConfigError) as caught:
        check_able(federation(), None, code)
    assert "eval.allow_code_execution" in caught.value.hint


def test_a_home_says_that_code_may_run_only_where_it_may() -> None:
    known = dict.fromkeys(("subset", "split", "base", "format")) | {
        "workspace": "w",
        "client": 0,
        "source": "rows.jsonl",
    }
    plain = PartyRecord.model_validate(known | {"trust_remote_code": False})
    assert "allow_code_execution" not in plain.model_dump()
    assert plain.model_copy(update={"allow_code_execution": True}).model_dump()["allow_code_execution"] is True


def test_a_reward_that_is_no_finite_number_names_the_function() -> None:
    for score in (lambda answers: [float("nan")], lambda answers: [], lambda answers: 1 / 0):
        broken = replace(REWARDS["number"], score=score)
        with pytest.raises(RequirementError, match="the reward function 'number' of the package fedcli"):
            scorer(broken)([Answer("1", "1")])
    assert scorer(Reward("mean", "", lambda answers: np.ones(len(answers))))([Answer("1", "1")]) == [1.0]


def test_without_trl_the_extra_that_brings_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    run = runner(capsys)
    rows = [{"prompt": f"{number} + 1?", "answer": str(number + 1)} for number in range(4)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = ("task=grpo", "train.reward=number", "data.source=rows.jsonl", "federation.clients=1", "data.partition=iid")
    assert run("init", "w", *(word for each in sets for word in ("--set", each)))[0] == 0
    for name in [*sys.modules, "trl"]:
        if name.partition(".")[0] == "trl":
            monkeypatch.setitem(sys.modules, name, None)
    code, out, err = run("client", "train", "--id", "0", "-w", "w")
    assert (code, out) == (8, "")
    assert "this needs the package trl, which is not installed" in err
    assert "pip install 'fedcli[grpo]'" in err
