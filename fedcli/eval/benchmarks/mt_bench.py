"""MT-Bench (Zheng et al. 2023, arXiv:2306.05685): two turns, rated by a judge or compared with another's answers.

Questions, reference answers and judge prompts are FastChat's files (fastchat/llm_judge/data), and so are the rules:
which categories are judged against a reference, the temperature of each, and how a rating is read.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, TypeGuard

from fedcli.data.file_rows import Row
from fedcli.data.source import read_rows
from fedcli.errors import ConfigError, UsageError
from fedcli.eval import releases
from fedcli.eval.benchmark import Benchmark, ItemScore, Metric, Session
from fedcli.eval.data import DataSource, Files
from fedcli.eval.judge import Judgment
from fedcli.eval.requests import Generation
from fedcli.tasks.conversation import Turn

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
TEMPERATURES = {
    **dict.fromkeys(("writing", "roleplay"), 0.7),
    **dict.fromkeys(("extraction", "math", "coding", "reasoning", "arena-hard-200"), 0.0),
    **dict.fromkeys(("stem", "humanities"), 0.1),
}
OTHER_TEMPERATURE = 0.7
WITH_REFERENCE = {"math", "reasoning", "coding", "arena-hard-200"}
MAX_NEW_TOKENS = 1024
NUM_TURNS = 2
FASTCHAT_URL = "https://github.com/lm-sys/FastChat/tree/main/fastchat/llm_judge/data"
REFERENCES = ("reference_answer/gpt-4.jsonl",)
PROMPTS = ("judge_prompts.jsonl", "../judge_prompts.jsonl", "*/judge_prompts.jsonl")
"""Beside the questions, a folder above them as in FastChat, or beside another benchmark's."""
MAX_JUDGMENT_TOKENS = 2048

_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]", re.ASCII), re.compile(r"\[(\d+\.?\d*)\]", re.ASCII))
_VERDICT = re.compile(r"\[\[([ABC])\]\]")

Answers: TypeAlias = Sequence[str]
"""A model's answers to the turns of one question."""


@dataclass(frozen=True)
class Question:
    """A question as FastChat's question.jsonl has it."""

    id: str
    category: str
    turns: tuple[str, ...]

    def record(self, answers: Answers, turn: int) -> dict[str, object]:
        """Return what a reader wants to see of one of its turns."""
        return {"category": self.category, "question": self.turns[turn], "answer": answers[turn]}


@dataclass(frozen=True)
class JudgePrompts:
    """FastChat's judge prompts by name, and reference answers by question."""

    prompts: Mapping[str, Row]
    references: Mapping[str, Answers]

    def request(self, name: str, question: Question, **answers: Answers) -> Generation:
        """Return the prompt of a name, filled in; raise ConfigError where it is missing or wants something else."""
        texts = _texts("question", question.turns) | _texts("ref_answer", self.references.get(question.id, ()))
        for label, turns in answers.items():
            texts |= _texts(label, turns)
        if name not in self.prompts:
            raise ConfigError(f"judge_prompts.jsonl has no prompt {name}", hint="Get FastChat's own file.")
        row = self.prompts[name]
        try:
            system, template = str(row.fields["system_prompt"]), str(row.fields["prompt_template"])
            prompt = (Turn("system", system), Turn("user", template.format(**texts)))
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"{row.where}: the prompt {name} cannot be filled in for question {question.id}: {error!r}",
                hint="Get FastChat's own judge_prompts.jsonl, and reference_answer/gpt-4.jsonl with its questions.",
            ) from error
        return Generation(prompt, MAX_JUDGMENT_TOKENS)


def read_questions(session: Session, num_turns: int) -> list[Question]:
    """Read the questions that are asked; raise ConfigError for a row that is none of FastChat's with so many turns."""
    questions: dict[str, Question] = {}
    for row in session.files.rows():
        number, category, turns = (row.fields.get(name) for name in ("question_id", "category", "turns"))
        if not (isinstance(number, int | str) and isinstance(category, str) and _is_texts(turns, num_turns)):
            raise ConfigError(
                f"{row.where} is no question of {session.files.benchmark}: it needs question_id, category and "
                f"{num_turns} texts in turns",
                hint=f"Get the file from {FASTCHAT_URL}.",
            )
        if str(number) in questions:
            raise ConfigError(f"{row.where}: question {number} is there twice", hint="Remove one of the two.")
        questions[str(number)] = Question(str(number), category, tuple(turns))
    return list(questions.values())[: session.options.limit]


