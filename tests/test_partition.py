"""Splits among simulated clients: every kind of partition, on rows whose right split is known."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedcli.config import Partition, parse_config
from fedcli.data.file_rows import Row
from fedcli.data.partition import UNUSED, Split, Survey, split
from fedcli.errors import ConfigError
from fedcli.tasks.conversation import instruct


def choice(value: Any) -> Partition:
    """Read a partition as fedcli.yaml would give it."""
    return parse_config({"data": {"partition": value}}, Path("fedcli.yaml")).data.partition


def surveyed(rows: Sequence[dict[str, Any]], partition: Any, num_clients: int, seed: int = 0) -> Survey:
    survey = Survey(choice(partition), num_clients, seed)
    for number, fields in enumerate(rows, 1):
        text = str(fields.get("text", f"row {number}"))
        survey.add(Row(fields, f"rows.jsonl, line {number}"), instruct(text, "yes"), int(fields.get("source", 0)))
    return survey


def members(made: Split, client: int) -> list[int]:
    return [int(index) for index in np.flatnonzero(made.clients == client)]


LABELS = [{"label": "abc"[number % 3], "user": f"u{number % 7}"} for number in range(300)]


@pytest.mark.parametrize(
    "partition",
    ["iid", {"sizes": {"power": 1.0}}, {"dirichlet": {"by": "label", "alpha": 0.5}}, {"shards_by": "label"}, "sources"],
    ids=str,
)
def test_every_row_has_exactly_one_client_and_the_seed_decides_which(partition: Any) -> None:
    made = split(surveyed(LABELS, partition, 4))
    assert sum(made.sizes()) == len(LABELS)
    assert sorted(index for client in range(4) for index in members(made, client)) == list(range(len(LABELS)))
    again = split(surveyed(LABELS, partition, 4))
    assert (made.clients == again.clients).all()
    other = split(surveyed(LABELS, partition, 4, seed=1))
    assert (made.clients != other.clients).any()


@pytest.mark.parametrize(("count", "clients"), [(10, 3), (31, 4), (7, 7), (1000, 64)])
def test_iid_shares_are_equal_to_within_a_row(count: int, clients: int) -> None:
    sizes = split(surveyed([{}] * count, "iid", clients)).sizes()
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1


def test_sizes_follow_the_power_law() -> None:
    made = split(surveyed([{}] * 1000, {"sizes": {"power": 1.0}}, 4))
    total = 1 + 1 / 2 + 1 / 3 + 1 / 4
    expected = [1000 / total / (client + 1) for client in range(4)]
    assert np.abs(np.array(made.sizes()) - expected).max() <= 1
    assert split(surveyed([{}] * 1000, {"sizes": {"power": 0}}, 4)).sizes() == [250] * 4


def test_each_value_of_a_column_is_a_client_numbers_in_their_own_order() -> None:
    rows = [{"user": user} for user in [10, 9, 2, 10, 9, 10]]
    made = split(surveyed(rows, {"by": "user"}, 3))
    assert [members(made, client) for client in range(3)] == [[2], [1, 4], [0, 3, 5]]
    assert made.group_names == ["2", "9", "10"]


def test_values_with_too_few_rows_are_no_clients_and_the_error_gives_the_number_that_fits() -> None:
    rows = [{"user": user} for user in "aaabbbc"]
    made = split(surveyed(rows, {"by": "user"}, 2), min_rows=2)
    assert [members(made, client) for client in range(2)] == [[0, 1, 2], [3, 4, 5]]
    assert made.clients[6] == UNUSED
    with pytest.raises(
        ConfigError, match=r"column 'user' has 3 values, 2 of them with at least .* \(2\) rows"
    ) as caught:
        split(surveyed(rows, {"by": "user"}, 3), min_rows=2)
    assert caught.value.hint.startswith("Set federation.clients to 2")


def test_the_values_that_no_client_is_made_of_are_said_once_with_an_example() -> None:
    rows = [{"user": user} for user in "aaaabbbcccddef"]
    with pytest.raises(ConfigError, match=r"6 values, 4 of them") as caught:
        split(surveyed(rows, {"by": "user"}, 2), min_rows=2)
    assert (
        caught.value.hint == "Set federation.clients to 4: each value is a client, or data.partition.keep to largest."
    )
    made = split(surveyed(rows, {"by": "user", "keep": "largest"}, 2), min_rows=2)
    assert [members(made, client) for client in range(2)] == [[0, 1, 2, 3], [4, 5, 6]]
    assert made.remarks == (
        "user: 2 of 6 values, with fewer than data.min_rows (2) rows, are left out with their 2 rows; "
        "first, 'e' with 1",
        "user: 2 of 6 values, that are not the 2 with most rows, are left out with their 5 rows; first, 'c' with 3",
    )
    assert split(surveyed(rows, {"by": "user"}, 6)).remarks == ()
    with pytest.raises(ConfigError, match=r"federation\.clients is 7") as caught:
        split(surveyed(rows, {"by": "user", "keep": "largest"}, 7))
    assert caught.value.hint == "Set federation.clients to 6: each value is a client."


@pytest.mark.parametrize("value", [None, "", "  ", ["a"], float("nan")], ids=repr)
def test_a_value_that_names_nobody_makes_no_client(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^rows\.jsonl, line 2: column 'user' is .*, which names no client$"):
        surveyed([{"user": "a"}, {"user": value}], {"by": "user"}, 2)


def test_a_row_without_the_column_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^rows\.jsonl, line 2 has no column 'user'; it has label$"):
        surveyed([{"user": "a"}, {"label": "x"}], {"by": "user"}, 2)


def test_small_alpha_gives_skewed_clients_and_large_alpha_even_ones() -> None:
    rows = [{"label": "abc"[number % 3]} for number in range(3000)]
    skew = {}
    for alpha in (0.1, 1000.0):
        made = split(surveyed(rows, {"dirichlet": {"by": "label", "alpha": alpha}}, 5))
        counts = np.array([made.group_counts(client) for client in range(5)])
        assert counts.sum(axis=0).tolist() == [1000] * 3
        skew[alpha] = (counts.max(axis=1) / counts.sum(axis=1)).mean()
    assert skew[0.1] > 0.7
    assert abs(skew[1000.0] - 1 / 3) < 0.03


def test_dirichlet_shares_have_the_mean_and_variance_of_the_distribution() -> None:
    # A share of Dirichlet(alpha, ..., alpha) over K clients: mean 1/K, variance (K - 1) / (K^2 (K alpha + 1)).
    rows = [{"label": str(number % 300)} for number in range(60_000)]
    made = split(surveyed(rows, {"dirichlet": {"by": "label", "alpha": 0.5}}, 4))
    shares = np.array([made.group_counts(client) for client in range(4)]) / 200
    assert np.abs(shares.mean(axis=1) - 0.25).max() < 0.06
    assert abs(shares.var() - 3 / (16 * 3)) < 0.01


def test_dirichlet_is_drawn_again_until_every_client_has_enough() -> None:
    partition = {"dirichlet": {"by": "label", "alpha": 0.1}}
    assert min(split(surveyed(LABELS, partition, 5)).sizes()) < 20
    assert min(split(surveyed(LABELS, partition, 5), min_rows=20).sizes()) >= 20


def test_what_no_draw_can_give_is_a_clear_error() -> None:
    rows = [{"label": "one"}] * 100
    with pytest.raises(ConfigError, match="none of 1000 draws") as caught:
        split(surveyed(rows, {"dirichlet": {"by": "label", "alpha": 0.001}}, 10), min_rows=9)
    assert "alpha" in caught.value.hint


@pytest.mark.parametrize("partition", ["iid", {"sizes": {"power": 2.0}}, {"shards_by": "label"}], ids=str)
def test_too_few_rows_for_min_rows_is_an_error_before_anything_is_split(partition: Any) -> None:
    with pytest.raises(ConfigError, match=r"^300 rows cannot be split among 4 clients with at least 76 each$"):
        split(surveyed(LABELS, partition, 4), min_rows=76)


def test_a_client_of_the_power_law_below_min_rows_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^client 1 would get 53 rows, fewer than data\.min_rows \(60\)"):
        split(surveyed(LABELS, {"sizes": {"power": 2.0}}, 4), min_rows=60)


def test_length_classes_are_tenths_of_the_rows_from_short_to_long() -> None:
    rows = [{"text": "x" * number} for number in range(1, 201)]
    made = split(surveyed(rows, {"dirichlet": {"by": "length", "alpha": 0.3}}, 3))
    assert made.groups is not None
    assert Counter(made.groups.tolist()) == dict.fromkeys(range(10), 20)
    assert (np.diff(made.groups) >= 0).all()


def test_topics_of_unlabelled_text_are_found() -> None:
    sports = [
        "the striker scores a goal in the match",
        "a goal wins the match for the team",
        "the team loses the match",
    ]
    cooking = ["bake the bread with flour", "stir the soup with salt", "flour and salt make bread"]
    texts = [{"text": f"{(sports if number % 2 else cooking)[number % 3]} number{number}"} for number in range(120)]
    made = split(surveyed(texts, {"dirichlet": {"by": "topic", "alpha": 0.2, "topics": 2}}, 2))
    assert made.groups is not None
    found = {tuple(sorted(set(made.groups[start::2].tolist()))) for start in (0, 1)}
    assert found == {(0,), (1,)}
    assert all(name.startswith("topic ") for name in made.group_names)
    assert any("match" in name for name in made.group_names)


@pytest.mark.parametrize(
    ("texts", "problem"), [(["...", "!!!"] * 10, "no words"), (["one word", "two words"], "5 topics of 2 rows")]
)
def test_texts_that_have_no_topics_are_an_error(texts: list[str], problem: str) -> None:
    partition = {"dirichlet": {"by": "topic", "alpha": 1.0, "topics": 5}}
    with pytest.raises(ConfigError, match=problem):
        split(surveyed([{"text": text} for text in texts], partition, 2))


def test_every_source_has_clients_of_its_own() -> None:
    rows = [{"source": number // 10} for number in range(30)]
    made = split(surveyed(rows, "sources", 6))
    assert [sorted({index // 10 for index in members(made, client)}) for client in range(6)] == [
        [0],
        [0],
        [1],
        [1],
        [2],
        [2],
    ]
    with pytest.raises(ConfigError, match="4 clients cannot be shared out equally among 3 sources"):
        split(surveyed(rows, "sources", 4))


def test_limits_take_that_many_rows_at_random_of_all_and_of_each_source() -> None:
    rows = [{"source": number // 50} for number in range(100)]
    made = split(surveyed(rows, "sources", 2), source_limits=[5, None])
    assert made.sizes() == [5, 50]
    assert members(made, 0) != list(range(5))
    assert sum(split(surveyed(rows, "iid", 3), max_rows=10).sizes()) == 10
    assert sum(split(surveyed(rows, "iid", 3), max_rows=1000).sizes()) == 100
    with pytest.raises(ConfigError, match=r"^2 rows cannot be split among 3 clients"):
        split(surveyed(rows, "iid", 3), max_rows=2)


@given(
    num_rows=st.integers(1, 80),
    clients=st.integers(1, 9),
    alpha=st.floats(0.05, 50),
    min_rows=st.integers(1, 4),
    labels=st.integers(1, 5),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_a_split_keeps_min_rows_or_is_refused(
    num_rows: int, clients: int, alpha: float, min_rows: int, labels: int
) -> None:
    rows = [{"label": str(number % labels)} for number in range(num_rows)]
    survey = surveyed(rows, {"dirichlet": {"by": "label", "alpha": alpha}}, clients)
    try:
        made = split(survey, min_rows=min_rows)
    except ConfigError:
        return
    assert min(made.sizes()) >= min_rows
    assert sum(made.sizes()) == num_rows
    assert json.dumps([made.group_counts(client) for client in range(clients)])
