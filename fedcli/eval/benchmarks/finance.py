"""Financial sentiment, the four sets of FinGPT's benchmark: by generation, and by the likelihood of the three labels.

Questions have the form of FinGPT's training rows (Yang et al. 2023), written by the template. An answer counts by the
first label in it; FinGPT's code takes an answer without any for neutral, here it is wrong.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from fedcli.data.file_rows import Row
from fedcli.errors import ConfigError
from fedcli.eval import releases
from fedcli.eval.benchmark import Benchmark, ItemScore, Metric, Need, Session
from fedcli.eval.data import DataSource, Files
from fedcli.eval.requests import Likelihood
from fedcli.tasks.conversation import Prompt, Turn

Label = Literal["negative", "neutral", "positive"]
LABELS: tuple[Label, ...] = get_args(Label)
MAX_NEW_TOKENS = 16

_QUESTION = "What is the sentiment of this {kind}? Please choose an answer from {{negative/neutral/positive}}."
_SHOWN = re.compile(r"Instruction: What is the sentiment of this (news|tweet)\?.*?\nInput: (.*)\nAnswer: ?", re.DOTALL)
_LABEL = re.compile(rf"\b({'|'.join(LABELS)})\b")
_NAMED: dict[str, Label] = {label: label for label in LABELS} | {
    "strong negative": "negative",
    "moderately negative": "negative",
    "mildly negative": "neutral",
    "mildly positive": "neutral",
    "moderately positive": "positive",
    "strong positive": "positive",
}
"""The three labels of FPB, FiQA and TFNS, and NWGI's seven."""
_TFNS: tuple[Label, ...] = ("negative", "positive", "neutral")  # bearish, bullish, neutral


@dataclass(frozen=True)
class Statement:
    """A sentence with its sentiment."""

    text: str
    label: Label
    kind: Literal["news", "tweet"] = "news"

    @property
    def prompt(self) -> Prompt:
        """The question, with the sentence as its input."""
        return (Turn("user", _QUESTION.format(kind=self.kind), self.text),)


def held_out(rows: Sequence[Row], share: float) -> list[Row]:
    """Return FinGPT's test part of a set that has none: that of datasets' train_test_split(share, seed=42)."""
    import numpy as np

    order = np.random.default_rng(42).permutation(len(rows))
    return [rows[index] for index in order[: math.ceil(len(rows) * share)]]


def fiqa_label(score: float) -> Label:
    """Return the label of a FiQA score, from -1 to 1: below -0.1 negative, below 0.1 neutral, else positive."""
    return "negative" if score < -0.1 else "neutral" if score < 0.1 else "positive"


def find_label(answer: str) -> Label | None:
    """Return the first label that an answer names as a word, whatever its case; None where it names none."""
    found = _LABEL.search(answer.lower())
    return next(label for label in LABELS if label == found[1]) if found else None


def read_fpb(files: Files) -> list[Statement]:
    """Read FPB: the test part in FinGPT's form, else that part of all sentences (Latin-1 lines of sentence@label)."""
    if found := files.find("Sentences_50Agree.txt") if not files.find("fpb*test*.jsonl") else []:
        return [_labelled(row) for row in held_out(list(_sentences(found[0])), 0.25)]
    rows = list(files.rows())
    if any("context" in row.fields for row in rows):
        return [_shown(row) for row in rows]
    return [_labelled(row) for row in held_out(rows, 0.25)]


def read_fiqa(files: Files) -> list[Statement]:
    """Read FiQA-SA: the test part in FinGPT's form, all of the challenge's task 1, or that part of the hub's rows."""
    found = files.find()
    if found and found[0].suffix == ".json":
        return [_opinion(row) for path in found for row in _opinions(path)]
    rows = list(files.rows())
    if any("context" in row.fields for row in rows):
        return [_shown(row) for row in rows]
    return [_opinion(row) for row in held_out(rows, 0.226)]


def read_tfns(files: Files) -> list[Statement]:
    """Read TFNS: rows of text and label 0 to 2.

    FinLoRA's tfns_test.jsonl, of FinGPT's form, has neutral and positive exchanged: it is not read.
    """
    return [Statement(_text(row, "text"), _numbered(row, _TFNS), "tweet") for row in files.rows()]


def read_nwgi(files: Files) -> list[Statement]:
    """Read NWGI: rows of news and one of seven labels, or of FinGPT's form."""
    return [
        _shown(row) if "context" in row.fields else Statement(_text(row, "news"), _named(row, "label"))
        for row in files.rows()
    ]


def run_generation(read: Callable[[Files], list[Statement]], session: Session) -> list[ItemScore]:
    """Score the first label in each greedy answer."""
    statements = read(session.files)[: session.options.limit]
    answers = session.model.generate([session.generation(found.prompt, MAX_NEW_TOKENS) for found in statements])
    return [
        _scored(number, statement, find_label(answer), answer)
        for number, (statement, answer) in enumerate(zip(statements, answers, strict=True))
    ]


