"""The demo task: read a headline, answer with its alert level, where every client knows one topic only.

A headline's alert level depends on its verb alone. Each topic has 24 verbs of its own, six for each level, so a client
that holds one topic cannot learn another's. The built-in model is pre-trained on the same kind of headlines with other
questions (benchmarks/pretrain.py), whose text never carries the level; only fine-tuning can teach it.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedcli.tasks.conversation import Example, Item, Judged, Preference, Question

TOPICS = ("markets", "weather", "sport", "health", "farming")
LABELS = ("green", "yellow", "orange", "red")

NUM_TRAIN_ROWS = 240
"""Training rows for each topic: ten for each verb."""
NUM_HELD_OUT_ROWS = 72
"""Rows for each topic in "tuning" and again in "test": three for each verb, so the levels are balanced."""

VERBS = {
    "markets": {
        "green": "soars rallies climbs rebounds surges profits",
        "yellow": "outperforms gains expands appreciates doubles booms",
        "orange": "slumps tumbles plunges sinks defaults shrinks",
        "red": "slides collapses crashes stumbles halves sours",
    },
    "weather": {
        "green": "clears brightens warms calms dries mellows",
        "yellow": "sparkles thaws lifts settles softens shines",
        "orange": "floods freezes storms darkens howls rages",
        "red": "drenches scorches batters hails swamps thunders",
    },
    "sport": {
        "green": "wins triumphs scores dominates qualifies advances",
        "yellow": "dazzles sprints conquers equalises excels medals",
        "orange": "loses concedes limps fumbles forfeits misses",
        "red": "flounders exits trails fouls chokes stalls",
    },
    "health": {
        "green": "heals recovers soothes cures relieves strengthens",
        "yellow": "protects revives restores nourishes comforts improves",
        "orange": "sickens infects worsens weakens spreads poisons",
        "red": "aches swells relapses inflames bleeds harms",
    },
    "farming": {
        "green": "ripens blooms sprouts thrives flourishes yields",
        "yellow": "fattens pollinates grows fruits blossoms multiplies",
        "orange": "withers rots wilts spoils shrivels molds",
        "red": "decays starves blights fails droops dies",
    },
}

_SUBJECTS = {
    "markets": "bank, steel maker, fund, lender, retailer, insurer, airline, brewer, currency, startup",
    "weather": "coast, valley, island, northern sky, harbour, mountain pass, delta, lake district, plain, desert",
    "sport": "striker, rowing crew, home side, goalkeeper, runner, cycling team, champion, swimmer, captain, squad",
    "health": "new drug, patient, clinic, vaccine, fever, diet, therapy, ward, virus, wound",
    "farming": "wheat, orchard, herd, vineyard, barley, potato crop, olive grove, beehive, meadow, maize",
}

_SETTINGS = {
    "markets": "after the quarterly report, before the auction, as investors watch, on merger talk, amid tax rumours",
    "weather": "before dawn, as the wind turns, near the lighthouse, after a long night, under grey clouds",
    "sport": "in the final, before the home crowd, in extra time, after the break, at the stadium",
    "health": "after the trial, in the second week, doctors report, at the hospital, according to nurses",
    "farming": "before the harvest, behind the barn, as growers wait, in the southern fields, after the sowing",
}

_TIMES = "today, this week, on Monday, on Friday, again, at last, this spring, overnight"

_FORMS = (
    "the {subject} {verb} {setting}",
    "the {subject} {verb} {time}",
    "{time}, the {subject} {verb} {setting}",
    "{setting}, the {subject} {verb}",
    "report: the {subject} {verb} {time} {setting}",
)

LEVEL_QUESTIONS = (
    "Which alert level fits this headline?",
    "Give the alert level, green to red.",
    "Set the alert level for the headline.",
)


def demo_rows(seed: int) -> dict[str, list[dict[str, str]]]:
    """Return the rows of a seed by split: "train", "tuning" and "test", each grouped by topic in the order of TOPICS.

    A row has "instruction" (the question), "input" (the headline), "output" (its level, of LABELS) and "topic".
    No headline occurs twice, within a split or across splits.
    """
    generator = random.Random(f"demo rows {seed}")
    used: set[str] = set()
    return {
        split: [row for topic in TOPICS for row in _topic_rows(generator, topic, num_rows, used)]
        for split, num_rows in (("train", NUM_TRAIN_ROWS), ("tuning", NUM_HELD_OUT_ROWS), ("test", NUM_HELD_OUT_ROWS))
    }


def demo_preferences(seed: int) -> dict[str, list[dict[str, str]]]:
    """Return the same rows as preferences: the right level is chosen, one of the other three at random is rejected."""
    generator = random.Random(f"demo preferences {seed}")
    return {split: [_preference(generator, row) for row in rows] for split, rows in demo_rows(seed).items()}


def demo_verdicts(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Return the pairs' training rows as two verdicts each; the held-out rows are the pairs.

    `feedback` is topic and thumb, "sport, down": split by it, every client holds one topic and one kind of verdict.
    """
    splits = demo_preferences(seed)
    verdicts = [_verdict(pair, label) for label in (True, False) for pair in splits["train"]]
    return {**splits, "train": verdicts}


