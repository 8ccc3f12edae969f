"""A user's own held-out rows: how likely their responses are, whether greedy decoding gives them, which one is better.

Rows have any of the formats that training reads (docs/DATA.md), which is guessed from their columns. Of a conversation
the last response is scored, given all turns before it.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedcli.data.file_rows import KINDS, Opener
from fedcli.data.formats import RowReader, guess_format
from fedcli.data.source import read_rows
from fedcli.errors import ConfigError
from fedcli.eval.benchmark import Benchmark, ItemScore, Metric, Session
from fedcli.eval.benchmarks.demo import PAIR_METRICS, compared
from fedcli.eval.data import DataSource, Files
from fedcli.eval.requests import Likelihood
from fedcli.tasks.conversation import Example, Item, Judged, Preference, is_text, shown

PREFIX = "rows"
"""Of the files' names: rows.jsonl, or rows-finance.jsonl and rows-code.jsonl, which have metrics of their own too."""


def _mean_loss(sums: Sequence[float]) -> float:
    """Return nats per token of a sum of (nats, tokens)."""
    return sums[0] / sums[1]


def _margin(sums: Sequence[float]) -> float:
    """Return the mean of desirable responses less that of undesirable ones, of (sum, number) of each."""
    return sums[0] / sums[1] - sums[2] / sums[3] if sums[1] and sums[3] else 0.0


METRICS = (
    Metric("loss", unit="nats", higher_is_better=False, of_sum=_mean_loss),
    Metric("exact_match"),
    *PAIR_METRICS,
    Metric("verdict_margin", unit="nats", of_sum=_margin),
)
"""loss: nats per token of the responses, their end included, all tokens of all rows alike; exact_match: rows whose
response greedy decoding gives, token by token; preference_accuracy: pairs whose chosen response is the likelier one;
margin: by how much, summed over its tokens; verdict_margin: the mean log-probability of desirable responses less that
of undesirable ones. What it gains from round 0 to another round is their rewards' difference, over KTO's beta."""


def run(session: Session) -> list[ItemScore]:
    """Score the rows of every file; raises ConfigError for a file without a usable row.

    Of several files each is a part, with metrics METRIC:PART. A row that cannot be used is an item without marks.
    """
    scored: list[ItemScore] = []
    files = _find(session.files)
    for path in files:
        items, left_out = _read(path, session.files.opener, session.options.limit)
        examples = [item for item in items if isinstance(item, Example)]
        found = _answered(session, examples)
        found += compared(session, [item for item in items if isinstance(item, Preference)])
        found += _judged(session, [item for item in items if isinstance(item, Judged)], path)
        found += [ItemScore(f"left-out-{at}", {}, {"left_out": reason}) for at, reason in enumerate(left_out)]
        scored += found if len(files) == 1 else [_of_part(_part_name(path), item) for item in found]
    return scored


def _find(files: Files) -> list[Path]:
    """Return the files of all kinds, by their part's name; raises ConfigError for two of one name."""
    found = {path for pattern in files.source.files for path in files.find(pattern)} or {*files.require()}
    parts: dict[str, Path] = {}
    for path in sorted(found):
        if (other := parts.setdefault(_part_name(path), path)) != path:
            raise ConfigError(f"{other} and {path} are both the part {_part_name(path)!r}", hint="Rename one of them.")
    return list(parts.values())


def _read(path: Path, opener: Opener | None, limit: int | None) -> tuple[list[Item], list[str]]:
    """Return a file's examples, else its pairs, else its verdicts; and why each of the other rows is left out."""
    rows = read_rows(path, opener)[:limit]
    error = None
    for task in ("sft", "dpo", "kto"):
        try:
            reader = RowReader(guess_format(str(path), None, task, rows, "the name of the columns").format)
            items = [item for _, item in reader.read(rows)]
            reader.require_rows(path)
        except ConfigError as found:
            error = error or found
            continue
        usable = [item for item in items if not is_text(item.conversations[0])]
        if not usable:
            raise ConfigError(f"{path}: its rows are texts without a prompt", hint="Give rows a prompt and a response.")
        texts = ["a text without a prompt"] * (len(items) - len(usable))
        return usable, [*reader.left_out.elements(), *texts]
    assert error is not None
    raise error


def _judged(session: Session, verdicts: Sequence[Judged], path: Path) -> list[ItemScore]:
    """Score how likely responses of either verdict are; raise ConfigError where all have one."""
    if len({verdict.is_desirable for verdict in verdicts}) == 1:
        raise ConfigError(
            f"{path}: all its verdicts are {'good' if verdicts[0].is_desirable else 'bad'}, and a score compares good "
            "responses with bad ones",
            hint="Give rows of both kinds; or pairs, of prompt, chosen and rejected.",
        )
    found = session.model.log_likelihoods([Likelihood(each.prompt, each.response) for each in verdicts])
    return [
        ItemScore(
            str(number),
            {"verdict_margin": (log_prob, 1.0, 0.0, 0.0) if each.is_desirable else (0.0, 0.0, log_prob, 1.0)},
            {"prompt": shown(each.prompt), "response": each.response, "is_desirable": each.is_desirable}
            | {"log_prob": log_prob},
        )
        for number, (each, log_prob) in enumerate(zip(verdicts, (one.log_prob for one in found), strict=True))
    ]


def _part_name(path: Path) -> str:
    return path.name.split(".")[0].removeprefix(PREFIX).strip("-_ ") or PREFIX


def _of_part(part: str, item: ItemScore) -> ItemScore:
    marks = {**item.marks, **{f"{metric}:{part}": mark for metric, mark in item.marks.items()}}
    return replace(item, item=f"{part}/{item.item}", marks=marks)


def _answered(session: Session, examples: Sequence[Example]) -> list[ItemScore]:
    answers = session.model.log_likelihoods([Likelihood(each.prompt, each.response) for each in examples])
    return [
        ItemScore(
            str(number),
            {"loss": (-answer.log_prob, float(answer.num_tokens)), "exact_match": float(answer.is_greedy)},
            {"prompt": shown(example.prompt), "expected": example.response, "log_prob": answer.log_prob},
        )
        for number, (example, answer) in enumerate(zip(examples, answers, strict=True))
    ]


BENCHMARK = Benchmark(
    "rows",
    "Held-out rows of your own",
    ("own",),
    METRICS,
    0,
    "your own",
    DataSource(
        tuple(f"{PREFIX}*{kind}" for kind in KINDS),
        "rows of your own",
        instead="Name rows that no client trains on with --data FILE; or a folder with rows.jsonl, rows-NAME.csv and "
        "the like with --data DIR. docs/EVALUATION.md explains it.",
        is_any_file=True,
    ),
    run,
    needs=("likelihood",),
    takes=("template",),
)