def run_likelihood(read: Callable[[Files], list[Statement]], session: Session) -> list[ItemScore]:
    """Score the likeliest of the three labels as the answer."""
    statements = read(session.files)[: session.options.limit]
    requests = [Likelihood(statement.prompt, label) for statement in statements for label in LABELS]
    found = [answer.log_prob for answer in session.model.log_likelihoods(requests)]
    items = []
    for number, statement in enumerate(statements):
        log_probs = dict(zip(LABELS, found[number * len(LABELS) :][: len(LABELS)], strict=True))
        likeliest: Label = max(LABELS, key=lambda label: log_probs[label])
        items.append(_scored(number, statement, likeliest, log_probs))
    return items


def _scored(number: int, statement: Statement, predicted: Label | None, answer: object) -> ItemScore:
    counts = [float(label == predicted == statement.label) for label in LABELS]
    counts += [float(label == predicted) for label in LABELS]
    counts += [float(label == statement.label) for label in LABELS]
    return ItemScore(
        str(number),
        {"accuracy": float(predicted == statement.label), "weighted_f1": counts, "macro_f1": counts},
        {"text": statement.text, "answer": answer, "label": predicted, "expected": statement.label},
        cluster=hashlib.sha256(statement.text.encode()).hexdigest()[:16],  # FiQA has several opinions of one sentence
    )


def f1_scores(counts: Sequence[float]) -> list[float]:
    """Return each class's F1, 0 where it is undefined, of its numbers of true positives, predictions and members."""
    correct, predicted, actual = (counts[start : start + len(LABELS)] for start in (0, len(LABELS), 2 * len(LABELS)))
    return [2 * tp / (p + a) if p + a else 0.0 for tp, p, a in zip(correct, predicted, actual, strict=True)]


def weighted_f1(counts: Sequence[float]) -> float:
    """Return the mean of the classes' F1, weighted by their members: scikit-learn's f1_score(average="weighted")."""
    actual = counts[2 * len(LABELS) :]
    return sum(f1 * members for f1, members in zip(f1_scores(counts), actual, strict=True)) / sum(actual)


def macro_f1(counts: Sequence[float]) -> float:
    """Return the mean of the F1 of the classes that occur or are predicted: scikit-learn's average="macro"."""
    occurs = [predicted + actual > 0 for predicted, actual in zip(counts[3:6], counts[6:9], strict=True)]
    return sum(f1_scores(counts)) / sum(occurs)


def _sentences(path: Path) -> Iterable[Row]:
    with path.open(encoding="latin-1") as file:  # whose lines end in \n alone; str.splitlines knows other ends
        for number, line in enumerate(file, 1):
            sentence, mark, label = line.rpartition("@")
            where = f"{path}, line {number}"
            if not mark:
                raise ConfigError(f"{where} is not SENTENCE@LABEL", hint="Name the publisher's Sentences_50Agree.txt.")
            yield Row({"sentence": sentence, "label": label}, where)


def _opinions(path: Path) -> Iterable[Row]:
    """Yield the opinions in a task-1 file, {id: {sentence, info: [{sentiment_score, ...}]}}, as the hub has them."""
    try:
        entries = json.loads(path.read_bytes())
        for name, entry in entries.items():
            for info in entry["info"]:
                fields = {"sentence": entry["sentence"], "sentiment_score": info["sentiment_score"]}
                yield Row(fields | {"format": "post" if "post" in path.name else "headline"}, f"{path}, entry {name}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no file of FiQA's task 1: {error!r}", hint="Get the file again.") from error


def _opinion(row: Row) -> Statement:
    score = _text(row, "sentiment_score")
    try:
        label = fiqa_label(float(score))
    except ValueError as error:
        raise ConfigError(f"{row.where}: sentiment_score is {score!r}, no number", hint="Mend that row.") from error
    return Statement(_text(row, "sentence"), label, "tweet" if row.fields.get("format") == "post" else "news")


def _shown(row: Row) -> Statement:
    """Return a row of FinGPT's form: context (instruction, input, "Answer: ") and target."""
    found = _SHOWN.fullmatch(_text(row, "context"))
    if found is None:
        raise ConfigError(
            f"{row.where}: its context is not 'Instruction: What is the sentiment of this ... Input: ... Answer: '",
            hint="Mend or remove that row.",
        )
    return Statement(found[2], _named(row, "target"), "tweet" if found[1] == "tweet" else "news")


def _labelled(row: Row) -> Statement:
    is_number = isinstance(row.fields.get("label"), int)
    return Statement(_text(row, "sentence"), _numbered(row, LABELS) if is_number else _named(row, "label"))


