"""Which benchmarks have items that are not independent, and what of them is resampled together."""

import json
from itertools import groupby
from pathlib import Path

import pytest
from support.scripted import ROWS, Scripted, session

from fedcli.eval.benchmark import ItemScore
from fedcli.eval.registry import BENCHMARKS


def together(items: list[ItemScore]) -> list[list[str]]:
    """Return the items of each cluster of more than one."""
    known = sorted((item for item in items if item.cluster is not None), key=lambda item: str(item.cluster))
    groups = [sorted(item.item for item in group) for _, group in groupby(known, key=lambda item: item.cluster)]
    return sorted(group for group in groups if len(group) > 1)


TURNS = [[f"{question}-1", f"{question}-2"] for question in (111, 121, 151, 81)]
EXPECTED = {
    "mt-bench": TURNS,
    "mt-bench-pairwise": TURNS,
    "drop": [["drop/0", "drop/1"], ["drop/2", "drop/3"]],  # the questions about a passage
    "conala": [["502/1", "502/2"]],  # an intent in other words
    "fiqa": [["0", "1"]],  # the opinions in one sentence
    "tfns": [],
    "hhh": [],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_items_that_share_what_is_asked_about_are_one_cluster(name: str) -> None:
    benchmark = BENCHMARKS[name]
    assert benchmark.run is not None
    assert together(benchmark.run(session(benchmark, Scripted()))) == EXPECTED[name]


def test_the_variations_of_a_problem_of_ds1000_are_one_cluster(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (ROWS / "ds1000/ds1000.jsonl").read_text().splitlines()]
    varied = [row | {"metadata": row["metadata"] | {"problem_id": 90 + number}} for number, row in enumerate(rows[:2])]
    (tmp_path / "ds1000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + varied))
    benchmark = BENCHMARKS["ds1000"]
    items = benchmark.run(session(benchmark, Scripted(), tmp_path))
    assert together(items) == [["Numpy/1", "Numpy/91"], ["Pandas/0", "Pandas/90"]]
