"""Rows from files, their columns, their split among clients, and the order in which a client draws them."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcli.config import ShardsBy
from fedcli.data.demo import LABELS, TOPICS, demo_rows
from fedcli.data.file_rows import Row
from fedcli.data.formats import RowReader
from fedcli.data.order import draw
from fedcli.data.partition import UNUSED, Survey, split
from fedcli.data.source import read_rows, write_row
from fedcli.errors import ConfigError
from fedcli.tasks.conversation import Example, instruct

GOOD = '{"instruction": "a", "output": "b"}'


def written(folder: Path, contents: str | bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return path


def numbered(count: int) -> list[Row]:
    return [Row({"instruction": f"i{number}", "kind": "abc"[number % 3]}, f"row {number}") for number in range(count)]


def read(rows: list[Row]) -> tuple[list[Example], RowReader]:
    """Return what Alpaca rows teach, and the reader that knows what was left out."""
    reader = RowReader("alpaca")
    examples = [item for _, item in reader.read(rows) if isinstance(item, Example)]
    return examples, reader


def partition(
    rows: list[Row], num_clients: int, seed: int, *, shards_by: str | None = None, max_rows: int | None = None
) -> list[list[Row]]:
    """Return each client's rows, in the order in which they stood."""
    survey = Survey("iid" if shards_by is None else ShardsBy(shards_by=shards_by), num_clients, seed)
    for row in rows:
        survey.add(row, instruct("", ""), 0)
    made = split(survey, max_rows=max_rows)
    assert len(made.clients) == len(rows)
    assert set(made.clients.tolist()) <= {UNUSED, *range(num_clients)}
    shares = [[row for row, client in zip(rows, made.clients, strict=True) if client == k] for k in range(num_clients)]
    assert made.sizes() == [len(share) for share in shares]
    return shares


# Reading


@pytest.mark.parametrize(
    ("columns", "instruction"),
    [
        ({"instruction": "Sum:", "input": "1 + 1", "output": "2"}, "Sum: 1 + 1"),
        ({"instruction": "Sum:", "input": "", "output": "2"}, "Sum:"),
        ({"instruction": "Sum:", "input": None, "output": "2"}, "Sum:"),
        ({"instruction": "Sum:", "output": "2"}, "Sum:"),
    ],
)
def test_alpaca_joins_instruction_and_input_with_one_space(columns: dict[str, str], instruction: str) -> None:
    (example,), _ = read([Row(columns, "here")])
    assert example.response == "2"
    assert [(turn.role, turn.text) for turn in example.prompt] == [("user", instruction)]


COLUMN_FAULTS = {
    "a missing column": ('{"instruction": "a"}', "no column 'output'; it has instruction"),
    "an empty object": ("{}", "no column 'instruction'; it has none"),
    "a null": ('{"instruction": "a", "output": null}', "no text in column 'output'"),
    "a number": ('{"instruction": 7, "output": "b"}', "no text in column 'instruction'"),
    "a list as input": ('{"instruction": "a", "input": ["x"], "output": "b"}', "no text in column 'input'"),
}


@pytest.mark.parametrize("fault", COLUMN_FAULTS)
@pytest.mark.parametrize(("name", "place"), [("rows.jsonl", "line 3"), ("rows.json", "row 2")])
def test_a_row_with_faulty_columns_is_left_out_counted_and_named(
    tmp_path: Path, fault: str, name: str, place: str
) -> None:
    row, problem = COLUMN_FAULTS[fault]
    contents = f"{GOOD}\n\n{row}\n{GOOD}\n" if name.endswith("l") else f"[{GOOD}, {row}, {GOOD}]"
    path = written(tmp_path, contents, name)
    examples, reader = read(read_rows(path))
    reader.require_rows(path)
    assert examples == [instruct("a", "b")] * 2
    assert (reader.num_rows, reader.num_usable, reader.left_out) == (3, 2, {"malformed": 1})
    assert reader.first_cases["malformed"].startswith(f"{path}, {place}: {problem}")


