"""The compact store of encoded rows gives back what was put in."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcli.data.encoded import EncodedExample, EncodedRow, EncodedRows


def random_rows(count: int, num_sides: int = 1, num_numbers: int = 0) -> list[EncodedRow]:
    numbers = np.random.default_rng(count)
    lengths = [0, 1, *numbers.integers(0, 50, count * num_sides).tolist()][: count * num_sides]
    sides = [
        EncodedExample(
            numbers.integers(0, 2**31, length).astype(np.int32), numbers.integers(0, 2, length).astype(np.bool_)
        )
        for length in lengths
    ]
    return [
        EncodedRow(tuple(sides[start : start + num_sides]), tuple(numbers.normal(size=num_numbers).tolist()))
        for start in range(0, len(sides), num_sides)
    ]


def stored(rows: list[EncodedRow]) -> EncodedRows:
    store = EncodedRows()
    for row in rows:
        store.append(row)
    return store


def as_lists(
    rows: EncodedRows | list[EncodedRow],
) -> list[tuple[list[tuple[list[int], list[bool]]], tuple[float, ...]]]:
    return [([(side.ids.tolist(), side.supervised.tolist()) for side in row.sides], row.numbers) for row in rows]


@pytest.mark.parametrize(("num_sides", "num_numbers"), [(1, 0), (2, 0), (1, 1), (3, 2)])
@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_a_store_gives_back_what_was_put_in(count: int, num_sides: int, num_numbers: int) -> None:
    rows = random_rows(count, num_sides, num_numbers)
    store = stored(rows)
    assert (len(store), bool(store)) == (count, count > 0)
    assert as_lists(store) == as_lists(rows)
    assert store.lengths().tolist() == [max(len(side.ids) for side in row.sides) for row in rows]
    dtypes = {(side.ids.dtype, side.supervised.dtype) for row in store for side in row.sides}
    assert dtypes <= {(np.dtype("i4"), np.dtype("?"))}
    if rows:
        assert as_lists(EncodedRows.of_arrays(store.arrays())) == as_lists(rows)


@pytest.mark.parametrize(
    "part", [slice(None), slice(2, 5), slice(-3, None), slice(None, None, -2), slice(5, 2), slice(8, 99)]
)
def test_a_slice_of_a_store_is_the_list_of_its_rows(part: slice) -> None:
    rows = random_rows(10)
    assert as_lists(stored(rows)[part]) == as_lists(rows[part])


@pytest.mark.parametrize(("count", "index"), [(0, 0), (3, 3), (3, 4), (3, -4)])
def test_an_index_outside_a_store_is_an_error(count: int, index: int) -> None:
    with pytest.raises(IndexError):
        stored(random_rows(count))[index]


def test_a_row_that_was_taken_out_is_a_copy() -> None:
    store = stored(random_rows(5))
    before = as_lists(store)
    store[4].sides[0].ids[:] = 0
    store[4].sides[0].supervised[:] = False
    assert as_lists(store) == before


@given(st.integers(0, 5), st.integers(0, 5), st.integers(1, 3), st.integers(0, 2))
def test_stores_that_are_joined_hold_what_one_would_hold(
    count: int, cut: int, num_sides: int, num_numbers: int
) -> None:
    rows = random_rows(count, num_sides, num_numbers)
    first = stored(rows[:cut])
    first.extend(stored(rows[cut:]))
    assert as_lists(first) == as_lists(rows)
    assert first.lengths().tolist() == stored(rows).lengths().tolist()
