"""Where rows come from: every kind of file, folders, what a broken one is told, and data sets of the hub."""

import csv
import datetime
import gc
import gzip
import io
import json
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from support.processes import ENVIRONMENT

from fedcli.data.file_rows import KINDS, Row
from fedcli.data.source import Source, find_source, read_rows, write_row
from fedcli.errors import ConfigError

Fields = dict[str, Any]


def written(path: Path, contents: str | bytes) -> Path:
    """Write a file; one that is named .gz is packed."""
    data = contents if isinstance(contents, bytes) else contents.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def fields_in(path: Path, split: str = "train") -> list[Fields]:
    return [dict(row.fields) for row in Source(path, split=split).rows()]


def refusal(path: Path, split: str = "train") -> str:
    """Return why a file is not read, without its path."""
    with pytest.raises(ConfigError) as caught:
        fields_in(path, split)
    assert str(path) in caught.value.message
    assert caught.value.hint
    return caught.value.message.replace(str(path), "FILE")


# One set of rows in every kind of file

ROWS: list[Fields] = [
    {"instruction": "Say it in Persian: سلام 👋🏽", "output": "line one\nline two"},
    {"instruction": "a\u2028b\u0085c", "output": "2024-01-02"},
    {"instruction": "007", "output": ""},
    {"instruction": 'say "hi", now', "output": "NA"},
]


