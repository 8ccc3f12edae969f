"""The compact store of encoded rows gives back what was put in."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcli.data.encoded import EncodedExample, EncodedExamples


def random_examples(count: int) -> list[EncodedExample]:
    numbers = np.random.default_rng(count)
    lengths = [0, 1, *numbers.integers(0, 50, count).tolist()][:count]
    return [
        EncodedExample(
            numbers.integers(0, 2**31, length).astype(np.int32), numbers.integers(0, 2, length).astype(np.bool_)
        )
        for length in lengths
    ]


def stored(examples: list[EncodedExample]) -> EncodedExamples:
    store = EncodedExamples()
    for example in examples:
        store.append(example)
    return store


def as_lists(examples: EncodedExamples | list[EncodedExample]) -> list[tuple[list[int], list[bool]]]:
    return [(example.ids.tolist(), example.supervised.tolist()) for example in examples]


@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_a_store_gives_back_what_was_put_in(count: int) -> None:
    examples = random_examples(count)
    store = stored(examples)
    assert (len(store), bool(store)) == (count, count > 0)
    assert as_lists(store) == as_lists(examples)
    assert store.lengths().tolist() == [example.num_tokens for example in examples]
    assert {(found.ids.dtype, found.supervised.dtype) for found in store} <= {(np.dtype("i4"), np.dtype("?"))}


@pytest.mark.parametrize(
    "part", [slice(None), slice(2, 5), slice(-3, None), slice(None, None, -2), slice(5, 2), slice(8, 99)]
)
def test_a_slice_of_a_store_is_the_list_of_its_examples(part: slice) -> None:
    examples = random_examples(10)
    assert as_lists(stored(examples)[part]) == as_lists(examples[part])


@pytest.mark.parametrize(("count", "index"), [(0, 0), (3, 3), (3, 4), (3, -4)])
def test_an_index_outside_a_store_is_an_error(count: int, index: int) -> None:
    with pytest.raises(IndexError):
        stored(random_examples(count))[index]


def test_an_example_that_was_taken_out_is_a_copy() -> None:
    store = stored(random_examples(5))
    before = as_lists(store)
    store[4].ids[:] = 0
    store[4].supervised[:] = False
    assert as_lists(store) == before


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), max_size=5), st.integers(0, 5))
def test_stores_that_are_joined_hold_what_one_would_hold(masks: list[list[bool]], cut: int) -> None:
    examples = [EncodedExample(np.arange(len(mask), dtype=np.int32), np.array(mask)) for mask in masks]
    whole, first, second = EncodedExamples(), EncodedExamples(), EncodedExamples()
    for position, example in enumerate(examples):
        whole.append(example)
        (first if position < cut else second).append(example)
    first.extend(second)
    assert first.lengths().tolist() == whole.lengths().tolist()
    for one, other in zip(first, whole, strict=True):
        assert (one.ids.tolist(), one.supervised.tolist()) == (other.ids.tolist(), other.supervised.tolist())
