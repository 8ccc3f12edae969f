"""Judges over HTTP: what goes wrong on the way is asked again, and what was said is never asked twice."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support.judge_server import FAULTS, JudgeServer
from support.processes import ENVIRONMENT

from fedcli.errors import RequirementError, UsageError
from fedcli.eval.endpoint import Endpoint, find_endpoint
from fedcli.eval.judge import Estimate, Judge
from fedcli.eval.remembered import Usage
from fedcli.eval.requests import Generation, Likelihood, LogLikelihood
from fedcli.tasks.conversation import Turn
from fedcli.workspace.scores import AnswerLog

CHILD = """
import sys
from pathlib import Path
from fedcli.eval.endpoint import Endpoint
from fedcli.eval.judge import Judge
from fedcli.eval.benchmarks.mt_bench import MT_BENCH
from fedcli.workspace.scores import AnswerLog
from support.scripted import Scripted, session

url, memory, data = sys.argv[1:4]
if sys.argv[4:]:  # no file may grow beyond so many bytes: a full disk
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),) * 2)
judge = Judge("gpt-4", Endpoint("gpt-4", url, concurrency=4).reach, AnswerLog(Path(memory)))
items = MT_BENCH.run(session(MT_BENCH, Scripted(lambda request: "An answer."), Path(data), judge=judge))
print([item.marks["MT-Avg"] for item in items])
"""
"""A process that runs mt-bench with a judge."""


def ask(text: str, **settings) -> Generation:
    return Generation((Turn("user", text),), 100, **settings)


def complete(endpoint: Endpoint, *requests: Generation) -> list[str]:
    """Return an endpoint's answers, in the order of the requests."""
    texts: dict[int, str] = {}
    endpoint.generate(requests, texts.__setitem__)
    return [texts[index] for index in range(len(requests))]


def last(body: dict) -> str:
    """A judge that repeats what it was asked."""
    return body["messages"][-1]["content"]


class ScriptedEngine:
    """A model whose replies a test writes; it keeps what it was asked."""

    def __init__(self, reply: Callable[[Generation], str]) -> None:
        self.usage = Usage()
        self.asked: list[Generation] = []
        self._reply = reply

    def generate(self, requests: Sequence[Generation], on_answer: Callable[[int, str], None]) -> None:
        for index, request in enumerate(requests):
            self.asked.append(request)
            on_answer(index, self._reply(request))

    def log_likelihoods(self, requests: Sequence[Likelihood], on_answer: Callable[[int, LogLikelihood], None]) -> None:
        raise AssertionError("a judge is asked for text")


def number(reply: str) -> int | None:
    return int(reply) if reply.isdigit() else None


# The endpoint


def test_turns_go_as_messages_and_a_text_as_one_of_the_user() -> None:
    with JudgeServer(last) as server:
        endpoint = Endpoint("gpt-4", server.url, "sk-mine", concurrency=1)
        turns = (Turn("system", "Be short."), Turn("user", "Add.", input="1 and 2"))
        assert complete(endpoint, Generation(turns, 7, temperature=0.5), Generation("2 + 2 =", 3, top_p=0.9)) == [
            "Add. 1 and 2",
            "2 + 2 =",
        ]
    assert [asked.body for asked in server.log] == [
        {
            "model": "gpt-4",
            "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Add. 1 and 2"}],
            "temperature": 0.5,
            "max_tokens": 7,
        },
        {
            "model": "gpt-4",
            "messages": [{"role": "user", "content": "2 + 2 ="}],
            "temperature": 0.0,
            "max_tokens": 3,
            "top_p": 0.9,
        },
    ]
    assert {asked.key for asked in server.log} == {"sk-mine"}
    assert (endpoint.usage.num_requests, endpoint.usage.num_generated_tokens) == (2, 10)


def test_an_answer_ends_before_a_stop_sequence_of_which_the_interface_takes_four() -> None:
    with JudgeServer(lambda body: "one two three") as server:
        assert complete(Endpoint("m", server.url), ask("", stop=("a", "b", "c", "d", " three"))) == ["one two"]
    assert server.log[0].body["stop"] == ["a", "b", "c", "d"]


def test_answers_come_in_the_order_of_the_requests_though_several_are_asked_at_once() -> None:
    def slow_first(body: dict) -> str:
        time.sleep(0.5 if last(body) == "0" else 0)
        return last(body)

    with JudgeServer(slow_first) as server:
        heard: list[int] = []
        texts = [str(index) for index in range(20)]
        Endpoint("m", server.url, concurrency=4).generate(
            [ask(text) for text in texts], lambda index, text: heard.append(index)
        )
        assert complete(Endpoint("m", server.url, concurrency=4), *map(ask, texts)) == texts
    assert heard[-1] == 0
    assert sorted(heard) == list(range(20))