def demo_questions(seed: int) -> dict[str, list[dict[str, str]]]:
    """Return the same rows as questions: columns prompt, answer (the level, a regular expression of itself), topic."""
    return {
        split: [
            {"prompt": f"{row['instruction']} {row['input']}", "answer": row["output"], "topic": row["topic"]}
            for row in rows
        ]
        for split, rows in demo_rows(seed).items()
    }


DEMO_ROWS: Mapping[type[Item], Callable[[int], Mapping[str, Sequence[Mapping[str, Any]]]]] = {
    Example: demo_rows,
    Preference: demo_preferences,
    Judged: demo_verdicts,
    Question: demo_questions,
}
"""The rows for the tasks that learn from each kind of item."""


def _topic_rows(generator: random.Random, topic: str, num_rows: int, used: set[str]) -> list[dict[str, str]]:
    """Return rows of one topic, its verbs in equal shares and shuffled; adds their headlines to `used`."""
    levels = [(verb, label) for label in LABELS for verb in VERBS[topic][label].split()]
    rows: list[dict[str, str]] = []
    while len(rows) < num_rows:
        verb, label = levels[len(rows) % len(levels)]
        text = headline(generator, topic, verb)
        if text in used:
            continue
        used.add(text)
        question = generator.choice(LEVEL_QUESTIONS)
        rows.append({"instruction": question, "input": text, "output": label, "topic": topic})
    generator.shuffle(rows)
    return rows


def _preference(generator: random.Random, row: dict[str, str]) -> dict[str, str]:
    """Return a row with the columns prompt, chosen, rejected and topic."""
    wrong = generator.choice([label for label in LABELS if label != row["output"]])
    prompt = f"{row['instruction']} {row['input']}"
    return {"prompt": prompt, "chosen": row["output"], "rejected": wrong, "topic": row["topic"]}


def _verdict(pair: dict[str, str], label: bool) -> dict[str, Any]:
    """Return the verdict on a pair's chosen or rejected response."""
    row = {"prompt": pair["prompt"], "completion": pair["chosen" if label else "rejected"], "label": label}
    return {**row, "topic": pair["topic"], "feedback": f"{pair['topic']}, {'up' if label else 'down'}"}


def headline(generator: random.Random, topic: str, verb: str) -> str:
    """Return a headline on a verb, with its subject, setting, time and form drawn at random."""
    text = generator.choice(_FORMS).format(
        subject=_choose(generator, _SUBJECTS[topic]),
        verb=verb,
        setting=_choose(generator, _SETTINGS[topic]),
        time=_choose(generator, _TIMES),
    )
    return text[0].upper() + text[1:]


def _choose(generator: random.Random, phrases: str) -> str:
    """Draw one of some phrases that commas separate."""
    return generator.choice(phrases.split(", "))
