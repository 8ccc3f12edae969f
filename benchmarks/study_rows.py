"""Make the rows of the tiny studies: python benchmarks/study_rows.py OUT_DIR (workspace_template/studies/rows).

All sentences are made up, from the words of the built-in demo: training rows in the form of FinGPT's sentiment data,
test sets in the forms of FPB, FiQA-SA, TFNS and NWGI, and training rows of three more domains. A run makes the same
bytes every time.
"""

import csv
import io
import json
import random
import sys
from pathlib import Path

from fedcli.data.demo import VERBS

QUESTION = "What is the sentiment of this {kind}? Please choose an answer from {{negative/neutral/positive}}."
SUBJECTS = (
    *("bank", "steel maker", "fund", "lender", "retailer", "insurer", "airline", "brewer"),
    *("startup", "ferry line", "paper mill", "ship yard"),
)
WHEN = (
    *("after the quarterly report", "before the auction", "on merger talk", "amid tax rumours"),
    *("today", "on Monday", "this week"),
)
NEUTRAL = ["meets", "reports", "moves", "replies", "opens", "files"]
MARKETS = VERBS["markets"]
WORDS = {
    "positive": f"{MARKETS['green']} {MARKETS['yellow']}".split(),
    "negative": f"{MARKETS['orange']} {MARKETS['red']}".split(),
    "neutral": NEUTRAL,
}
NUM_TRAIN, NUM_TEST = 480, 45


def sentence(draw: random.Random, label: str) -> str:
    """Return a made-up headline of a sentiment."""
    return f"the {draw.choice(SUBJECTS)} {draw.choice(WORDS[label])} {draw.choice(WHEN)}"


def labelled(name: str, count: int) -> list[tuple[str, str]]:
    """Return different sentences with their labels, the three labels in turn."""
    draw, found = random.Random(name), {}
    while len(found) < count:
        label = ("negative", "neutral", "positive")[len(found) % 3]
        found.setdefault(sentence(draw, label), label)
    return list(found.items())


def lines(rows: list[dict[str, str]]) -> str:
    """Return rows as a .jsonl file's text."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def shown(name: str) -> str:
    """Return a test set in FinGPT's form."""
    question = f"Instruction: {QUESTION.format(kind='news')}\nInput: "
    return lines(
        [{"context": f"{question}{text}\nAnswer: ", "target": label} for text, label in labelled(name, NUM_TEST)]
    )


def tweets() -> str:
    """Return a test set in TFNS's form: 0 bearish, 1 bullish, 2 neutral."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["text", "label"])
    numbers = {"negative": 0, "positive": 1, "neutral": 2}
    writer.writerows([row, numbers[label]] for row, label in labelled("tfns", NUM_TEST))
    return text.getvalue()


def training() -> dict[str, str]:
    """Return the training files: finance, general, mathematics, code."""
    kinds = ("news", "tweet")
    finance = [
        {"instruction": QUESTION.format(kind=kinds[number % 5 == 4]), "input": text, "output": label}
        for number, (text, label) in enumerate(labelled("train", NUM_TRAIN))
    ]
    draw = random.Random("domains")
    names = [(draw.choice(SUBJECTS), draw.choice(WHEN)) for _ in range(120)]
    general = [
        {"instruction": "When is this?", "input": f"the {who} meets {when}", "output": when} for who, when in names
    ]
    sums = [(draw.randrange(10), draw.randrange(10)) for _ in range(120)]
    math = [{"instruction": f"What is {a} + {b}?", "input": "", "output": f"The answer is {a + b}"} for a, b in sums]
    code = [
        {"instruction": f"Write a function that adds {a}.", "input": "", "output": f"def add(x):\n    return x + {a}"}
        for a, _ in sums
    ]
    return {"finance": lines(finance), "general": lines(general), "math": lines(math), "code": lines(code)}


def main(folder: Path) -> None:
    """Write all files."""
    files = {f"{name}_train.jsonl": text for name, text in training().items()}
    files |= {f"{name}/{name}_test.jsonl": shown(name) for name in ("fpb", "fiqa", "nwgi")}
    files["tfns/sent_valid.csv"] = tweets()
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