def test_answers_are_told_one_at_a_time() -> None:
    now, most = 0, 0

    def hear(index: int, text: str) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        time.sleep(0.02)
        now -= 1

    with JudgeServer() as server:
        Endpoint("m", server.url, concurrency=8).generate([ask(str(index)) for index in range(24)], hear)
    assert most == 1


@pytest.mark.parametrize(
    "fault",
    [
        "429",
        "500",
        *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("not JSON", "half of JSON", "no choices", "hang")),
    ],
)
def test_after_a_fault_it_is_asked_again(fault: str) -> None:
    with JudgeServer(last, [fault, fault]) as server:
        assert complete(Endpoint("m", server.url, timeout=3), ask("a")) == ["a"]
    assert [asked.outcome for asked in server.log] == [fault, fault, "well"]
    first, second, third = (asked.seconds for asked in server.log)
    assert 0.35 < second - first < third - second, "waits grow"


def test_the_time_that_a_rate_limit_names_is_waited() -> None:
    with JudgeServer(last, ["429, wait 1.5 s"]) as server:
        assert complete(Endpoint("m", server.url), ask("a")) == ["a"]
    assert 1.5 <= server.log[1].seconds - server.log[0].seconds < 30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("401", "OPENAI_API_KEY"),
        ("404", "model does not exist"),
        ("429", "Rate limit reached"),
        ("500", "500"),
        ("not JSON", "OpenAI-compatible"),
        ("no choices", "OpenAI-compatible"),
        ("choices by name", "OpenAI-compatible"),
        ("deep JSON", "OpenAI-compatible"),
        ("deep objects", "OpenAI-compatible"),
        ("a long number", "OpenAI-compatible"),
        ("too long", "takes 4096 tokens"),
        ("hang", "in time"),
    ],
)
def test_a_fault_that_stays_is_one_clear_error(fault: str, named: str) -> None:
    with JudgeServer(then=fault) as server:
        endpoint = Endpoint("gpt-4", server.url, "sk-secret", timeout=2, max_retries=1)
        with pytest.raises(RequirementError) as caught:
            complete(endpoint, ask("a"))
        assert len(server.log) == (1 if fault in {"401", "404", "too long"} else 2)
    shown = f"{caught.value.message}\n{caught.value.hint}"
    assert named in shown
    assert server.url in shown
    assert "is kept" in shown
    assert shown.count("\n") == 1
    assert "sk-secret" not in shown


