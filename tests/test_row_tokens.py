"""The cache of tokenised rows: that it holds, and everything that must end it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from fedcli.client.row_tokens import read_encoded
from fedcli.config import Config
from fedcli.data.encoding import Encoder
from fedcli.data.source import Source
from fedcli.errors import ConfigError
from fedcli.model.base import find_base, fingerprint
from fedcli.model.loading import load_tokenizer
from fedcli.parties.party import Party
from fedcli.server.open_round import train_record
from fedcli.workspace.layout import Home

BASE = find_base("builtin:tiny", revision=None, root=Path.cwd())
SFT = [{"instruction": f"say {n}", "output": f"it is {n}", "input": ""} for n in range(5)]
DPO = [{"prompt": f"say {n}", "chosen": f"it is {n}", "rejected": "no"} for n in range(5)]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(load_tokenizer(BASE, trust_remote_code=False))


class Reader:
    """A client's rows, and how many rows were tokenised by a call."""

    def __init__(self, folder: Path, encoder: Encoder, rows: list[dict], task: str = "sft") -> None:
        self.path, self.home, self.encoder, self.task = folder / "rows.jsonl", Home(folder / "home"), encoder, task
        self.write(rows)
        self.num_read = 0

    def write(self, rows: list[dict]) -> None:
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def __call__(self, base: str = "", **changes: object):
        train = train_record(Config(), 0, 1).model_copy(update=changes)
        party = Party(0, self.home, Source(self.path), "alpaca" if self.task == "sft" else "preference")
        self.num_read = 0

        def count(more: int) -> None:
            self.num_read += more

        rows, num_usable = read_encoded(
            party, self.encoder, self.task, train, fingerprint=base or fingerprint(BASE), on_rows=count
        )
        return rows, num_usable

    def files(self) -> list[Path]:
        return sorted(self.home.folder.glob("*"))


def same(one, other) -> bool:
    """Return whether two sets of encoded rows have the same token ids, marks and counts."""
    arrays, others = one.arrays(), other.arrays()
    return arrays.keys() == others.keys() and all(np.array_equal(arrays[name], others[name]) for name in arrays)


@pytest.mark.parametrize(("task", "rows"), [("sft", SFT), ("dpo", DPO)])
def test_rows_are_tokenised_once(tmp_path: Path, encoder: Encoder, task: str, rows: list[dict]) -> None:
    read = Reader(tmp_path, encoder, [*rows, {"instruction": "no answer", "prompt": "none"}], task)
    first, num_usable = read()
    assert (len(first), num_usable, first.left_out.total()) == (5, 5, 1)
    assert read.num_read > 0
    again, again_usable = read()
    assert read.num_read == 0
    assert same(first, again)
    assert (again.left_out, again.num_truncated, again_usable) == (first.left_out, first.num_truncated, num_usable)


def test_the_cache_is_for_its_owner_alone(tmp_path: Path, encoder: Encoder) -> None:
    read = Reader(tmp_path, encoder, SFT)
    read()
    (kept,) = read.files()
    assert kept.stat().st_mode & 0o777 == 0o600


def test_other_rows_of_the_same_size_and_time_are_tokenised_anew(tmp_path: Path, encoder: Encoder) -> None:
    read = Reader(tmp_path, encoder, SFT)
    first, _ = read()
    status = read.path.stat()
    read.write([row | {"output": row["output"].replace("it", "he")} for row in SFT])
    os.utime(read.path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert read.path.stat().st_size == status.st_size
    other, _ = read()
    assert read.num_read == 5
    assert not same(first, other)
    assert len(read.files()) == 1, "what was kept before is gone"


@pytest.mark.parametrize(
    "change",
    [{"max_length": 12}, {"template": "vicuna"}, {"seed": 5}, {"base": "f" * 64}],
    ids=lambda change: str(change),
)
def test_whatever_token_ids_follow_from_ends_the_cache(tmp_path: Path, encoder: Encoder, change: dict) -> None:
    read = Reader(tmp_path, encoder, SFT)
    read()
    read(**change)
    assert read.num_read == 5
    read(**change)
    assert read.num_read == 0
    assert len(read.files()) == 1


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "junk"])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, encoder: Encoder, damage: str) -> None:
    read = Reader(tmp_path, encoder, SFT)
    first, _ = read()
    (kept,) = read.files()
    contents = bytearray(kept.read_bytes())
    if damage == "flip":
        contents[-3] ^= 1
    kept.write_bytes({"cut": contents[:-9], "flip": contents, "empty": b"", "junk": b"x" * 99}[damage])
    again, _ = read()
    assert read.num_read == 5
    assert same(first, again)
    assert read.files()[0].read_bytes() != contents[:-9]
    read()
    assert read.num_read == 0


def test_rows_that_are_gone_are_an_error_in_spite_of_the_cache(tmp_path: Path, encoder: Encoder) -> None:
    read = Reader(tmp_path, encoder, SFT)
    read()
    read.path.unlink()
    with pytest.raises(ConfigError, match=r"rows\.jsonl"):
        read()


def test_a_disk_that_refuses_the_cache_only_costs_time(tmp_path: Path, encoder: Encoder) -> None:
    read = Reader(tmp_path, encoder, SFT)
    read.home.folder.write_text("a file where the home should be")
    first, _ = read()
    again, _ = read()
    assert read.num_read == 5
    assert same(first, again)
