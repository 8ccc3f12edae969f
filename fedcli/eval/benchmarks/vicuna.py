"""The Vicuna bench (Chiang et al. 2023): 80 questions of one turn, each answer rated by a judge.

Settings are those of OpenFedLLM (evaluation/open_ended), whose paper reports it: temperature 0.7, 2,048 tokens, and
MT-Bench's prompt without a reference for all questions.
"""

from fedcli.eval import releases
from fedcli.eval.benchmark import Benchmark, ItemScore, Metric, Session
from fedcli.eval.benchmarks.mt_bench import FASTCHAT_URL, converse, parse_rating, read_prompts, read_questions
from fedcli.eval.data import DataSource

MAX_NEW_TOKENS = 2048


def run(session: Session) -> list[ItemScore]:
    """Let the judge rate each answer; without a judge the items have no marks."""
    questions = read_questions(session, 1)
    prompts = read_prompts(session.files) if session.judge else None
    asked = list(zip(questions, converse(session, questions, {}, MAX_NEW_TOKENS), strict=True))
    if session.judge is None or prompts is None:
        return [ItemScore(question.id, {}, question.record(given, 0)) for question, given in asked]
    judgments = session.judge.ask(
        [prompts.request("single-v1", question, answer=given) for question, given in asked], parse_rating
    )
    return [
        ItemScore(question.id, judgment.marks("Vicuna"), question.record(given, 0) | judgment.record())
        for (question, given), judgment in zip(asked, judgments, strict=True)
    ]


BENCHMARK = Benchmark(
    "vicuna",
    "Vicuna bench: one turn, each answer rated by a judge",
    ("chat", "paper-table-2", "paper-table-6"),
    (Metric("Vicuna", "points"),),
    80,
    "Chiang et al. 2023, Vicuna: an open-source chatbot impressing GPT-4 with 90% ChatGPT quality, LMSYS blog",
    DataSource(("question.jsonl",), FASTCHAT_URL, ("vicuna_bench",), release=releases.VICUNA),
    run,
    needs=("judge", "gpu-advised"),
)