@pytest.mark.parametrize("fault", COLUMN_FAULTS)
def test_a_file_of_rows_with_faulty_columns_is_a_fault_that_names_the_first(tmp_path: Path, fault: str) -> None:
    row, problem = COLUMN_FAULTS[fault]
    path = written(tmp_path, f"\n{row}\n{row}\n")
    examples, reader = read(read_rows(path))
    assert examples == []
    with pytest.raises(ConfigError) as caught:
        reader.require_rows(path)
    told = f"{path}: none of 2 rows is usable as alpaca (2 malformed); first, {path}, line 2: {problem}"
    assert caught.value.message.startswith(told)


@pytest.mark.parametrize("row", ['["a", "b"]', "null", "7", '"text"'])
@pytest.mark.parametrize(("name", "place"), [("rows.jsonl", "line 3"), ("rows.json", "row 2")])
def test_a_row_that_is_no_object_is_named_by_file_and_place(tmp_path: Path, row: str, name: str, place: str) -> None:
    contents = f"{GOOD}\n\n{row}\n{GOOD}\n" if name.endswith("l") else f"[{GOOD}, {row}, {GOOD}]"
    path = written(tmp_path, contents, name)
    with pytest.raises(ConfigError) as caught:
        read_rows(path)
    assert caught.value.message == f"{path}, {place} is not a JSON object, but {row} (1 of 3 rows are none)"


MESSAGES = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
NO_OBJECTS = {
    "lists of cells": ('["a", "b"]\n["c", "d"]\n', "line 1", '["a", "b"]', "2 of 2", '{"instruction": ...'),
    "lists of messages": (
        f"{MESSAGES}\n{MESSAGES}\n",
        "line 1",
        MESSAGES[:60] + "...",
        "2 of 2",
        '{"messages": [...]}',
    ),
    "lists between rows": (f"{GOOD}\n[1]\n{GOOD}\n[2]\n", "line 2", "[1]", "2 of 4", "an object of columns"),
    "texts": ('"a"\n"b"\n"c"\n', "line 1", '"a"', "3 of 3", "an object of columns"),
    "numbers and null": (f"{GOOD}\n7\nnull\ntrue\n", "line 2", "7", "3 of 4", "an object of columns"),
    "an array of lists": ('[["a", "b"], ["c", "d"]]', "row 1", '["a", "b"]', "2 of 2", "an object of columns"),
}


@pytest.mark.parametrize("case", NO_OBJECTS)
def test_rows_that_are_no_objects_are_counted_and_the_first_is_shown(tmp_path: Path, case: str) -> None:
    contents, place, shown, counted, hint = NO_OBJECTS[case]
    path = written(tmp_path, contents)
    with pytest.raises(ConfigError) as caught:
        read_rows(path)
    assert caught.value.message == f"{path}, {place} is not a JSON object, but {shown} ({counted} rows are none)"
    assert hint in caught.value.hint


TWICE = {
    "a column": ('{"instruction": "a", "output": "b", "output": "c"}', "output"),
    "a column, equal": ('{"output": "b", "instruction": "a", "output": "b"}', "output"),
    "a key that is escaped": ('{"instruction": "a", "output": "b", "\\u006futput": "c"}', "output"),
    "a key inside": ('{"instruction": "a", "output": "b", "meta": {"k": 1, "k": 2}}', "k"),
    "a key of a message": ('{"instruction": "a", "output": "b", "x": [{"role": "u", "role": "v"}]}', "role"),
}


@pytest.mark.parametrize("case", TWICE)
@pytest.mark.parametrize(("name", "place"), [("rows.jsonl", "line 3"), ("rows.json", "row 2")])
def test_a_row_that_names_a_key_twice_is_left_out_counted_and_named(
    tmp_path: Path, case: str, name: str, place: str
) -> None:
    row, key = TWICE[case]
    contents = f"{GOOD}\n\n{row}\n{GOOD}\n" if name.endswith("l") else f"[{GOOD}, {row}, {GOOD}]"
    path = written(tmp_path, contents, name)
    examples, reader = read(read_rows(path))
    assert examples == [instruct("a", "b")] * 2
    assert (reader.num_rows, reader.num_usable, reader.left_out) == (3, 2, {"a key twice": 1})
    assert reader.first_cases == {"a key twice": f"{path}, {place}: it names the key {key!r} twice: keep one"}


