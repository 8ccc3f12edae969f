"""Financial sentiment: whose rows are read how, what an answer says, and F1 as scikit-learn has it."""

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score
from support.processes import fedcli
from support.scripted import ROWS, Scripted, session

from fedcli.data.file_rows import Row
from fedcli.errors import ConfigError, RequirementError
from fedcli.eval.benchmark import ItemScore, Options
from fedcli.eval.benchmarks import finance
from fedcli.eval.benchmarks.finance import BENCHMARKS, LABELS, Statement, find_label, fiqa_label, held_out
from fedcli.eval.data import Files
from fedcli.eval.requests import Generation, Likelihood
from fedcli.eval.statistics import score
from fedcli.tasks.conversation import Turn
from fedcli.workspace.layout import Workspace
from fedcli.workspace.scores import read_scores

DATA = Path(os.environ.get("FEDCLI_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
REAL = DATA / "fin_sentiment"
needs_real_rows = pytest.mark.skipif(not REAL.is_dir(), reason="no folder of public rows ($FEDCLI_TEST_DATA)")
BY_NAME = {benchmark.name: benchmark for benchmark in BENCHMARKS}
READ = {"fpb": finance.read_fpb, "fiqa": finance.read_fiqa, "tfns": finance.read_tfns, "nwgi": finance.read_nwgi}
ASKED = "Please choose an answer from {negative/neutral/positive}."


def files(name: str, *roots: Path) -> Files:
    data = BY_NAME[name].data
    assert data is not None
    return Files(name, data, roots, may_fetch=False)


def statements(name: str, folder: Path = ROWS) -> list[Statement]:
    return READ[name](files(name, folder))


class OnTheHub(Files):
    """The data of a benchmark that no folder here has, and a hub that does."""

    def hub_rows(self, subset: str | None) -> Iterator[Row]:
        rows = HUB[self.benchmark, subset]
        return (Row(fields, f"hub, row {number}") for number, fields in enumerate(rows, 1))


def run(name: str, model: Scripted, folder: Path = ROWS, options: Options | None = None) -> list[ItemScore]:
    benchmark = BY_NAME[name]
    assert benchmark.run is not None
    return benchmark.run(session(benchmark, model, folder, options=options))


def values(name: str, items: list[ItemScore]) -> dict[str, float]:
    return {
        metric.name: score(metric, [{item.item: item.marks[metric.name] for item in items}]).value
        for metric in BY_NAME[name].metrics
    }


def shown(kind: str, text: str, target: str) -> str:
    context = f"Instruction: What is the sentiment of this {kind}? {ASKED}\nInput: {text}\nAnswer: "
    return json.dumps({"context": context, "target": target}) + "\n"


# What an answer says

SAID = {
    "positive": "positive",
    "Positive.": "positive",
    "NEUTRAL": "neutral",
    " The sentiment is negative, not positive": "negative",
    "not negative but positive": "negative",
    "{neutral}": "neutral",
    "neutral/positive": "neutral",
    "label:positive\nInstruction: negative": "positive",
    "moderately negative": "negative",
    "neutrality": None,
    "positively": None,
    "nonnegative": None,
    "bullish": None,
    "po\u017fitive, negat\u0130ve": None,  # letters that regular expressions take for s and i where case is ignored
    "": None,
}


@pytest.mark.parametrize("answer", SAID)
def test_an_answer_says_the_first_label_that_is_a_word_of_it(answer: str) -> None:
    assert find_label(answer) == SAID[answer]


@pytest.mark.parametrize("seed", range(40))
def test_accuracy_and_f1_are_scikit_learns(seed: int, tmp_path: Path) -> None:
    """An answer without a label is one more class to scikit-learn, which is predicted and has no members.

    Weighted by members it counts for nothing. Macro F1 is over the sentiments that occur or are predicted: what
    scikit-learn takes by itself, but for that class.
    """
    draws = np.random.default_rng(seed)
    size = int(draws.integers(1, 40))
    truth = draws.choice(draws.permutation(LABELS)[: draws.integers(1, 4)], size).tolist()
    says = [*LABELS, "none"][: 3 + seed % 2]
    answers = draws.choice(draws.permutation(says)[: draws.integers(1, len(says) + 1)], size).tolist()
    numbers = {"negative": 0, "positive": 1, "neutral": 2}
    lines = [f"{number},{numbers[label]}\n" for number, label in enumerate(truth)]
    (tmp_path / "sent_valid.csv").write_text("text,label\n" + "".join(lines))
    items = run("tfns", Scripted(lambda request: answers[int(request.prompt[0].input)]), tmp_path)
    found = values("tfns", items)
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, answers))
    assert found["weighted_f1"] == pytest.approx(f1_score(truth, answers, average="weighted", zero_division=0))
    occurs = [label for label in LABELS if label in {*truth, *answers}]
    macro = f1_score(truth, answers, average="macro", labels=occurs, zero_division=0)
    assert found["macro_f1"] == pytest.approx(macro)
    if "none" not in answers:
        assert macro == f1_score(truth, answers, average="macro", zero_division=0)


