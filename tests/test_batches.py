"""Cutting batches into micro-batches: against all ways to cut."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcli.training.batches import cut


@dataclass(frozen=True)
class Row:
    length: int


def all_cuts(rows: list[Row]) -> Iterator[list[list[Row]]]:
    """Yield every way to cut a list into parts."""
    if not rows:
        yield []
    for end in range(1, len(rows) + 1):
        for rest in all_cuts(rows[end:]):
            yield [rows[:end], *rest]


def cost(parts: list[list[Row]], overhead: int) -> int:
    return sum(len(part) * max(row.length for row in part) + overhead for part in parts)


def is_within(parts: list[list[Row]], largest: int) -> bool:
    return all(len(part) == 1 or len(part) * max(row.length for row in part) <= largest for part in parts)


lengths = st.lists(st.integers(1, 60), min_size=1, max_size=9)


@given(lengths=lengths, overhead=st.integers(0, 80), largest=st.integers(1, 400))
def test_no_other_cut_of_the_sorted_rows_is_cheaper(lengths: list[int], overhead: int, largest: int) -> None:
    rows = [Row(length) for length in lengths]
    parts = cut(rows, size=None, overhead=overhead, largest=largest)
    in_order = sorted(rows, key=lambda row: row.length)
    assert [row for part in parts for row in part] == in_order
    assert is_within(parts, largest)
    allowed = [other for other in all_cuts(in_order) if is_within(other, largest)]
    assert cost(parts, overhead) == min(cost(other, overhead) for other in allowed)


def test_rows_of_like_length_stay_together_and_long_ones_apart() -> None:
    rows = [Row(length) for length in (500, 10, 480, 12, 11)]
    parts = cut(rows, size=None, overhead=64, largest=8192)
    assert [[row.length for row in part] for part in parts] == [[10, 11, 12], [480, 500]]


@pytest.mark.parametrize(("size", "expected"), [(2, [[1, 2], [3, 9]]), (4, [[1, 2, 3, 9]]), (1, [[1], [2], [3], [9]])])
def test_a_given_size_holds_whatever_it_costs(size: int, expected: list[list[int]]) -> None:
    parts = cut([Row(length) for length in (9, 1, 3, 2)], size=size, overhead=10**9, largest=1)
    assert [[row.length for row in part] for part in parts] == expected