def _numbered(row: Row, labels: Sequence[Label]) -> Label:
    number = _text(row, "label")
    if number not in ("0", "1", "2"):
        raise ConfigError(f"{row.where}: label is {number!r}, not 0, 1 or 2", hint="Mend or remove that row.")
    return labels[int(number)]


def _named(row: Row, column: str) -> Label:
    label = _text(row, column).strip().lower()
    if label not in _NAMED:
        raise ConfigError(
            f"{row.where}: {column} is {label!r}, which is no sentiment", hint=f"Known: {', '.join(_NAMED)}."
        )
    return _NAMED[label]


def _text(row: Row, column: str) -> str:
    value = row.fields.get(column)
    if value is None or not str(value).strip():
        raise ConfigError(f"{row.where} has no {column}", hint=f"It has: {', '.join(row.fields)}.")
    return str(value)


_F1 = (Metric("accuracy"), Metric("weighted_f1", of_sum=weighted_f1), Metric("macro_f1", of_sum=macro_f1))


def _source(name: str, files: tuple[str, ...], hub: str, **chosen: Any) -> DataSource:
    return DataSource(files, f"https://huggingface.co/datasets/{hub}", (name, "fin_sentiment"), hub, **chosen)


_SETS: tuple[tuple[str, str, int, str, DataSource, Callable[[Files], list[Statement]]], ...] = (
    (
        "fpb",
        "Financial PhraseBank (FinGPT's test part)",
        1212,
        "Malo et al. 2014, Good debt or bad debt, arXiv 1307.5336",
        _source(
            "fpb",
            ("fpb*test*.jsonl", "Sentences_50Agree.txt"),
            "takala/financial_phrasebank",
            subset="sentences_50agree",
            split="train",
            revision="refs/convert/parquet",
            release=releases.FPB,
        ),
        read_fpb,
    ),
    (
        "fiqa",
        "FiQA-SA: sentiment of financial news and posts",
        235,
        "Maia et al. 2018, WWW'18 open challenge: financial opinion mining and question answering",
        _source(
            "fiqa",
            ("fiqa*test*.jsonl", "task1_*.json", "fiqa*.json"),
            "pauri32/fiqa-2018",
            split="train+validation+test",
            release=releases.FIQA,
        ),
        read_fiqa,
    ),
    (
        "tfns",
        "Twitter financial news sentiment",
        2388,
        "Magic 2022, Twitter Financial News Sentiment (Hugging Face)",
        _source(
            "tfns",
            ("sent_valid.csv", "tfns*valid*.csv"),
            "zeroshot/twitter-financial-news-sentiment",
            split="validation",
            release=releases.TFNS,
        ),
        read_tfns,
    ),
    (
        "nwgi",
        "News with GPT instructions, seven labels as three",
        4047,
        "Yang 2023, News with GPT instructions (FinGPT, Hugging Face)",
        _source("nwgi", ("nwgi*test*.jsonl",), "oliverwang15/news_with_gpt_instructions", release=releases.NWGI),
        read_nwgi,
    ),
)


_FLOWERTUNE = "flowertune-finance"
_MORE_GROUPS = {"fpb": ("paper-table-5", _FLOWERTUNE), "fiqa": (_FLOWERTUNE,), "tfns": (_FLOWERTUNE,)}


def _benchmarks(mode: str, how: str, run: Callable[..., list[ItemScore]], needs: tuple[Need, ...]) -> list[Benchmark]:
    """Return the sets' benchmarks of one way of asking, and the plain means over the sets, whatever their sizes."""
    benchmark = partial(Benchmark, groups=("finance", "paper-table-4"))
    if mode:
        benchmark = partial(Benchmark, groups=("finance",), takes=("template",))
    own = benchmark.keywords["groups"]
    sets = [
        benchmark(
            name=name + mode,
            groups=(*own, *_MORE_GROUPS.get(name + mode, ())),
            title=title + how,
            metrics=_F1,
            size=size,
            citation=citation,
            data=data,
            run=partial(run, read),
            needs=needs,
        )
        for name, title, size, citation, data, read in _SETS
    ]
    names = tuple(found.name for found in sets)
    averages = tuple(
        replace(metric, name=f"Avg:{count} {metric.name}", mean_of=tuple((name, metric.name) for name in names[:count]))
        for count in (3, 4)
        for metric in _F1
    )
    mean = benchmark(
        name=f"finance{mode}",
        title=f"Average over FPB, FiQA, TFNS (Avg:3) and NWGI (Avg:4){how}",
        metrics=averages,
        size=sum(found.size for found in sets),
        citation="Ye et al. 2024, OpenFedLLM, arXiv 2402.06954, table 4",
        data=None,
        run=None,
        parts=names,
    )
    return [*sets, mean]


BENCHMARKS = (
    *_benchmarks("", "", run_generation, ()),
    *_benchmarks("-likelihood", ", by likelihood", run_likelihood, ("likelihood",)),
)