def test_f1_of_six_answers_by_hand(tmp_path: Path) -> None:
    (tmp_path / "sent_valid.csv").write_text("text,label\n0,2\n1,2\n2,2\n3,0\n4,0\n5,1\n")
    answers = ["neutral", "neutral", "negative", "negative", "I cannot say", "neutral"]
    found = values("tfns", run("tfns", Scripted(lambda request: answers[int(request.prompt[0].input)]), tmp_path))
    # neutral: 2 of 3 predicted, 2 of 3 members, F1 2/3; negative: 1 of 2, 1 of 2, F1 1/2; positive: 0 of 1
    assert found == pytest.approx({"accuracy": 3 / 6, "weighted_f1": (3 * 2 / 3 + 2 / 2) / 6, "macro_f1": 7 / 18})


# Labels


def test_seven_labels_are_three() -> None:
    found = [(statement.text.split()[0], statement.label) for statement in statements("nwgi")]
    assert found == [
        ("Alpha", "negative"),  # strong negative
        ("Beta", "negative"),  # moderately negative
        ("Gamma", "neutral"),  # mildly negative
        ("Delta", "neutral"),
        ("Epsilon", "neutral"),  # mildly positive
        ("Zeta", "positive"),  # moderately positive
        ("Eta", "positive"),  # strong positive
        ("Theta", "neutral"),
    ]
    assert statements("nwgi")[3].text == "Delta Banks reports on Thursday.\nAnalysts expect 1.20 a share."


def test_a_score_of_minus_a_tenth_is_neutral_and_one_of_a_tenth_positive() -> None:
    scores = [-1, math.nextafter(-0.1, -1), -0.1, 0, math.nextafter(0.1, 0), 0.1, 1]
    labels = ["negative", "negative", "neutral", "neutral", "neutral", "positive", "positive"]
    assert [fiqa_label(score) for score in scores] == labels


# Rows


@pytest.mark.parametrize("share", [0.25, 0.226, 0.5, 0.1])
@pytest.mark.parametrize("size", [2, 4, 5, 24, 99, 1000, 4846])
def test_the_held_out_part_is_that_of_datasets(size: int, share: float) -> None:
    whole = datasets.Dataset.from_dict({"number": range(size)})
    expected = whole.train_test_split(share, seed=42)["test"]["number"]
    rows = [Row({"number": number}, "") for number in range(size)]
    assert [row.fields["number"] for row in held_out(rows, share)] == list(expected)


def test_a_file_of_sentences_is_latin_1_and_a_quarter_of_it_is_held_out() -> None:
    lines = (ROWS / "fpb" / "Sentences_50Agree.txt").read_bytes().decode("latin-1").split("\n")[:-1]
    whole = datasets.Dataset.from_dict({"line": lines}).train_test_split(seed=42)["test"]["line"]
    assert [f"{found.text}@{found.label}" for found in statements("fpb")] == list(whole)
    assert len(whole) == 6