@pytest.mark.parametrize(
    "usage",
    ["many", 7, [5], None, *({"completion_tokens": odd} for odd in ("5", -1, 1.5, True, [5], {}, 10**400))],
    ids=lambda usage: str(usage)[:40],
)
def test_a_usage_that_is_none_is_passed_over(usage: object, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"}
    monkeypatch.setitem(FAULTS, "odd usage", (200, {}, json.dumps({"choices": [choice], "usage": usage})))
    with JudgeServer(then="odd usage") as server:
        endpoint = Endpoint("m", server.url, max_retries=0)
        assert complete(endpoint, ask("a")) == ["a"]
    assert (endpoint.usage.num_requests, endpoint.usage.num_generated_tokens) == (1, 0)


def test_what_a_filter_blocks_is_an_empty_answer() -> None:
    with JudgeServer(last, ["filtered"]) as server:
        assert complete(Endpoint("m", server.url, concurrency=1), ask("a"), ask("b")) == ["", "b"]


def test_half_of_a_surrogate_pair_in_a_reply_is_replaced(tmp_path: Path) -> None:
    with JudgeServer(lambda body: "Fine \ud83d [[7]] \U0001f600") as server:
        endpoint = Endpoint("m", server.url)
        (found,) = Judge("m", lambda: endpoint, AnswerLog(tmp_path / "m")).ask([ask("a")], lambda reply: reply)
    assert found.verdict == "Fine ? [[7]] \U0001f600"


def test_a_model_that_takes_no_limit_or_temperature_is_asked_without_them() -> None:
    with JudgeServer(last, ["no max_tokens", "no temperature"]) as server:
        assert complete(Endpoint("o9", server.url, concurrency=1), ask("a"), ask("b")) == ["a", "b"]
    sent = [{name for name in asked.body if name not in ("model", "messages")} for asked in server.log]
    assert sent == [
        {"max_tokens", "temperature"},
        {"max_completion_tokens", "temperature"},
        {"max_completion_tokens"},
        {"max_completion_tokens"},
    ]


def test_a_server_that_is_not_there_is_seen_within_seconds() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        start = time.monotonic()
        with pytest.raises(RequirementError, match=r"cannot be reached: .*refused"):
            Endpoint("m", url).reach()
    assert time.monotonic() - start < 60
    with JudgeServer() as server:
        assert Endpoint("m", server.url).reach().url == server.url
    with JudgeServer(then="401") as server, pytest.raises(RequirementError, match="401"):
        Endpoint("m", server.url).reach()
    assert server.log == []


def test_a_key_is_needed_for_openai_and_not_for_a_server_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(RequirementError, match="OPENAI_API_KEY"):
        find_endpoint("gpt-4")
    assert find_endpoint("mine", "http://localhost:8000/v1").key == "none"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    assert (find_endpoint("gpt-4").url, find_endpoint("gpt-4").key) == ("https://api.openai.com/v1", "sk-mine")
    assert "sk-mine" not in repr(find_endpoint("gpt-4"))
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere/v1")
    assert find_endpoint("gpt-4").url == "http://elsewhere/v1"
    with pytest.raises(UsageError, match="localhost:8000"):
        find_endpoint("mine", "localhost:8000")


def test_a_chat_endpoint_gives_no_likelihoods() -> None:
    with pytest.raises(UsageError, match="gpt-4"):
        Endpoint("gpt-4", "http://localhost/v1").log_likelihoods([Likelihood("a", "b")], lambda index, answer: None)


# The judge


def test_a_judgment_is_asked_once_and_a_rerun_asks_none(tmp_path: Path) -> None:
    engine = ScriptedEngine(lambda request: str(len(request.prompt[0].text)))
    for _ in range(2):
        judge = Judge("j", lambda: engine, AnswerLog(tmp_path / "judgments.jsonl"))
        found = judge.ask([ask("a"), ask("bb"), ask("a")], number)
        assert [judgment.verdict for judgment in found] == [1, 2, 1]
    assert engine.asked == [ask("a"), ask("bb")]
    assert found[1].record() == {"judgment": "2"}


def test_whatever_differs_is_asked_anew(tmp_path: Path) -> None:
    engine = ScriptedEngine(lambda request: "1")
    different = [
        ask("a"),
        ask("b"),
        ask("a", temperature=0.5),
        ask("a", sample=1),
        Generation((Turn("user", "a"),), 99),
        Generation((Turn("system", "a"),), 100),
        Generation("a", 100),
    ]
    Judge("j", lambda: engine, AnswerLog(tmp_path / "m")).ask(different, number)
    assert engine.asked == different
    Judge("another", lambda: engine, AnswerLog(tmp_path / "m")).ask(different[:1], number)
    assert len(engine.asked) == len(different) + 1


def test_a_reply_without_a_verdict_is_asked_for_once_more_and_then_left_out(tmp_path: Path) -> None:
    def reply(request: Generation) -> str:
        return "5" if request.prompt[0].text == "easy" or (request.sample and request.prompt[0].text == "hard") else "?"

    engine = ScriptedEngine(reply)
    for _ in range(2):
        judge = Judge("j", lambda: engine, AnswerLog(tmp_path / "m"))
        easy, hard, hopeless = judge.ask([ask("easy"), ask("hard"), ask("hopeless")], number)
        assert (easy.verdict, hard.verdict, hopeless.verdict) == (5, 5, None)
        assert (easy.replies, hard.replies, hopeless.replies) == (("5",), ("?", "5"), ("?", "?"))
        assert hopeless.record()["judgments"] == ["?", "?"]
    assert engine.asked == [
        ask("easy"),
        ask("hard"),
        ask("hopeless"),
        ask("hard", temperature=0.7, sample=1),
        ask("hopeless", temperature=0.7, sample=1),
    ]


def test_the_cost_is_confirmed_once_and_of_what_is_not_kept(tmp_path: Path) -> None:
    engine = ScriptedEngine(lambda request: "?")
    Judge("j", lambda: engine, AnswerLog(tmp_path / "m")).ask([ask("x" * 400)], number)
    heard: list[Estimate] = []
    judge = Judge("j", lambda: engine, AnswerLog(tmp_path / "m"), confirm=heard.append)
    judge.ask([ask("x" * 400)], number)
    assert heard == []
    judge.ask([ask("x" * 400), ask("y" * 40), ask("z" * 80)], number)
    judge.ask([ask("more")], number)
    assert heard == [Estimate(num_calls=2, num_prompt_tokens=30, max_reply_tokens=200)]


def test_without_leave_nothing_is_asked(tmp_path: Path) -> None:
    def refuse(estimate: Estimate) -> None:
        raise UsageError("no", hint="")

    engine = ScriptedEngine(lambda request: "1")
    judge = Judge("j", lambda: engine, AnswerLog(tmp_path / "m"), confirm=refuse)
    for _ in range(2):
        with pytest.raises(UsageError):
            judge.ask([ask("a")], number)
    assert engine.asked == []


def test_what_was_judged_before_an_error_is_kept(tmp_path: Path) -> None:
    requests = [ask(str(index)) for index in range(10)]
    with JudgeServer(last, ["well"] * 6, then="404") as server:
        endpoint = Endpoint("j", server.url, concurrency=3)
        with pytest.raises(RequirementError, match="404"):
            Judge("j", endpoint.reach, AnswerLog(tmp_path / "m")).ask(requests, number)
        assert len(server.asked("well")) == 6
        assert len(server.asked("404")) <= 3, "after an error nothing is begun"
        server.then = "well"
        found = Judge("j", endpoint.reach, AnswerLog(tmp_path / "m")).ask(requests, number)
    assert [judgment.verdict for judgment in found] == list(range(10))
    assert Counter(server.asked("well")) == Counter(map(str, range(10)))


def test_a_line_torn_anywhere_counts_for_nothing_and_swallows_none(tmp_path: Path) -> None:
    path = tmp_path / "m"
    memory = AnswerLog(path)
    memory.add("first", "text\u2028 of\ntwo lines \u00e9")
    whole = path.read_bytes()
    memory.add("second", "2")
    torn = path.read_bytes()
    for length in range(len(whole), len(torn)):
        path.write_bytes(torn[:length])
        is_torn = length < len(torn) - 1  # what lacks its end of line only is there
        again = AnswerLog(path)
        assert again.get("first") == "text\u2028 of\ntwo lines \u00e9"
        assert again.get("second") == (None if is_torn else "2")
        again.add("third", {"a": [1]})
        assert AnswerLog(path).get("third") == {"a": [1]}
        assert AnswerLog(path).get("first") is not None


def test_what_is_no_line_of_a_memory_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b'\n[]\n7\n{"key": "a"}\n{"key": [], "answer": 1}\n\xff\xfe\x00\n{"key": "b", "answer": 2}\n')
    assert (AnswerLog(path).get("a"), AnswerLog(path).get("b")) == (None, 2)