UNLIKE = {
    "spaces around names": (" instruction , output \na,b\n", "where ' instruction ' differs in capitals or spaces"),
    "capitals": ("Instruction,Output\na,b\n", "where 'Instruction' differs in capitals or spaces: rename it"),
    "an unbroken space": ("instruction\xa0,output\na,b\n", "where 'instruction\\xa0' differs in capitals or spaces"),
    "a space without width": ("instruction,\u200boutput\na,b\n", "where '\\u200boutput' differs in capitals or spaces"),
    "no header": ("What is one and one?,2\nAnd two?,4\n", "no column 'instruction'; it has What is one and one?, 2"),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_a_header_that_nearly_names_the_columns_is_told_with_the_cure(tmp_path: Path, case: str) -> None:
    contents, problem = UNLIKE[case]
    path = written(tmp_path, contents, "rows.csv")
    _, reader = read(read_rows(path))
    with pytest.raises(ConfigError) as caught:
        reader.require_rows(path)
    assert problem in caught.value.message
    assert ("put a line of column names before it" in caught.value.hint) is (case == "no header")


@pytest.mark.parametrize("marks", ["\ufeff", "\ufeff\ufeff", '\ufeff"', "\ufeff\r\n", ""])
def test_a_byte_order_mark_is_no_part_of_a_columns_name(tmp_path: Path, marks: str) -> None:
    name = 'instruction"' if marks.endswith('"') else "instruction"
    examples, _ = read(read_rows(written(tmp_path, f"{marks}{name},output\na,b\n", "rows.csv")))
    assert examples == [instruct("a", "b")]


@pytest.mark.parametrize(
    ("contents", "problem"),
    [
        ("a,b,a\n1,2,3\n", "does not name the columns, each once: 'a' stands 2 times"),
        ("a,b,,\n1,2,,\n", "does not name the columns, each once: '' stands 2 times"),
        ("a,b\n1,2\n1\n3,4,5\n6,7\n", "line 3 has 1 cells, the header 2 (2 of 4 rows have another number than it)"),
        ("a,b\n1,2,\n3,4,\n", "line 2 has 3 cells, the header 2 (2 of 2 rows have another number than it)"),
        ('a,b\n1\n"x\n', "line 2 has 1 cells, the header 2 (1 of 1 rows have another number than it)"),
    ],
)
def test_a_table_whose_columns_are_not_certain_is_refused(tmp_path: Path, contents: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_rows(written(tmp_path, contents, "rows.csv"))
    assert problem in caught.value.message


MORE = {"instruction": "a", "output": "b"}
DEEPER: dict[str, tuple[object, str]] = {
    "data": ({"data": MORE}, "data"),
    "a viewer's row": ({"row_idx": 0, "row": MORE, "truncated_cells": []}, "row"),
    "a viewer's page": ({"features": [], "rows": [{"row_idx": 0, "row": MORE}], "num_rows_total": 1}, "row"),
    "messages": ({"id": 1, "example": {"messages": json.loads(MESSAGES)}}, "example"),
    "fields of an export": ({"id": "x", "fields": MORE | {"score": 1}}, "fields"),
}


@pytest.mark.parametrize("case", DEEPER)
def test_columns_that_stand_one_level_deeper_are_told_with_the_cure(tmp_path: Path, case: str) -> None:
    document, name = DEEPER[case]
    path = written(tmp_path, json.dumps(document))
    _, reader = read(read_rows(path))
    with pytest.raises(ConfigError) as caught:
        reader.require_rows(path)
    assert caught.value.hint == f"Column {name!r} holds the columns of a row: write each row as what it holds."
    assert case == "messages" or f"where {name!r} holds it one level deeper" in caught.value.message


def test_a_line_that_is_not_json_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = written(tmp_path, f"{GOOD}\n" + '{"instruction": "a",\n')
    with pytest.raises(ConfigError, match="line 2 is not JSON") as caught:
        read_rows(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("name", "contents", "problem"),
    [
        ("rows.json", "[", "is not JSON"),
        ("rows.json", "{", "is not JSON"),
        ("rows.json", "", "holds no rows"),
        ("rows.json", "7", "is not a JSON object"),
        ("rows.jsonl", b'{"instruction": "caf\xe9", "output": "b"}\n', "is not UTF-8 text"),
        ("rows.txt", GOOD, r"rows are read from \.jsonl, .*\.json, .* files"),
        ("rows", GOOD, r"rows are read from \.jsonl, .*\.json, .* files"),
    ],
)
def test_a_faulty_file_is_named(tmp_path: Path, name: str, contents: str | bytes, problem: str) -> None:
    path = written(tmp_path, contents, name)
    with pytest.raises(ConfigError, match=problem) as caught:
        read_rows(path)
    assert str(path) in caught.value.message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    for name, problem in (("absent.jsonl", "No such file"), ("folder.jsonl", "holds no files of rows")):
        with pytest.raises(ConfigError, match=problem) as caught:
            read_rows(tmp_path / name)
        assert str(tmp_path / name) in caught.value.message


@pytest.mark.parametrize("text", ["", "\n \r\n"])
def test_an_empty_jsonl_file_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_rows(path)
    assert caught.value.message == f"{path} holds no rows"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_a_unicode_line_separator_inside_a_string_ends_no_line(tmp_path: Path, separator: str) -> None:
    text = f"one{separator}two"
    # JSON forbids raw control characters, so those below U+0020 are escaped; the others stand as they are.
    line = json.dumps({"instruction": text, "output": "b"}, ensure_ascii=False)
    examples, _ = read(read_rows(written(tmp_path, f"{line}\n{GOOD}\n")))
    assert [example.prompt[0].text for example in examples] == [text, "a"]


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_lines_may_end_as_on_windows_or_not_at_all(tmp_path: Path, end: str) -> None:
    rows = read_rows(written(tmp_path, (end or "\n").join([GOOD, GOOD]) + end))
    assert [row.fields for row in rows] == [{"instruction": "a", "output": "b"}] * 2


def test_rows_that_are_written_are_read_again(tmp_path: Path) -> None:
    fields = [{"instruction": 'naïve \u2028 \n "x"', "output": "\U0001f600", "n": 3}, {"output": ""}]
    assert [row.fields for row in read_rows(written(tmp_path, b"".join(map(write_row, fields))))] == fields


def test_half_a_surrogate_pair_is_a_fault_of_its_row(tmp_path: Path) -> None:
    # JSON can escape what UTF-8 cannot hold; no tokenizer takes it either.
    path = written(tmp_path, f"{GOOD}\n" + r'{"instruction": "\ud800", "output": "b"}' + "\n")
    with pytest.raises(ConfigError, match="line 2 holds half of a UTF-16 pair"):
        read_rows(path)


def test_a_row_that_nests_without_end_is_a_fault_of_its_row(tmp_path: Path) -> None:
    path = written(tmp_path, f"{GOOD}\n" + "[" * 200_000 + "\n")
    with pytest.raises(ConfigError, match="line 2 is not JSON"):
        read_rows(path)


# Partition


@given(num_rows=st.integers(1, 60), num_clients=st.integers(1, 20), seed=st.integers(0, 3), sort=st.booleans())
def test_shares_are_equal_to_within_one_row_disjoint_and_cover_all(
    num_rows: int, num_clients: int, seed: int, sort: bool
) -> None:
    rows, by = numbered(num_rows), "kind" if sort else None
    if num_rows < num_clients:
        with pytest.raises(ConfigError, match=f"^{num_rows} rows cannot be split among {num_clients} clients "):
            partition(rows, num_clients, seed, shards_by=by)
        return
    shares = partition(rows, num_clients, seed, shards_by=by)
    assert len(shares) == num_clients
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert sorted(row.where for share in shares for row in share) == sorted(row.where for row in rows)


def test_the_seed_decides_the_split() -> None:
    rows = numbered(30)
    assert partition(rows, 3, 0) == partition(rows, 3, 0)
    assert partition(rows, 3, 0) != partition(rows, 3, 1)


def test_shards_follow_the_order_of_their_column() -> None:
    shares = partition(numbered(31), 4, 0, shards_by="kind")
    kinds = [kind for share in shares for kind in sorted(row.fields["kind"] for row in share)]
    assert kinds == sorted(kinds)
    assert [len(share) for share in shares] == [7, 8, 8, 8]


def test_a_row_without_the_column_of_the_shards_is_named() -> None:
    rows = [*numbered(3), Row({"instruction": "x"}, "data.jsonl, line 9")]
    with pytest.raises(ConfigError, match=r"^data\.jsonl, line 9 has no column 'kind'; it has instruction$"):
        partition(rows, 2, 0, shards_by="kind")


def test_max_rows_takes_that_many_at_random() -> None:
    rows = numbered(100)
    taken = [row.where for share in partition(rows, 3, 0, max_rows=10) for row in share]
    assert len(set(taken)) == 10
    assert set(taken) != {row.where for row in rows[:10]}
    assert sum(map(len, partition(rows, 3, 0, max_rows=1000))) == 100
    with pytest.raises(ConfigError, match=r"^2 rows cannot be split among 3 clients "):
        partition(rows, 3, 0, max_rows=2)


# Order


@given(num_rows=st.integers(1, 12), counts=st.lists(st.integers(0, 15), max_size=6))
def test_every_row_is_drawn_once_before_any_twice_however_the_draws_are_cut(num_rows: int, counts: list[int]) -> None:
    drawn: list[int] = []
    for count in counts:
        drawn += draw(num_rows, seed=1, client=2, first=len(drawn), count=count)
    assert drawn == draw(num_rows, seed=1, client=2, first=0, count=sum(counts))
    for start in range(0, len(drawn), num_rows):
        epoch = drawn[start : start + num_rows]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(num_rows))


def test_clients_seeds_and_epochs_have_orders_of_their_own() -> None:
    two_epochs = draw(20, seed=0, client=0, first=0, count=40)
    orders = [
        two_epochs[:20],
        two_epochs[20:],
        draw(20, seed=0, client=1, first=0, count=20),
        draw(20, seed=1, client=0, first=0, count=20),
    ]
    assert len({tuple(order) for order in orders}) == 4


# The demo's rows


def test_the_demos_labels_are_balanced_in_every_topic_and_split() -> None:
    for part, num_rows in (("train", 240), ("tuning", 72), ("test", 72)):
        counts = Counter((row["topic"], row["output"]) for row in demo_rows(0)[part])
        assert counts == {(topic, label): num_rows // 4 for topic in TOPICS for label in LABELS}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_headline_of_the_demo_occurs_twice(seed: int) -> None:
    headlines = [row["input"] for split in demo_rows(seed).values() for row in split]
    assert len(headlines) == 5 * (240 + 72 + 72)
    assert len(set(headlines)) == len(headlines)


def test_each_of_five_demo_clients_sees_its_own_topic_only() -> None:
    rows = [Row(fields, "demo") for fields in demo_rows(0)["train"]]
    shares = partition(rows, 5, 0, shards_by="topic")
    topics = [{row.fields["topic"] for row in share} for share in shares]
    assert topics == [{topic} for topic in sorted(TOPICS)]
    assert [len(share) for share in shares] == [240] * 5


def test_the_demos_rows_follow_its_seed() -> None:
    assert demo_rows(0) == demo_rows(0)
    assert demo_rows(0)["train"] != demo_rows(1)["train"]
