"""Held-out rows of one's own: how likely their responses are, or which of two responses is the likelier."""

from collections.abc import Sequence

from fedcli.data.file_rows import KINDS
from fedcli.data.formats import RowReader, guess_format
from fedcli.data.source import read_rows
from fedcli.eval.benchmark import Benchmark, ItemScore, Metric, Session
from fedcli.eval.benchmarks.demo import PAIR_METRICS, compare
from fedcli.eval.data import DataSource
from fedcli.eval.requests import Likelihood
from fedcli.tasks.conversation import Example, Preference, is_text, shown

HINT = (
    "Write rows that no client has, in a form that fedcli trains on, to a folder, as held-out.jsonl (or .csv, "
    '.parquet ...), and run `fedcli eval own-rows --data FOLDER`: docs/EVALUATION.md, "Rows of your own".'
)


def run(session: Session) -> list[ItemScore]:
    """Score the rows of held-out.*, whose format is guessed as that of training rows is."""
    (path, *_) = session.files.require()
    rows = read_rows(path, session.files.opener)[: session.options.limit]
    task = "dpo" if rows and "rejected" in rows[0].fields else "sft"
    reader = RowReader(guess_format(str(path), None, task, rows, "").format)
    items = [item for _, item in reader.read(rows)]
    reader.require_rows(path)
    examples = [item for item in items if isinstance(item, Example)]
    texts = [example for example in examples if is_text(example.turns)]
    unscored = [*reader.left_out.elements(), *("a text without a prompt" for _ in texts)]
    return [
        *_likely(session, [example for example in examples if not is_text(example.turns)]),
        *compare(session, [item for item in items if isinstance(item, Preference)]),
        *(ItemScore(f"left-out-{number}", {}, {"left_out": reason}) for number, reason in enumerate(unscored)),
    ]


def _likely(session: Session, examples: Sequence[Example]) -> list[ItemScore]:
    """Score each last response by its tokens' likelihood, and by whether greedy decoding gives just it."""
    found = session.model.log_likelihoods([Likelihood(example.prompt, example.response) for example in examples])
    return [
        ItemScore(
            str(number),
            {"loss": (-answer.log_prob, answer.num_tokens), "exact_match": float(answer.is_greedy)},
            {"prompt": shown(example.prompt), "expected": example.response, "log_prob": answer.log_prob},
        )
        for number, (example, answer) in enumerate(zip(examples, found, strict=True))
    ]


BENCHMARK = Benchmark(
    "own-rows",
    "Held-out rows of your own",
    ("own",),
    (
        Metric("loss", "nats", higher_is_better=False, of_sum=lambda total: total[0] / total[1]),
        Metric("exact_match"),
        *PAIR_METRICS,
    ),
    0,
    "yours",
    DataSource(tuple(f"held-out{suffix}" for suffix in KINDS), "yourself", instead=HINT),
    run,
    needs=("likelihood",),
    takes=("template",),
)
