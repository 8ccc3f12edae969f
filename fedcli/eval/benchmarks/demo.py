"""The built-in demo's held-out rows: exact match of greedy answers, or for pairs which response is likelier."""

from collections.abc import Sequence

from fedcli.data.formats import RowReader
from fedcli.data.source import read_rows
from fedcli.eval.benchmark import Benchmark, ItemScore, Metric, Session
from fedcli.eval.data import DataSource, Files
from fedcli.eval.requests import Likelihood
from fedcli.tasks.conversation import Example, Item, Preference, Question, shown

MAX_NEW_TOKENS = 16
"""Twice what the longest answer, one of four words for an alert level, has."""
PAIR_METRICS = (Metric("preference_accuracy"), Metric("margin", unit="nats", is_detail=True))
METRICS = (Metric("exact_match"), *PAIR_METRICS)


def run(session: Session) -> list[ItemScore]:
    """Score the rows that the workspace keeps: examples of an instruction workspace, pairs of a preference one."""
    items = _read(session.files)[: session.options.limit]
    examples = [item for item in items if isinstance(item, Example)]
    return _answered(session, examples) + compared(session, [item for item in items if isinstance(item, Preference)])


def _answered(session: Session, examples: Sequence[Example]) -> list[ItemScore]:
    answers = session.model.generate([session.generation(example.prompt, MAX_NEW_TOKENS) for example in examples])
    return [
        ItemScore(
            str(number),
            {"exact_match": float(answer.strip() == example.response.strip())},
            {"prompt": shown(example.prompt), "answer": answer, "expected": example.response},
        )
        for number, (example, answer) in enumerate(zip(examples, answers, strict=True))
    ]


def compared(session: Session, pairs: Sequence[Preference]) -> list[ItemScore]:
    """Score which response of each pair is the likelier one."""
    requests = [Likelihood(pair.prompt, side) for pair in pairs for side in (pair.chosen, pair.rejected)]
    found = [answer.log_prob for answer in session.model.log_likelihoods(requests)]
    return [
        ItemScore(
            str(number),
            {"preference_accuracy": float(chosen > rejected), "margin": chosen - rejected},
            {"prompt": shown(pair.prompt), "chosen": pair.chosen, "rejected": pair.rejected}
            | {"log_prob_chosen": chosen, "log_prob_rejected": rejected},
        )
        for number, (pair, chosen, rejected) in enumerate(zip(pairs, found[::2], found[1::2], strict=True))
    ]


def _read(files: Files) -> list[Item]:
    """Read rows of the built-in set: pairs, or examples, of a prompt and its answer too."""
    (path,) = files.require()
    rows = read_rows(path, files.opener)
    form = next((form for column, form in _FORMS.items() if column in rows[0].fields), "alpaca")
    items = [item for _, item in RowReader(form).read(rows)]
    return [Example(*item.conversations) if isinstance(item, Question) else item for item in items]


_FORMS = {"chosen": "preference", "answer": "prompt-answer"}
"""The formats of built-in rows by a column that others do not have."""


def _benchmark(name: str, split: str, title: str) -> Benchmark:
    instead = (
        "It scores the built-in rows, in a workspace of them. `fedcli eval rows --data FILE` scores rows of your own."
    )
    source = DataSource((f"held-out-{split}.jsonl",), "a workspace of the built-in rows", instead=instead)
    return Benchmark(
        name, title, ("demo",), METRICS, 360, "fedcli's own", source, run, takes=("max_new_tokens", "template")
    )


BENCHMARKS = (
    _benchmark("demo", "test", "The built-in held-out rows"),
    _benchmark("demo-tuning", "tuning", "The built-in rows for choosing settings"),
)
