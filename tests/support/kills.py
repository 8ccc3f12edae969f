"""SIGKILL at any system call that changes the disk, of work that is done in a forked child."""

import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

CALLS = ("open", "write", "fsync", "close", "mkdir", "chmod", "fchmod", "rename", "replace", "link", "unlink", "rmdir")


def die() -> None:
    """Leave as a process does that the kernel kills for memory: no handler, no finally."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(position: int, after: bool) -> None:
    """Let this process die before or after its `position`-th call; before a write, half of it is done (a torn one)."""
    calls = 0

    def wrap(name: str, call: Callable) -> Callable:
        def counted(*arguments, **options):
            nonlocal calls
            calls += 1
            mine = calls
            if mine == position and not after:
                if name == "write":
                    call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                die()
            try:
                return call(*arguments, **options)
            finally:
                if mine == position:
                    die()

        return counted

    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))


def fork(work: Callable[[], object]) -> int:
    """Do some work in a forked child; return its process id. It exits with 0, or with 3 after an exception."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(3)
        os._exit(0)
    return child


def was_killed(child: int) -> bool:
    """Wait for a child; return whether it was killed. It must not fail in any other way."""
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def copies_killed_at_every_call(
    template: Path, operation: Callable[[Path], object], after: bool, stride: int = 1
) -> Iterator[Path]:
    """Yield copies of a workspace in which an operation was killed at its 1st, 2nd, ... call, until it survives.

    With a `stride` only every so many calls are tried.
    """
    position = 1 - stride
    while True:
        position += stride
        workspace = template.parent / "killed"
        shutil.rmtree(workspace, ignore_errors=True)
        shutil.copytree(template, workspace)

        def work(workspace: Path = workspace, position: int = position) -> None:
            arm(position, after)
            operation(workspace)

        if not was_killed(fork(work)):
            return
        yield workspace