def read_prompts(files: Files) -> JudgePrompts:
    """Read the judge prompts, and the reference answers where there are some; raise RequirementError for no prompts."""
    prompts = {str(row.fields.get("name")): row for row in read_rows(files.require(*PROMPTS)[0])}
    references = {}
    for path in files.find(*REFERENCES):
        for row in read_rows(path):
            try:
                turns = row.fields["choices"][0]["turns"]
                references[str(row.fields["question_id"])] = [str(turn) for turn in turns]
            except (KeyError, IndexError, TypeError) as error:
                raise ConfigError(
                    f"{row.where} is no reference answer: it needs question_id and choices[0].turns",
                    hint=f"Get the file from {FASTCHAT_URL}.",
                ) from error
    return JudgePrompts(prompts, references)


def converse(
    session: Session, questions: Sequence[Question], temperatures: Mapping[str, float], max_new_tokens: int
) -> list[Answers]:
    """Ask all questions turn by turn, each turn with the answers before it; `temperatures` are by category."""
    chats: list[tuple[Turn, ...]] = [() for _ in questions]
    for turn in range(max((len(question.turns) for question in questions), default=0)):
        chats = [(*chat, Turn("user", question.turns[turn])) for chat, question in zip(chats, questions, strict=True)]
        requests = [
            session.generation(chat, max_new_tokens, temperature=temperatures.get(question.category, OTHER_TEMPERATURE))
            for chat, question in zip(chats, questions, strict=True)
        ]
        texts = session.model.generate(requests)
        chats = [(*chat, Turn("assistant", text.strip())) for chat, text in zip(chats, texts, strict=True)]
    return [[turn.content for turn in chat if turn.role == "assistant"] for chat in chats]


def parse_rating(reply: str) -> float | None:
    """Return the rating in a judge's reply, 1 to 10; None where there is none.

    As in FastChat the first [[rating]] counts, else the first [rating]; its -1 for none is no rating here, nor is
    what lies outside of the scale.
    """
    for pattern in _RATINGS:
        if match := pattern.search(reply):
            rating = float(match[1])
            return rating if 1 <= rating <= 10 else None
    return None


def parse_verdict(reply: str) -> str | None:
    """Return A, B or C (a tie) from a judge's reply; None where there is none, or more than one.

    FastChat takes A where A and B are named, which favours whoever is shown first.
    """
    found = set(_VERDICT.findall(reply))
    return found.pop() if len(found) == 1 else None


def rate(session: Session) -> list[ItemScore]:
    """Let the judge rate each answer by itself; without a judge the items have no marks."""
    questions = read_questions(session, NUM_TURNS)
    prompts = _prompts(session, questions)
    turns = _turns(questions, converse(session, questions, TEMPERATURES, MAX_NEW_TOKENS))
    if session.judge is None or prompts is None:
        return [_item(question, turn, given) for question, given, turn in turns]
    requests = [
        prompts.request(_name("single", "v1", question, turn), question, answer=given)
        for question, given, turn in turns
    ]
    items = []
    for (question, given, turn), judgment in zip(turns, session.judge.ask(requests, parse_rating), strict=True):
        marks = judgment.marks(f"MT-{turn + 1}", "MT-Avg", question.category)
        items.append(_item(question, turn, given, marks, judgment.record()))
    return items


def compare(session: Session) -> list[ItemScore]:
    """Let the judge compare each answer with the baseline's, shown first and shown second; raise UsageError for none.

    Who wins both times wins; all else is a tie, as in FastChat's show_result.
    """
    questions = read_questions(session, NUM_TURNS)
    prompts = _prompts(session, questions)
    others = _baseline(session, questions) if session.judge else {}
    turns = _turns(questions, converse(session, questions, TEMPERATURES, MAX_NEW_TOKENS))
    if session.judge is None or prompts is None:
        return [_item(question, turn, given) for question, given, turn in turns]
    requests = []
    for question, mine, turn in turns:
        name, other = _name("pair", "v2", question, turn), others[question.id]
        requests.append(prompts.request(name, question, answer_a=mine, answer_b=other))
        requests.append(prompts.request(name, question, answer_a=other, answer_b=mine))
    judgments = session.judge.ask(requests, parse_verdict)
    items = []
    for (question, mine, turn), first, second in zip(turns, judgments[::2], judgments[1::2], strict=True):
        record = {"baseline": others[question.id][turn], "shown first": first.record(), "shown second": second.record()}
        items.append(_item(question, turn, mine, _outcome(first, second), record))
    return items


