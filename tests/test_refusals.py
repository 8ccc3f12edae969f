"""Every row of docs/PROTOCOL.md's table of refusals: hostile or broken updates never stop a round."""

import errno
import json
import os
import re
import signal
import struct
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol_client import take_part
from safetensors.numpy import load, save
from support.damage import as_bfloat16, replace_adapter
from support.federation import ADAPTER, configure, read_manifest

from fedcli import Federation
from fedcli.cli import main
from fedcli.errors import WorkspaceError
from fedcli.workspace.inbox import read_update
from fedcli.workspace.merge_records import RefusedUpdate
from fedcli.workspace.records import parse_update_record
from fedcli.workspace.refusal import Refusal, RefusalCode
from fedcli.workspace.tensors import decode, encode, schema_of

PAGE = Path(__file__).parents[1] / "docs" / "PROTOCOL.md"
BAD = 1
"""The client whose update is damaged; 0 and 2 are honest."""

Damage = Callable[[Path], object]


@pytest.fixture(autouse=True)
def _alarm():
    """Fail a test that hangs, as a reader of FIFOs would."""

    def expire(_signal, _frame):
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def linked(name: str, update: Path) -> None:
    """Put a symbolic link in the place of something, to the very same thing under a hidden name."""
    path = (update / name).resolve()
    hidden = path.parent / f".real-{path.name}"
    path.rename(hidden)
    path.symlink_to(hidden)


def replaced(name: str, make: Callable[[Path], object], update: Path) -> None:
    """Put something else in the place of a file."""
    (update / name).unlink()
    make(update / name)


def as_a_file(update: Path) -> None:
    """Put a regular file in the update's place."""
    update.rename(update.parent / ".moved")
    update.write_bytes(b"{}")


def owned(name: str, update: Path) -> None:
    """Give something to another user."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another user")
    os.chown(update / name, os.stat(update).st_uid + 1, -1)


def record(_drop: str | None = None, /, update: Path | None = None, **changes: object) -> None:
    """Change keys of update.json, and drop one."""
    path = update / "update.json"
    document = json.loads(path.read_bytes()) | changes
    document.pop(_drop, None)
    path.write_text(json.dumps(document))


def text(old: str, new: str, update: Path) -> None:
    """Replace a part of update.json's text, for what json.dumps would not write."""
    path = update / "update.json"
    contents = path.read_text()
    assert contents.count(old) == 1
    path.write_text(contents.replace(old, new))


def raw(contents: bytes, update: Path) -> None:
    """Replace update.json's bytes."""
    (update / "update.json").write_bytes(contents)


def entry(update: Path, **changes: object) -> None:
    """Change what update.json says of the adapter's file."""
    document = json.loads((update / "update.json").read_bytes())
    document["files"][ADAPTER] |= changes
    (update / "update.json").write_text(json.dumps(document))


def contents(edit: Callable[[bytes], bytes], update: Path) -> None:
    """Change the adapter's bytes, and hash them again so that deeper checks are reached."""
    replace_adapter(update, edit((update / ADAPTER).read_bytes()))


def arrays(edit: Callable[[dict[str, np.ndarray]], object], update: Path, write=save) -> None:
    """Change the adapter's arrays in place, and hash them again."""
    tensors = load((update / ADAPTER).read_bytes())
    edit(tensors)
    replace_adapter(update, write(tensors))