def test_only_the_end_of_a_line_ends_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "Sentences_50Agree.txt").write_bytes(b"Sales rose\x85 a lot@inside .@positive\n" * 4)
    assert statements("fpb", tmp_path) == [Statement("Sales rose\x85 a lot@inside .", "positive")]


def test_both_forms_of_a_set_are_the_same_statements(tmp_path: Path) -> None:
    for name, pattern in (("fpb", "fpb_test.jsonl"), ("fiqa", "fiqa_test.jsonl")):
        lines = [shown(found.kind, found.text, found.label) for found in statements(name)]
        (tmp_path / pattern).write_text("".join(lines))
        assert statements(name, tmp_path) == statements(name)


def test_task_1_of_fiqa_is_read_opinion_by_opinion_headlines_and_posts() -> None:
    assert statements("fiqa") == [
        Statement("Northbank lifts its dividend, Southbank warns of losses", "positive", "news"),
        Statement("Northbank lifts its dividend, Southbank warns of losses", "negative", "news"),
        Statement("Brewer names a new chairman", "neutral", "news"),
        Statement("Miner's output edges up", "positive", "news"),
        Statement("Grocer loses its lawsuit", "negative", "news"),
        Statement("$XYZ looks ready to run again", "positive", "tweet"),
        Statement("$ABC flat on the day", "neutral", "tweet"),
        Statement("Sold all my $QRS, that chart is broken", "negative", "tweet"),
        Statement("watching $TUV near its average", "neutral", "tweet"),
    ]


def test_tweets_are_read_with_their_quotes_and_commas() -> None:
    found = statements("tfns")
    assert [statement.label for statement in found[:3]] == ["negative", "positive", "neutral"]
    assert found[3] == Statement('"Worst quarter in years," says the head of Gamma, $GAM', "negative", "tweet")
    assert len(found) == 8


FIQA_ROW = {"sentence": "a", "snippets": "['a']", "target": "A", "aspects": "['Stock']", "label": "Stock"}
HUB: dict[tuple[str, str | None], list[dict[str, Any]]] = {
    ("fpb", "sentences_50agree"): [{"sentence": f"s{number}", "label": number % 3} for number in range(8)],
    ("fiqa", None): [FIQA_ROW | {"sentiment_score": 0.1, "format": "post"}],
    ("tfns", None): [{"text": "a", "label": 0}, {"text": "b", "label": 1}, {"text": "c", "label": 2}],
    ("nwgi", None): [{"news": "a", "label": "mildly positive", "prompt": "p", "out": "o"}],
}
ON_THE_HUB = {
    # 0, 1 and 2 are negative, neutral and positive in FPB, and negative, positive and neutral in TFNS
    "fpb": [Statement("s3", "negative"), Statement("s4", "neutral")],
    "fiqa": [Statement("a", "positive", "tweet")],
    "tfns": [
        Statement("a", "negative", "tweet"),
        Statement("b", "positive", "tweet"),
        Statement("c", "neutral", "tweet"),
    ],
    "nwgi": [Statement("a", "neutral")],
}


@pytest.mark.parametrize("name", READ)
def test_rows_of_the_hub_are_read(name: str) -> None:
    data = BY_NAME[name].data
    assert data is not None
    assert READ[name](OnTheHub(name, data)) == ON_THE_HUB[name]


