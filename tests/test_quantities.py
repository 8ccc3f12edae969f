"""Bytes and lengths of time, as people read them."""

import pytest

from fedcli.quantities import describe_bytes, describe_seconds, plural


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.82, "0.8 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min"),
        (61, "1 min 1 s"),
        (4800, "1 h 20 min"),
        (7200, "2 h"),
        (180000, "2 d 2 h"),
    ],
)
def test_a_length_of_time_is_told_in_its_two_largest_units(seconds: float, text: str) -> None:
    assert describe_seconds(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (67_200_000, "67.2 MB"),
        (3.5e13, "35.0 TB"),
        (4e15, "4,000.0 TB"),
    ],
)
def test_bytes_are_told_in_the_decimal_unit_that_suits_them(num_bytes: float, text: str) -> None:
    assert describe_bytes(num_bytes) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 updates"), (1, "1 update"), (2, "2 updates")])
def test_what_is_counted_stands_in_the_singular_for_one_alone(count: int, text: str) -> None:
    assert plural(count, "update") == text