def split(data: bytes) -> tuple[dict, bytes]:
    """Return a safetensors file's header and the bytes behind it."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: bytes, body: bytes) -> bytes:
    """Return a safetensors file of any header."""
    return struct.pack("<Q", len(header)) + header + body


def header(edit: Callable[[list[dict]], object], update: Path) -> None:
    """Change the entries of the safetensors header, in the order of their offsets."""
    head, body = split((update / ADAPTER).read_bytes())
    edit(sorted(head.values(), key=lambda tensor: tensor["data_offsets"]))
    replace_adapter(update, joined(json.dumps(head).encode(), body))


def with_a_hole(data: bytes) -> bytes:
    """Leave four bytes between the first tensor and the second."""
    head, body = split(data)
    first, *rest = sorted(head.values(), key=lambda tensor: tensor["data_offsets"])
    for tensor in rest:
        tensor["data_offsets"] = [offset + 4 for offset in tensor["data_offsets"]]
    end = first["data_offsets"][1]
    return joined(json.dumps(head).encode(), body[:end] + b"\0\0\0\0" + body[end:])


def with_a_key_twice(data: bytes) -> bytes:
    """Name the first tensor twice in the header."""
    head, body = split(data)
    name, tensor = next(iter(head.items()))
    return joined(json.dumps(head).encode()[:-1] + f', "{name}": {json.dumps(tensor)}}}'.encode(), body)


def set_value(value: float, tensors: dict[str, np.ndarray]) -> None:
    """Set the last value of the last tensor."""
    name = max(tensors)
    tensors[name] = tensors[name].copy()
    tensors[name].flat[-1] = value


def as_type(dtype: type, tensors: dict[str, np.ndarray]) -> None:
    """Give the first tensor another type."""
    tensors[min(tensors)] = tensors[min(tensors)].astype(dtype)


def set_half(value: float, tensors: dict[str, np.ndarray]) -> None:
    """Make all of it F16, with one odd value."""
    for name in tensors:
        tensors[name] = tensors[name].astype(np.float16)
    set_value(value, tensors)


def renamed(name: str, tensors: dict[str, np.ndarray]) -> None:
    """Give the first tensor another name."""
    tensors[name] = tensors.pop(min(tensors))


NUMBER = '"num_samples": 10'
CASES: list[tuple[str, str, Damage]] = [
    ("symlink", "the update", partial(linked, "")),
    ("symlink", "the adapter", partial(linked, ADAPTER)),
    ("symlink", "update.json", partial(linked, "update.json")),
    ("symlink", "the client's inbox", partial(linked, "..")),
    ("not_regular", "a FIFO as adapter", partial(replaced, ADAPTER, os.mkfifo)),
    ("not_regular", "a FIFO as update.json", partial(replaced, "update.json", os.mkfifo)),
    ("not_regular", "a directory as adapter", partial(replaced, ADAPTER, os.mkdir)),
    ("not_regular", "a directory as update.json", partial(replaced, "update.json", os.mkdir)),
    ("not_regular", "a file as update", as_a_file),
    ("owner", "the update", partial(owned, "")),
    ("owner", "the adapter", partial(owned, ADAPTER)),
    ("owner", "update.json", partial(owned, "update.json")),
    ("size", "a torn adapter", lambda update: os.truncate(update / ADAPTER, 5000)),
    ("size", "an empty adapter", lambda update: os.truncate(update / ADAPTER, 0)),
    ("size", "a sparse adapter of 200 MB", lambda update: os.truncate(update / ADAPTER, 200_000_000)),
    ("size", "a hashed adapter that is too large", partial(contents, lambda data: data + bytes(2**21))),
    ("size", "update.json over 64 KiB", partial(record, more="x" * 65536)),
    ("size", "other bytes than it says", lambda update: entry(update, bytes=9217)),
    ("json", "a list", partial(raw, b"[]")),
    ("json", "nothing", partial(raw, b"")),
    ("json", "a torn record", lambda update: os.truncate(update / "update.json", 100)),
    ("json", "60000 brackets", partial(raw, b"[" * 60000)),
    ("json", "not UTF-8", partial(raw, b'{"protocol": "\xff"}')),
    ("json", "a number of 5000 digits", partial(text, NUMBER, '"num_samples": ' + "9" * 5000)),
    ("json", "a train_loss of NaN", partial(text, '"train_loss": null', '"train_loss": NaN')),
    ("json", "a train_loss of -Infinity", partial(text, '"train_loss": null', '"train_loss": -Infinity')),
    ("json", "a train_loss that overflows", partial(text, '"train_loss": null', '"train_loss": 1e999')),
    ("json", "a train_loss of 401 digits", partial(record, train_loss=10**400)),
    ("json", "NaN under a key that no one knows", partial(text, NUMBER, f'{NUMBER}, "more": NaN')),
    ("json", "no round", partial(record, "round")),
    ("json", "no train_loss", partial(record, "train_loss")),
    ("json", "a round in quotes", partial(record, round="0")),
    ("json", "a workspace that is a number", partial(record, workspace=0)),
    ("json", "no step", partial(record, steps=0)),
    ("json", "no entry of the adapter", partial(record, files={})),
    ("json", "files that are a list", partial(record, files=[])),
    ("json", "a file's name that is no text", partial(text, '"files": {', '"files": {"\\ud800": 1, ')),
    ("json", "a file's name with a terminal's codes", partial(record, files={"\x1b[2J": 1})),
    ("json", "a hash in capitals", lambda update: entry(update, sha256="A" * 64)),
    ("duplicate", "in update.json", partial(text, NUMBER, f"{NUMBER}, {NUMBER}")),
    ("duplicate", "deep in update.json", partial(text, '"bytes":', '"bytes": 1, "bytes":')),
    ("duplicate", "in the header", partial(contents, with_a_key_twice)),
    ("samples", "0", partial(record, num_samples=0)),
    ("samples", "-1", partial(record, num_samples=-1)),
    ("samples", "1.5", partial(record, num_samples=1.5)),
    ("samples", "1.0", partial(record, num_samples=1.0)),
    ("samples", "true", partial(record, num_samples=True)),
    ("samples", "null", partial(record, num_samples=None)),
    ("samples", "a text", partial(record, num_samples="7")),
    ("samples", "no text that UTF-8 could hold", partial(record, num_samples="\ud800")),
    ("samples", "a terminal's codes", partial(record, num_samples="\x1b[2J")),
    ("samples", "2^53 + 1", partial(record, num_samples=2**53 + 1)),
    ("samples", "10^30", partial(record, num_samples=10**30)),
    ("protocol", "2", partial(record, protocol=2)),
    ("workspace", "another", partial(record, workspace="ffffffffffffffff")),
    ("wrong_round", "the next", partial(record, round=1)),
    ("wrong_round", "a far one", partial(record, round=10**4000)),
    ("wrong_base", "another", partial(record, base="0" * 64)),
    ("wrong_client", "an honest one", partial(record, client=0)),
    ("hash", "of something else", lambda update: entry(update, sha256="0" * 64)),
    ("header", "nothing but it", partial(contents, lambda data: b"")),
    ("header", "of 200 MB by its length", partial(contents, lambda data: struct.pack("<Q", 200_000_000) + data[8:])),
    ("header", "of 2^64 - 1 bytes", partial(contents, lambda data: b"\xff" * 8 + data[8:])),
    ("header", "beyond the file", partial(contents, lambda data: struct.pack("<Q", len(data)) + data[8:])),
    ("header", "not JSON", partial(contents, lambda data: joined(b"{" * 100, split(data)[1]))),
    ("header", "not an object", partial(contents, lambda data: joined(b"[]", split(data)[1]))),
    ("header", "a million brackets", partial(contents, lambda data: joined(b"[" * 10**6, split(data)[1]))),
    ("header", "an overlap", partial(header, lambda tensors: tensors[1].update(data_offsets=[0, 1024]))),
    ("header", "a hole", partial(contents, with_a_hole)),
    ("header", "bytes left over", partial(contents, lambda data: data + b"\0\0\0\0")),
    ("header", "bytes missing", partial(contents, lambda data: data[:-4])),
    ("header", "offsets that run back", partial(header, lambda tensors: tensors[0].update(data_offsets=[1024, 0]))),
    ("header", "offsets below zero", partial(header, lambda tensors: tensors[0].update(data_offsets=[-4, 1020]))),
    ("header", "no offsets", partial(header, lambda tensors: tensors[0].pop("data_offsets"))),
    ("schema", "a tensor too many", partial(arrays, lambda tensors: tensors.update(more=np.zeros(1, np.float32)))),
    ("schema", "a tensor missing", partial(arrays, lambda tensors: tensors.popitem())),
    ("schema", "a path as name", partial(arrays, partial(renamed, "../../etc/passwd"))),
    ("schema", "an empty name", partial(arrays, partial(renamed, ""))),
    ("schema", "another shape", partial(header, lambda tensors: tensors[0].update(shape=[256]))),
    ("schema", "a shape of floats", partial(header, lambda tensors: tensors[0].update(shape=[4.0, 64.0]))),
    ("schema", "a shape of a megabyte", partial(header, lambda tensors: tensors[0].update(shape=[1] * 300_000))),
    ("schema", "I64", partial(arrays, partial(as_type, np.int64))),
    ("schema", "F64", partial(arrays, partial(as_type, np.float64))),
    ("schema", "a type that is a list", partial(header, lambda tensors: tensors[0].update(dtype=["F32"]))),
    ("nonfinite", "NaN", partial(arrays, partial(set_value, np.nan))),
    ("nonfinite", "inf", partial(arrays, partial(set_value, np.inf))),
    ("nonfinite", "-inf", partial(arrays, partial(set_value, -np.inf))),
    ("nonfinite", "inf in F16", partial(arrays, partial(set_half, np.inf))),
    ("nonfinite", "NaN in BF16", partial(arrays, partial(set_value, np.nan), write=as_bfloat16)),
]


@pytest.mark.parametrize(("code", "damage"), [(c, d) for c, _, d in CASES], ids=[f"{c}: {n}" for c, n, _ in CASES])
def test_a_bad_update_is_refused_with_its_code_and_the_rest_is_counted(small, monkeypatch, capsys, code, damage):
    for client in range(3):
        assert take_part(small, client)
    damage(update=small / "inbox" / str(BAD) / "round-00000")
    monkeypatch.chdir(small)
    assert main(["server", "aggregate", "--refuse-arriving"]) == 0
    assert f"refused client {BAD}: {code}: " in capsys.readouterr().out
    aggregation = read_manifest(small, 1)["aggregation"]
    assert [entry["client"] for entry in aggregation["counted"]] == [0, 2]
    assert [(entry["client"], entry["code"]) for entry in aggregation["refused"]] == [(BAD, code)]
    reason = aggregation["refused"][0]["reason"]
    # The manifest is read by everybody and printed on the operator's terminal: a stranger must not fill or steer it.
    assert reason.isprintable()
    assert 0 < len(reason) <= 1000
    assert main(["verify"]) == 0


@pytest.mark.parametrize("call", ["open", "fstat"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_an_update_is_refused_for_no_error_but_its_own(small, monkeypatch, call, depth):
    """Every errno, at the client's folder (1), the update's (2) or its record (3): trouble refuses nobody."""
    take_part(small, BAD)
    base = Federation.open(small).round()
    real, inbox = getattr(os, call), str(small / "inbox" / str(BAD))
    broken = (inbox, f"{inbox}/round-00000", f"{inbox}/round-00000/update.json")[depth - 1]
    own = {errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EACCES, *([errno.ENOENT] if depth == 3 else [])}
    for number in sorted(errno.errorcode):

        def fail(*arguments, number=number, **options):
            if call == "fstat":
                where = os.readlink(f"/proc/self/fd/{arguments[0]}")
            else:
                parent = options.get("dir_fd")
                where = os.path.join("" if parent is None else os.readlink(f"/proc/self/fd/{parent}"), arguments[0])
            if where == broken:
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            if call == "open" and number in own:
                with pytest.raises(Refusal) as refused:
                    read_update(base, BAD)
                assert refused.value.code == "not_regular"
            elif call == "open" and number == errno.ENOENT:
                assert read_update(base, BAD) is None
            else:
                with pytest.raises(WorkspaceError, match=re.escape(os.strerror(number))):
                    read_update(base, BAD)


TROUBLE = ("ETIMEDOUT", "ENOTCONN", "EHOSTDOWN", "EKEYEXPIRED", "EUCLEAN", "EBADMSG", "EBUSY", "EREMOTEIO", "ENOMEM")


@pytest.mark.parametrize("name", TROUBLE)
@pytest.mark.parametrize("call", ["open", "fstat", "fdopen"])
def test_a_machine_in_trouble_publishes_no_round_without_an_update(small, monkeypatch, capsys, name, call):
    monkeypatch.chdir(small)
    for client in range(3):
        take_part(small, client)
    real = getattr(os, call)

    def fail(*_):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    def fail_at_update(file, *arguments, **options):
        where = file if call == "open" else os.readlink(f"/proc/self/fd/{file}")
        if not (("dir_fd" in options or "/inbox/" in str(where)) and str(where).endswith(ADAPTER)):
            return real(file, *arguments, **options)
        return nullcontext(SimpleNamespace(read=fail, readinto=fail, seek=fail)) if call == "fdopen" else fail()

    monkeypatch.setattr(os, call, fail_at_update)
    assert main(["server", "aggregate", "--partial", "--json"]) == 4
    error = json.loads(capsys.readouterr().out)["error"]["message"]
    assert os.strerror(getattr(errno, name)) in error
    assert not (small / "rounds/00001").exists()
    monkeypatch.undo()
    assert main(["server", "aggregate", "-w", str(small)]) == 0
    assert [entry["client"] for entry in read_manifest(small, 1)["aggregation"]["counted"]] == [0, 1, 2]


def test_the_cases_cover_every_code_of_the_page():
    table = PAGE.read_text().split("## Refused updates")[1].split("## Locks")[0]
    documented = set(re.findall(r"\| `([a-z_]+)` \|$", table, re.MULTILINE))
    # tests/test_signatures.py, test_private_rows.py, test_unequal.py, test_client_clusters.py
    elsewhere = {"unsigned", "signature", "unenrolled", "privacy", "steps", "wrong_cluster"}
    assert (
        documented - elsewhere
        == {code for code, _, _ in CASES}
        == set(get_args(RefusalCode)) - {"unknown_client"} - elsewhere
    )


def test_discarding_through_a_linked_inbox_leaves_the_other_clients_update(small, monkeypatch):
    for client in (0, 2):
        take_part(small, client)
    (small / "inbox" / str(BAD)).symlink_to("2")
    monkeypatch.chdir(small)
    main(["server", "discard", "--id", str(BAD)])
    assert (small / "inbox" / "2" / "round-00000" / "update.json").exists()


def test_ids_outside_the_cohort_are_never_looked_at(small, monkeypatch):
    take_part(small, 0)
    for name in ("3", "01", "x"):
        os.mkfifo(small / "inbox" / name)
    configure(small, "federation.quorum=0.1")
    monkeypatch.chdir(small)
    assert main(["server", "aggregate", "--refuse-arriving"]) == 0
    aggregation = read_manifest(small, 1)["aggregation"]
    assert (aggregation["refused"], aggregation["missing"]) == ([], [1, 2])


ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.full(4, -0.5, np.float32)}
SCHEMA = schema_of(ARRAYS)
EDITS = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert"]), st.integers(0, 2**16), st.integers(0, 255)),
    min_size=1,
    max_size=6,
)


def attempt(read: Callable[..., object], *arguments: object) -> object:
    """Return what a reader returns, or its Refusal; any other exception is a crash that would stop a round."""
    try:
        return read(*arguments)
    except Refusal as refusal:
        return refusal


@settings(max_examples=500, deadline=None)
@given(edits=EDITS, half=st.booleans())
def test_decode_refuses_damaged_bytes_or_returns_finite_arrays_of_the_schema(edits, half):
    halves = {name: array.astype(np.float16) for name, array in ARRAYS.items()}
    data = bytearray(save(halves) if half else encode(ARRAYS))
    for kind, position, value in edits:
        position %= len(data) + 1
        if kind == "flip":
            data[position : position + 1] = bytes([value])
        elif kind == "insert":
            data[position:position] = bytes([value] * (1 + value % 8))
        else:
            del data[position : position + 1 + value % 8]
    result = attempt(decode, bytes(data), SCHEMA)
    if isinstance(result, Refusal):
        assert result.code in {"header", "duplicate", "schema", "nonfinite"}
    else:
        assert {name: array.shape for name, array in result.items()} == {"a": (2, 3), "b": (4,)}
        assert all(np.isfinite(array).all() for array in result.values())


VALID = {
    "protocol": 1,
    "workspace": "w",
    "round": 0,
    "base": "0" * 64,
    "client": 0,
    "num_samples": 1,
    "steps": 1,
    "train_loss": None,
    "files": {ADAPTER: {"sha256": "0" * 64, "bytes": 1}},
}
# JSON can spell lone surrogates (\ud800), which no UTF-8 file can hold: a reader must survive them.
TEXT = st.text(max_size=5) | st.sampled_from(["\ud800", "a\udfff"])
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(TEXT, values, max_size=3),
    max_leaves=5,
)


@settings(max_examples=500, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(sorted(VALID)), JSON_VALUES, min_size=1, max_size=3))
def test_whatever_update_json_holds_it_is_read_or_refused_with_a_reason_that_a_manifest_can_hold(changes):
    result = attempt(parse_update_record, json.dumps(VALID | changes).encode())
    if isinstance(result, Refusal):
        assert result.code in {"json", "samples"}
        assert RefusedUpdate(client=0, code=result.code, reason=result.reason).to_bytes()
    else:
        assert 1 <= result.num_samples <= 2**53


def test_an_encoded_adapter_has_the_bytes_that_safetensors_writes():
    names = ["b", "a", 'é\n\u001f\u007f"\\/', "\uffff", "\U00010000"]
    arrays = {name: np.full((number, 3), number, np.float32) for number, name in enumerate(names)}
    for some in ({}, arrays, {"scalar": np.float32(3).reshape(())}, {"turned": np.eye(2, 5, dtype=np.float32).T}):
        contiguous = {name: np.ascontiguousarray(array) for name, array in some.items()}
        assert encode(some) == save(contiguous, metadata={"format": "pt"})