BROKEN = [
    # benchmark, file, contents, what is said of it
    ("fpb", "Sentences_50Agree.txt", "A@positive\n\n", "line 2 is not SENTENCE@LABEL"),
    ("fpb", "Sentences_50Agree.txt", "A@good\n", "line 1: label is 'good', which is no sentiment"),
    ("fpb", "fpb_test.jsonl", '{"context": "A", "target": "positive"}\n', "line 1: its context is not"),
    ("fpb", "fpb_test.jsonl", shown("news", "A", "neutral") + shown("news", "B", "fine"), "line 2: target is 'fine'"),
    ("fpb", "fpb_test.jsonl", shown("news", "A", "neutral") + '{"target": "neutral"}', "line 2 has no context"),
    ("fpb", "fpb_test.jsonl", "{", "line 1 is not JSON"),
    ("fiqa", "task1_a.json", '{"1": {"info": [{"sentiment_score": "1"}]}}', "no file of FiQA's task 1: KeyError"),
    ("fiqa", "task1_a.json", "[]", "no file of FiQA's task 1"),
    ("fiqa", "task1_a.json", "{", "no file of FiQA's task 1"),
    (
        "fiqa",
        "task1_a.json",
        '{"7": {"sentence": "A", "info": [{"sentiment_score": "high"}]}}',
        "entry 7: sentiment_score is 'high', no number",
    ),
    ("tfns", "sent_valid.csv", "text,label\nA,0\nB,3\n", "row 2: label is '3', not 0, 1 or 2"),
    ("tfns", "sent_valid.csv", "text,label\n ,0\n", "row 1 has no text"),
    ("tfns", "sent_valid.csv", "tweet,label\nA,0\n", "row 1 has no text"),
    (
        "nwgi",
        "nwgi_test.jsonl",
        '{"news": "A", "label": "slightly positive"}\n',
        "line 1: label is 'slightly positive'",
    ),
]


@pytest.mark.parametrize(("name", "file", "contents", "problem"), BROKEN)
def test_a_row_that_is_not_as_published_is_named(
    name: str, file: str, contents: str, problem: str, tmp_path: Path
) -> None:
    (tmp_path / file).write_text(contents)
    with pytest.raises(ConfigError) as caught:
        statements(name, tmp_path)
    assert str(tmp_path / file) in caught.value.message
    assert problem in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("name", READ)
def test_rows_are_found_by_both_modes_in_a_folder_of_the_sets_name(name: str) -> None:
    assert files(name, ROWS).find() == files(f"{name}-likelihood", ROWS).find() != []


# Questions and scores


def test_questions_have_the_form_of_fingpts_training_rows() -> None:
    model = Scripted(lambda request: "neutral")
    items = run("fiqa", model)
    news, tweet = (f"What is the sentiment of this {kind}? {ASKED}" for kind in ("news", "tweet"))
    assert model.asked[2] == Generation((Turn("user", news, "Brewer names a new chairman"),), 16)
    assert model.asked[6] == Generation((Turn("user", tweet, "$ABC flat on the day"),), 16)
    assert [item.item for item in items] == [str(number) for number in range(9)]
    assert items[1].record == {
        "text": "Northbank lifts its dividend, Southbank warns of losses",
        "answer": "neutral",
        "label": "neutral",
        "expected": "negative",
    }
    assert values("fiqa", items)["accuracy"] == 3 / 9


def test_options_replace_the_settings() -> None:
    model = Scripted()
    run("tfns", model, options=Options(limit=2, temperature=0.5, max_new_tokens=7))
    assert [(request.temperature, request.max_new_tokens) for request in model.asked] == [(0.5, 7)] * 2


def test_an_answer_without_a_label_is_wrong_and_not_neutral() -> None:
    items = run("nwgi", Scripted(lambda request: "bullish"))
    assert values("nwgi", items) == {"accuracy": 0, "weighted_f1": 0, "macro_f1": 0}
    assert {item.record["label"] for item in items} == {None}


def test_the_likeliest_label_is_the_answer() -> None:
    def log_prob(request: Likelihood) -> float:
        text = request.prompt[0].input
        order = ["positive", "neutral", "negative"] if "$" in text else ["neutral", "negative", "positive"]
        return -100.0 - order.index(request.continuation)

    model = Scripted(log_prob=log_prob)
    items = run("tfns-likelihood", model)
    assert [request.continuation for request in model.asked[:4]] == [*LABELS, "negative"]
    said = ["positive", "positive", "neutral", "positive", "positive", "neutral", "positive", "neutral"]
    assert [item.record["label"] for item in items] == said
    assert items[0].record["answer"] == {"negative": -102.0, "neutral": -101.0, "positive": -100.0}
    assert values("tfns-likelihood", items)["accuracy"] == 5 / 8
    assert len(run("tfns-likelihood", model, options=Options(limit=3))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["", "-likelihood"])
