"""Locks: who asks about one does not keep others from it."""

import os
import signal
from pathlib import Path

import pytest

from fedcli.errors import BusyError
from fedcli.workspace.locks import hold, is_held


def test_whoever_asks_about_a_lock_in_a_tight_loop_keeps_nobody_from_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold(path, "a test"):
        assert is_held(path)
    children = []
    for _ in range(2):
        children.append(os.fork())
        if not children[-1]:
            while True:
                is_held(path)
    try:
        for _ in range(1000):
            with hold(path, "a test"):
                pass
        with hold(path, "a test"):
            assert is_held(path)
            with pytest.raises(BusyError, match="another process is busy with a test: pid "), hold(path, "a test"):
                pass
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert not is_held(path)
    assert not is_held(tmp_path / "none")
