"""What killed writers leave on an SFTP server, and folders that are removed while another process writes there."""

import os
import time
from pathlib import Path

import pytest
from support.object_stores import new_objects

from fedcli.stores import sftp
from fedcli.workspace.object_store import ObjectStore


def test_leftovers_of_a_day_ago_are_swept_and_a_folder_that_vanishes_is_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objects = new_objects("sftp", monkeypatch)
    place = Path("/" + objects.address.partition("//")[2].partition("/")[2])
    for name in ("inbox/3/round-00000/adapter.bin", "clients/3.json"):
        objects.put(name, b"x")
        old, new = ((place / name).with_name(f".tmp-{age}") for age in ("old", "new"))
        for path in (old, new):
            path.write_bytes(b"half")
        os.utime(old, (time.time() - 90_000,) * 2)
    ObjectStore(objects).sweep("inbox/3")
    assert sorted(path.name for path in place.rglob(".tmp-*")) == [".tmp-new", ".tmp-new", ".tmp-old"]
    ObjectStore(objects).sweep_abandoned()
    assert sorted(path.name for path in place.rglob(".tmp-*")) == [".tmp-new", ".tmp-new"]

    objects.put("rounds/00001/adapter/x", b"x")
    objects.delete("rounds/00001/adapter/x")
    assert [path.name for path in (place / "rounds").iterdir()] == []

    make, removed = sftp._make_folder, []

    def remove_once(connection, folder: str) -> None:
        make(connection, folder)
        if folder.endswith("round-00000") and not removed:
            removed.append(folder)
            os.rmdir(folder)

    monkeypatch.setattr(sftp, "_make_folder", remove_once)
    assert objects.create("inbox/4/round-00000/update.json", b"{}")
    assert removed
    assert objects.get("inbox/4/round-00000/update.json", 10) == b"{}"