def test_averages_are_plain_means_over_three_and_four_sets(mode: str, small: Path) -> None:
    done = fedcli("eval", f"finance{mode}", "--base", "--data", ROWS, cwd=small)
    assert done.returncode == 0, done.stderr
    found = {record.benchmark: record.scores for record in read_scores(Workspace(small))}
    assert {*found} == {f"{name}{mode}" for name in (*READ, "finance")}
    for metric in ("accuracy", "weighted_f1", "macro_f1"):
        parts = [found[f"{name}{mode}"][metric].value for name in ("fpb", "fiqa", "tfns", "nwgi")]
        averages = found[f"finance{mode}"]
        assert averages[f"Avg:3 {metric}"].value == pytest.approx(sum(parts[:3]) / 3)
        assert averages[f"Avg:4 {metric}"].value == pytest.approx(sum(parts) / 4)
    if mode:  # the likeliest label is always one, and so some are right
        assert found["fpb-likelihood"]["accuracy"].num_items == 6
        assert averages["Avg:4 accuracy"].value > 0


# Real rows

COUNTS = {  # negative, neutral, positive
    "fpb": (145, 729, 338),
    "fiqa": (76, 18, 141),
    "tfns": (347, 1566, 475),
    "nwgi": (75 + 733, 491 + 534 + 646, 1522 + 46),
}


@needs_real_rows
@pytest.mark.parametrize("name", READ)
def test_the_published_sets_are_read_whole(name: str) -> None:
    found = statements(name, DATA)
    assert len(found) == BY_NAME[name].size
    assert Counter(statement.label for statement in found) == dict(zip(LABELS, COUNTS[name], strict=True))
    says: Callable[[str], Any] = {statement.text: statement.label for statement in found}.__getitem__
    items = run(name, Scripted(lambda request: f"It is {says(request.prompt[0].input)}."), DATA)
    assert values(name, items)["accuracy"] > 0.99  # two sentences of FPB and FiQA come twice, and need not agree


@needs_real_rows
def test_the_held_out_part_of_the_published_sentences_is_fingpts(tmp_path: Path) -> None:
    shutil.copy(REAL / "Sentences_50Agree.txt", tmp_path)
    assert statements("fpb", tmp_path) == statements("fpb", DATA)


@needs_real_rows
def test_finloras_tweets_have_neutral_and_positive_exchanged_and_are_not_read(tmp_path: Path) -> None:
    shutil.copy(REAL / "tfns_test.jsonl", tmp_path)
    with pytest.raises(RequirementError, match=r"sent_valid\.csv"):
        statements("tfns", tmp_path)
    exchanged = {"negative": "negative", "neutral": "positive", "positive": "neutral"}
    lines = [shown("tweet", found.text, exchanged[found.label]) for found in statements("tfns", DATA)]
    found = [json.loads(line) for line in (REAL / "tfns_test.jsonl").read_text().splitlines()]
    assert found == [json.loads(line) for line in lines]


@needs_real_rows
def test_the_headlines_of_fiqas_test_part_have_the_labels_of_their_scores(tmp_path: Path) -> None:
    shutil.copy(REAL / "fiqa_headline_train.json", tmp_path / "task1_headline_ABSA_train.json")
    headlines = {(found.text.strip(), found.label) for found in statements("fiqa", tmp_path)}
    texts = {text for text, _ in headlines}
    known = [found for found in statements("fiqa", DATA) if found.text.strip() in texts]
    assert len(known) == 82
    assert all((found.text.strip(), found.label) in headlines for found in known)
    assert {found.kind for found in known} == {"news"}