def _outcome(first: Judgment[str], second: Judgment[str]) -> dict[str, float]:
    """Return the marks of an answer that was A in the first comparison, and B in the second."""
    if first.verdict is None or second.verdict is None:
        return {}
    win = (first.verdict, second.verdict) == ("A", "B")
    loss = (first.verdict, second.verdict) == ("B", "A")
    tie = not win and not loss
    return {"win_rate": win + tie / 2, "win": float(win), "tie": float(tie), "loss": float(loss)}


def _prompts(session: Session, questions: Sequence[Question]) -> JudgePrompts | None:
    """Return what the judge is asked, or None without a judge; what is missing shows before anything is generated."""
    if session.judge is None:
        return None
    prompts = read_prompts(session.files)
    wanting = [question.id for question in questions if question.category in WITH_REFERENCE]
    if wanting and not prompts.references:
        raise session.files.missing(*REFERENCES)
    for number in wanting:
        if len(prompts.references.get(number, ())) < NUM_TURNS:
            raise ConfigError(
                f"{REFERENCES[0]} has no reference answers to both turns of question {number}",
                hint=f"Get the file from {FASTCHAT_URL}.",
            )
    return prompts


def _baseline(session: Session, questions: Sequence[Question]) -> dict[str, Answers]:
    """Return the baseline's answers by question."""
    answers = session.baseline_answers or {}
    try:
        return {question.id: [answers[_item_id(question, turn)] for turn in range(NUM_TURNS)] for question in questions}
    except KeyError as error:
        raise UsageError(
            f"mt-bench-pairwise compares with another's answers, and there is none to {error}",
            hint="Run mt-bench on the other one first, then name it as the baseline.",
        ) from error


def _turns(questions: Sequence[Question], answers: Sequence[Answers]) -> list[tuple[Question, Answers, int]]:
    return [
        (question, given, turn)
        for question, given in zip(questions, answers, strict=True)
        for turn in range(len(question.turns))
    ]


def _name(kind: str, version: str, question: Question, turn: int) -> str:
    """Return FastChat's name for a judge prompt."""
    return f"{kind}-{'math-v1' if question.category in WITH_REFERENCE else version}{'-multi-turn' if turn else ''}"


def _item_id(question: Question, turn: int) -> str:
    return f"{question.id}-{turn + 1}"


def _item(
    question: Question,
    turn: int,
    answers: Answers,
    marks: Mapping[str, float] | None = None,
    judged: Mapping[str, object] | None = None,
) -> ItemScore:
    record = question.record(answers, turn) | dict(judged or {})
    return ItemScore(_item_id(question, turn), marks or {}, record, cluster=question.id)


def _texts(label: str, turns: Answers) -> dict[str, str]:
    """Return turns under the names that the judge prompts have for them: label is the first's, label_N each one's."""
    return {label: turns[0] if turns else ""} | {f"{label}_{turn}": text for turn, text in enumerate(turns, 1)}


def _is_texts(turns: object, num: int) -> TypeGuard[list[str]]:
    return isinstance(turns, list) and len(turns) == num and all(isinstance(turn, str) for turn in turns)


_benchmark = partial(
    Benchmark,
    size=160,
    citation="Zheng et al. 2023, Judging LLM-as-a-judge with MT-Bench and Chatbot Arena, arXiv:2306.05685",
    data=DataSource(("question.jsonl",), FASTCHAT_URL, ("mt-bench", "mt_bench"), release=releases.MT_BENCH),
    needs=("judge", "gpu-advised"),
)
MT_BENCH = _benchmark(
    "mt-bench",
    "MT-Bench: two turns, each answer rated by a judge",
    ("chat", "paper-table-2", "paper-table-5", "paper-table-6"),
    (
        Metric("MT-1", "points"),
        Metric("MT-2", "points"),
        Metric("MT-Avg", "points"),
        *(Metric(category, "points", is_detail=True) for category in CATEGORIES),
    ),
    run=rate,
)

MT_BENCH_PAIRWISE = _benchmark(
    "mt-bench-pairwise",
    "MT-Bench: each answer compared with a baseline's by a judge, in both orders",
    ("chat",),
    (
        Metric("win_rate"),
        Metric("win", is_detail=True),
        Metric("tie", is_detail=True),
        Metric("loss", higher_is_better=False, is_detail=True),
    ),
    run=compare,
    takes=(*MT_BENCH.takes, "baseline"),
    answers_of=MT_BENCH.name,
)
BENCHMARKS = (MT_BENCH, MT_BENCH_PAIRWISE)