# Processes


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """A folder with 15 questions, 30 judgments."""
    rows = Path(__file__).parent / "benchmark_rows" / "mt-bench"
    (tmp_path / "judge_prompts.jsonl").write_bytes((rows / "judge_prompts.jsonl").read_bytes())
    line = '{{"question_id": {0}, "category": "stem", "turns": ["What is {0}?", "And {0} + 1?"]}}\n'
    (tmp_path / "question.jsonl").write_text("".join(line.format(index) for index in range(15)))
    return tmp_path


def child(*arguments: object) -> subprocess.Popen:
    environment = ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_killed_half_way_and_run_again_no_judgment_is_asked_twice(questions: Path) -> None:
    memory = questions / "judgments.jsonl"
    with JudgeServer(script=["well"] * 13, then="hang") as server:
        first = child(server.url, memory, questions)
        server.wait(4, "hang")  # four are in flight, so that all before them were delivered
        os.kill(first.pid, signal.SIGKILL)
        first.communicate(timeout=60)
        delivered, in_flight = server.asked("well"), server.asked("hang")
        assert (first.returncode, len(delivered), len(in_flight)) == (-signal.SIGKILL, 13, 4)
        assert len(memory.read_bytes().splitlines()) == 13
        server.then = "well"
        out, err = child(server.url, memory, questions).communicate(timeout=60)
        assert out.split() == [*(f"{'[' * (not index)}7.0," for index in range(29)), "7.0]"], err
        asked = Counter(server.asked("well"))
    assert len(asked) == 30
    assert set(asked.values()) == {1}
    assert not set(in_flight) & set(delivered)


@pytest.mark.slow
def test_ctrl_c_ends_it_while_the_judge_hangs(questions: Path) -> None:
    with JudgeServer(script=["well"] * 5, then="hang") as server:
        process = child(server.url, questions / "judgments.jsonl", questions)
        server.wait(4, "hang")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
        assert err.strip().endswith("KeyboardInterrupt")
    assert len(_keys(questions / "judgments.jsonl")) == 5


@pytest.mark.slow
def test_a_disk_that_is_full_loses_nothing_that_was_judged(questions: Path) -> None:
    memory = questions / "judgments.jsonl"
    with JudgeServer() as server:
        _, err = child(server.url, memory, questions, 1000).communicate(timeout=60)
        assert "WorkspaceError" in err
        assert "File too large" in err
        kept = AnswerLog(memory)
        num_kept = sum(kept.get(key) is not None for key in _keys(memory))
        num_asked = len(server.log)
        assert 5 <= num_kept < num_asked < 30
        out, err = child(server.url, memory, questions).communicate(timeout=60)
        assert out.count("7.0") == 30, err
        assert len(server.log) == num_asked + 30 - num_kept
    assert len(set(_keys(memory))) == 30


def _keys(memory: Path) -> list[str]:
    return [line.split('"')[3] for line in memory.read_text().splitlines() if line.endswith("}")]