def as_lines(rows: list[Fields]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_cells(rows: list[Fields], delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def as_arrow(rows: list[Fields], new: Callable[..., Any]) -> bytes:
    sink, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def as_parquet(rows: list[Fields]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


WRITERS: dict[str, Callable[[list[Fields]], bytes]] = {
    "array.json": lambda rows: json.dumps(rows).encode(),
    "indented.json": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False).encode(),
    "lines.json": as_lines,
    "rows.jsonl": as_lines,
    "rows.ndjson": as_lines,
    "ROWS.JSONL": as_lines,
    "rows.csv": lambda rows: as_cells(rows, ","),
    "rows.tsv": lambda rows: as_cells(rows, "\t"),
    "rows.parquet": as_parquet,
    "stream.arrow": lambda rows: as_arrow(rows, ipc.new_stream),
    "file.arrow": lambda rows: as_arrow(rows, ipc.new_file),
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_any_kind_gives_the_same_rows_any_number_of_times(name: str, suffix: str, tmp_path: Path) -> None:
    path = written(tmp_path / f"{name}{suffix}", WRITERS[name](ROWS))
    source = find_source(path.name, tmp_path)
    first, second = list(source.rows()), list(source.rows())
    assert [dict(row.fields) for row in first] == ROWS
    assert first == second == read_rows(path)
    unit = "line" if WRITERS[name] is as_lines else "row"
    assert [row.where for row in first] == [f"{path}, {unit} {number}" for number in (1, 2, 3, 4)]


def test_every_kind_has_been_written_here() -> None:
    assert {Path(name).suffix.lower() for name in WRITERS} == set(KINDS)


JSON = {
    "a byte order mark": ('\ufeff{"a": "b"}\n', [{"a": "b"}]),
    "ends of Windows": ('\ufeff\r\n [{"a": "b"},\r\n{"a": "c"}]\r\n', [{"a": "b"}, {"a": "c"}]),
    "blank lines": ('\n\n{"a": "b"}\n  \n\r\n{"a": "c"}\n\n', [{"a": "b"}, {"a": "c"}]),
    "ends of lines of Unicode": ('{"a": "b\u2028c\u2029d\u0085"}\n', [{"a": "b\u2028c\u2029d\u0085"}]),
    "escapes": ('{"a": "\\ud83d\\ude00 \\r\\n \\u0000"}\n', [{"a": "😀 \r\n \x00"}]),
    "a text like a date": ('{"a": "2024-01-02"}\n', [{"a": "2024-01-02"}]),
    "a text like a time": ('{"a": "2024-01-02T03:04:05Z"}\n', [{"a": "2024-01-02T03:04:05Z"}]),
    "a column that appears late": ('{"a": 0}\n' * 3000 + '{"z": 1}', [{"a": 0}] * 3000 + [{"z": 1}]),
    "a column of several types": ('{"a": 1}\n{"a": "1"}\n{"a": [1]}', [{"a": 1}, {"a": "1"}, {"a": [1]}]),
    "numbers, truth and null": ('{"a": 1, "b": 1.0, "c": true, "d": null}', [{"a": 1, "b": 1.0, "c": True, "d": None}]),
    "nested values": ('{"a": [{"b": {"c": [1, "x"]}}, {}]}', [{"a": [{"b": {"c": [1, "x"]}}, {}]}]),
    "an empty object": ("{}\n", [{}]),
}


@pytest.mark.parametrize("case", JSON)
def test_json_gives_what_it_says(case: str, tmp_path: Path) -> None:
    contents, expected = JSON[case]
    found = fields_in(written(tmp_path / "rows.json", contents))
    assert found == expected
    assert str(found) == str(expected)  # where 1, 1.0 and True differ


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_come_before_a_broken_last_line_is_reached(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, '{"a": "\u2028"}\r\n\n{"a": 2}\n{"a":')
    rows = Source(path).rows()
    assert next(rows) == Row({"a": "\u2028"}, f"{path}, line 1")
    assert next(rows) == Row({"a": 2}, f"{path}, line 3")
    with pytest.raises(ConfigError, match="line 4 is not JSON: Expecting value"):
        next(rows)


def test_rows_of_a_truncated_gzip_come_before_its_end_is_missed(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl.gz", as_lines([{"a": number} for number in range(100_000)]))
    path.write_bytes(path.read_bytes()[:-1000])
    rows = Source(path).rows()
    assert [next(rows).fields["a"] for _ in range(1000)] == list(range(1000))
    with pytest.raises(ConfigError, match="is damaged: Compressed file ended before"):
        list(rows)


CELLS = {
    "gaps and zeros": ("a,b\nNA,null\n007,\n,1.0\n", [("NA", "null"), ("007", ""), ("", "1.0")]),
    "what pandas would turn": ("a,b\nTrue,1e5\nnan,2024-01-02\n", [("True", "1e5"), ("nan", "2024-01-02")]),
    "a quoted empty cell": ('a,b\n"",""\n', [("", "")]),
    "lines inside a cell": ('a,b\n"x\n\ny","z"\n"1\r\n2",3\n', [("x\n\ny", "z"), ("1\r\n2", "3")]),
    "quotes and commas": ('a,b\n"say ""hi"", now",5" disk\n', [('say "hi", now', '5" disk')]),
    "ends of Windows, a blank line": ("a,b\r\n1,2\r\n\r\n3,4\r\n", [("1", "2"), ("3", "4")]),
    "spaces, no end of the last line": ("a,b\n 1 ,  ", [(" 1 ", "  ")]),
    "ends of lines of Unicode": ("a,b\nx\u2028y,z\u0085\n", [("x\u2028y", "z\u0085")]),
}


@pytest.mark.parametrize("case", CELLS)
def test_a_cell_of_csv_is_its_text(case: str, tmp_path: Path) -> None:
    contents, cells = CELLS[case]
    assert fields_in(written(tmp_path / "rows.csv", contents)) == [{"a": a, "b": b} for a, b in cells]


NESTED: list[Fields] = [
    {
        "messages": [{"role": "user", "content": "سلام\u2028👋🏽"}, {"role": "assistant", "content": "x" * 50_000}],
        "when": datetime.datetime(2024, 1, 2, 3, 4, 5),
        "day": datetime.date(2024, 1, 2),
        "score": 7.5,
        "count": 3,
        "gap": "x",
    },
    {"messages": [], "when": None, "day": None, "score": None, "count": None, "gap": None},
]


@pytest.mark.parametrize("name", ["rows.parquet", "stream.arrow", "file.arrow"])
def test_nested_columns_numbers_and_gaps_keep_their_types(name: str, tmp_path: Path) -> None:
    assert fields_in(written(tmp_path / name, WRITERS[name](NESTED))) == NESTED


def test_a_row_that_is_written_is_read_again_and_its_dates_are_texts(tmp_path: Path) -> None:
    parquet = written(tmp_path / "rows.parquet", as_parquet(NESTED))
    lines = [write_row(row.fields) for row in Source(parquet).rows()]
    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in lines)
    assert "سلام\u2028👋🏽".encode() in lines[0]
    path = written(tmp_path / "rows.jsonl", b"".join(lines))
    assert fields_in(path) == [{**NESTED[0], "when": "2024-01-02 03:04:05", "day": "2024-01-02"}, NESTED[1]]
    assert b"".join(write_row(row.fields) for row in Source(path).rows()) == path.read_bytes()


def test_a_folder_is_its_files_sorted_by_name(tmp_path: Path) -> None:
    written(tmp_path / "b.jsonl", '{"a": 2}\n{"a": 3}\n')
    written(tmp_path / "c.csv.gz", "a\n4\n")
    written(tmp_path / "a.parquet", as_parquet([{"a": 1}]))
    for name in ("README.md", "licence.txt", "dataset_info.json", "sub/d.jsonl"):
        written(tmp_path / name, "no rows")
    rows = list(Source(tmp_path).rows())
    assert [row.fields["a"] for row in rows] == [1, 2, 3, "4"]
    assert (rows[2].where, rows[3].where) == (f"{tmp_path}/b.jsonl, line 2", f"{tmp_path}/c.csv.gz, row 1")


def test_a_folder_that_datasets_saved_gives_its_rows_in_order_or_a_split(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS).select([3, 1, 0])
    rows.save_to_disk(tmp_path / "shards", num_shards=2)
    assert fields_in(tmp_path / "shards") == [ROWS[3], ROWS[1], ROWS[0]]
    datasets.DatasetDict({"train": rows.select([0, 1]), "test": rows.select([2])}).save_to_disk(tmp_path / "saved")
    assert fields_in(tmp_path / "saved") == [ROWS[3], ROWS[1]]
    assert fields_in(tmp_path / "saved", "test") == [ROWS[0]]
    assert refusal(tmp_path / "saved", "validation") == "FILE holds no files of rows for the split validation"
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty") == "FILE holds no files of rows for the split train"


# What cannot be read

NO_KIND = "FILE: rows are read from .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow files, and .gz of these"
NOT_UTF8 = "FILE is not UTF-8 text: 'utf-8' codec can't decode byte 0x"
HEADER = "FILE: its first line does not name the columns, each once"
NO_CSV, NO_PARQUET, NO_ARROW = (f"FILE is no {kind} file that can be read: " for kind in ("csv", "parquet", "arrow"))
BROKEN = {
    "an unknown suffix": ("rows.txt", "x", NO_KIND),
    "no suffix": ("rows", "x", NO_KIND),
    "an empty file": ("rows.jsonl", "", "FILE holds no rows"),
    "blank lines alone": ("rows.json", "\n \r\n\n", "FILE holds no rows"),
    "an empty array": ("rows.json", "[]", "FILE holds no rows"),
    "a broken line": ("rows.jsonl", '{"a": 1}\n\n{"a": }\n', "FILE, line 3 is not JSON: Expecting value"),
    "two objects on a line": ("rows.jsonl", '{"a": 0}\n{"a": 1} {"a": 2}\n', "FILE, line 2 is not JSON: Extra data"),
    "a line that is an array": ("rows.jsonl", '{"a": 1}\n[1]\n', "FILE, line 2 is not a JSON object"),
    "an array of texts": ("rows.json", '[{"a": 1}, "x"]', "FILE, row 2 is not a JSON object"),
    "an array that is not closed": ("rows.json", '[{"a": 1},\n{"b": 2}', "FILE is not JSON: Expecting ',' delimiter"),
    "half of a pair": ("rows.jsonl", '{"a": "\\ud83d"}\n', "FILE, line 1 holds half of a UTF-16 pair"),
    "brackets without end": ("rows.jsonl", '{"a": ' + "[" * 100_000, "FILE, line 1 is not JSON: maximum recursion"),
    "Latin-1 in JSON": ("rows.jsonl", b'{"a": "caf\xe9"}\n', f"{NOT_UTF8}e9 in position 10"),
    "Latin-1 in CSV": ("rows.csv", b"a\ncaf\xe9\n", f"{NOT_UTF8}e9"),
    "UTF-16": ("rows.jsonl", '{"a": 1}\n'.encode("utf-16"), f"{NOT_UTF8}ff in position 0"),
    "an empty CSV": ("rows.csv", "", "FILE holds no rows"),
    "a header that repeats a name": ("rows.csv", "a,b,a\n1,2,3\n", HEADER),
    "a header alone": ("rows.csv", "a,b\n", "FILE holds no rows"),
    "a cell too many": ("rows.csv", "a,b\n1,2\n1,2,3\n", "FILE, line 3 has 3 cells, the header 2"),
    "a quote that is not closed": ("rows.csv", 'a,b\nx,"y\n1,2\n', "FILE, line 3: unexpected end of data"),
    "no Parquet": ("rows.parquet", b"PAR1 not really PAR1", NO_PARQUET),
    "an empty Parquet": ("rows.parquet", b"", NO_PARQUET),
    "half a Parquet": ("rows.parquet", as_parquet(ROWS)[:300], NO_PARQUET),
    "no Arrow": ("rows.arrow", b"not really" * 9, NO_ARROW),
    "half an Arrow file": ("rows.arrow", as_arrow(ROWS, ipc.new_file)[:-40], NO_ARROW),
    "half an Arrow stream": ("rows.arrow", as_arrow(ROWS, ipc.new_stream)[:-40], NO_ARROW),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_cannot_be_read_is_told_with_its_place(case: str, tmp_path: Path) -> None:
    name, contents, message = BROKEN[case]
    found = refusal(written(tmp_path / name, contents))
    assert found.startswith(message)
    assert "\n" not in found


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv.gz", "rows.parquet.gz"])
def test_a_gz_that_is_none_or_ends_early_is_told(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"a\n1\n")
    assert refusal(path) == "cannot read the rows in FILE: Not a gzipped file (b'a\\n')"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-9])
    assert refusal(path).startswith("FILE is damaged: Compressed file ended before")


# Known defects, each with what should happen

CORRUPT = bytearray(gzip.compress(as_lines([{"a": number} for number in range(1000)])))
CORRUPT[30] ^= 0xFF
UNUSUAL = {
    "a byte order mark, as Excel writes": ("rows.csv", "\ufeffa,b\n1,2\n", [{"a": "1", "b": "2"}]),
    "an index column, as pandas writes": ("rows.csv", ",a\n0,x\n", [{"": "0", "a": "x"}]),
    "a first row with a cell too many": ("rows.csv", "a,b\n1,2,3\n", None),  # all cells are shifted
    "brackets in a path": ("a [v2]/rows.csv", "a\n1\n", [{"a": "1"}]),
    "a colon in a path": ("a::b/rows.csv", "a\n1\n", [{"a": "1"}]),
    "a star in a path": ("a*/rows.csv", "a\n1\n", [{"a": "1"}]),
    "a corrupt gzip": ("corrupt.jsonl.gz", "", None),
    "a Parquet with damaged pages": ("rows.parquet", as_parquet(ROWS)[:4] + b"\xff" * 56 + as_parquet(ROWS)[60:], None),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_a_file_is_read_as_its_writer_meant_it_or_refused_in_a_line(case: str, tmp_path: Path) -> None:
    name, contents, expected = UNUSUAL[case]
    written(tmp_path / "ab" / "rows.csv", "a\nof another folder\n")
    path = written(tmp_path / name, contents)
    if name == "corrupt.jsonl.gz":
        path.write_bytes(CORRUPT)
    if expected is None:
        assert "\n" not in refusal(path)
    else:
        assert fields_in(path) == expected


def test_what_datasets_caches_in_a_saved_folder_are_not_its_rows(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path)
    datasets.load_from_disk(str(tmp_path)).map(lambda row: {"output": row["output"] + "!"})
    assert fields_in(tmp_path) == ROWS


def test_a_file_is_closed_where_reading_stops_early(tmp_path: Path) -> None:
    rows = Source(written(tmp_path / "rows.csv", "a\n1\n2\n")).rows()
    assert next(rows).fields == {"a": "1"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows.close()
        gc.collect()
    assert caught == []


@pytest.mark.parametrize(
    ("name", "is_here"),
    [
        *[(name, True) for name in ("here.jsonl", "./here.jsonl", "sub", "sub/here.csv", "owner/name")],
        *[(name, False) for name in ("tatsu-lab/alpaca", "lucasmccabe-lmi/CodeAlpaca-20k", "v1.5/a_b-2.0")],
    ],
)
def test_a_name_is_a_path_where_there_is_one_and_else_a_hub_id(name: str, is_here: bool, tmp_path: Path) -> None:
    for path in ("here.jsonl", "sub/here.csv", "owner/name/rows.jsonl"):
        written(tmp_path / path, "")
    location = tmp_path / name if is_here else name
    assert find_source(name, tmp_path) == Source(location, None, "train")
    assert find_source(name, tmp_path, subset="s", split="test") == Source(location, "s", "test")


@pytest.mark.parametrize(
    "name", ["x.jsonl", "x.csv.gz", "a/x.parquet", "./x", "../x", "a/b/c", "a b", "x/", "{root}/x"]
)
def test_a_path_that_is_not_there_is_told(name: str, tmp_path: Path) -> None:
    name = name.format(root=tmp_path)
    with pytest.raises(ConfigError) as caught:
        find_source(name, tmp_path)
    assert caught.value.message == f"cannot read the rows in {tmp_path / name}: no such file or folder"
    assert "data.source" in caught.value.hint


# The hub, in processes of their own: its client reads its settings when it is imported

SHOW = """
import json, sys
from pathlib import Path
from fedcli.data.source import find_source
from fedcli.errors import FedError
for name in sys.argv[1:]:
    try:
        print(json.dumps([[row.fields, row.where] for row in find_source(name, Path.cwd()).rows()]))
    except FedError as error:
        print(json.dumps([error.exit_code, error.message, error.hint]))
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """A hub that has tatsu-lab/alpaca alone: its address, and the requests that it got."""
    files = {"train.jsonl": as_lines(ROWS), "test.jsonl": as_lines(ROWS[:1])}
    about = {"id": "tatsu-lab/alpaca", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
    tree = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()]
    requests: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            name, is_known = self.path.rpartition("/")[2], "/tatsu-lab/alpaca" in self.path
            if is_known and self.path.startswith("/api/"):
                status, body = 200, json.dumps(tree if "/tree/" in self.path else about).encode()
            else:
                status, body = (200, files[name]) if is_known and name in files else (404, b"{}")
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            if status == 200:
                self.send_header("ETag", f'"{len(body)}"')
            else:
                self.send_header("X-Error-Code", "EntryNotFound" if is_known else "RepoNotFound")
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()


def shown(*names: str, cwd: Path, **environment: str) -> list[Any]:
    """Return rows, or exit code, message and hint, of each name."""
    folders = {"PYTHONPATH": str(Path(__file__).parents[1]), "HF_HOME": str(cwd / "hub"), "TMPDIR": str(cwd)}
    arguments = [sys.executable, "-c", SHOW, *names]
    done = subprocess.run(arguments, cwd=cwd, env=ENVIRONMENT | folders | environment, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_an_object_of_lists_gives_each_row_its_lists_key(tmp_path: Path) -> None:
    path = tmp_path / "users.json"
    path.write_text('{"7": [{"a": 1}, {"a": 2}],\n "Zoë": [{"a": 3, "user": "Zoë"}], "none": []}', encoding="utf-8")
    rows = list(find_source("users.json", tmp_path, keyed_by="user").rows())
    assert [row.fields for row in rows] == [{"a": 1, "user": "7"}, {"a": 2, "user": "7"}, {"a": 3, "user": "Zoë"}]
    assert [row.where for row in rows] == [f"{path}, '7', row 1", f"{path}, '7', row 2", f"{path}, 'Zoë', row 1"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"a": 1}\n{"a": 2}', "is not JSON: Extra data"),
        ("[]", "is not an object of lists of rows, as data.keyed_by says, but a list"),
        ("{}", "but an empty one"),
        ('{"u": [{"a": 1}], "v": {"a": 1}}', ": what 'v' names is no list"),
        ('{"u": [{"a": 1}, "text"]}', ", 'u', row 2 is not a JSON object"),
        ('{"u": [{"a": 1}], "u": [{"a": 2}]}', ": the key 'u' stands twice"),
        ('{"u": [{"user": "v"}]}', ", 'u', row 1 has 'v' in column 'user'"),
        ('{"u": []}', "holds no rows"),
    ],
)
def test_a_file_that_is_no_object_of_lists_is_refused_with_the_place(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "users.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        list(find_source("users.json", tmp_path, keyed_by="user").rows())
    assert told in str(caught.value)
    (tmp_path / "users.csv").write_text("a\n1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"only a \.json file"):
        list(find_source("users.csv", tmp_path, keyed_by="user").rows())
    with pytest.raises(ConfigError, match="names a data set of the hub"):
        find_source("someone/users", tmp_path, keyed_by="user")


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_fetched_once_and_local_rows_are_copied_nowhere(
    hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, requests = hub
    for name in ("rows.csv.gz", "file.arrow"):
        written(tmp_path / name, WRITERS[name.removesuffix(".gz")](ROWS))
    local = shown("rows.csv.gz", "file.arrow", cwd=tmp_path, HF_ENDPOINT=address)
    assert [[row for row, _ in rows] for rows in local] == [ROWS, ROWS]
    left = {path.name for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size}
    assert left == {"rows.csv.gz", "file.arrow"}  # the cache holds empty locks
    assert requests == []

    expected = [[row, f"tatsu-lab/alpaca, row {number}"] for number, row in enumerate(ROWS, 1)]
    names = ("tatsu-lab/alpaca", "tatsu-lab/apalca")
    fetched, (code, message, _) = shown(*names, cwd=tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="0")
    assert fetched == expected
    assert f"/datasets/tatsu-lab/alpaca/resolve/{COMMIT}/train.jsonl" in requests
    assert code == 8
    assert message.startswith("cannot load the data set 'tatsu-lab/apalca' (split train): ")
    assert "doesn't exist on the Hub" in message

    requests.clear()
    kept, (code, message, hint) = shown(*names, cwd=tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert kept == expected
    assert code == 8
    assert message.startswith("cannot load the data set 'tatsu-lab/apalca' (split train): Couldn't reach")
    assert "Offline" in message
    assert all(word in hint for word in ("name", "data.subset", "data.split", "network", "HF_HOME", "no such file"))
    assert requests == []
