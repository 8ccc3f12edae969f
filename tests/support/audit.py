"""Which code of fedcli touches which file of a workspace: audit events, and the calls that have none, of one command.

Run in a process of its own: an audit hook cannot be removed.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import fedcli
from support.processes import warm

PACKAGE = str(Path(fedcli.__file__).parent)
PATHS: dict[str, tuple[tuple[int, int | None], ...]] = {
    "open": ((0, None),),
    "os.listdir": ((0, None),),
    "os.scandir": ((0, None),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.utime": ((0, 3),),
    "os.truncate": ((0, None),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
}
"""Where an event's arguments have a path, and the folder's descriptor that it is relative to."""
WITHOUT_EVENT = ("stat", "lstat", "access", "readlink", "statvfs", "open")
"""Calls of os without an audit event; that of `open` does not say which folder a path is relative to."""
_proc_link = os.readlink


@dataclass(frozen=True)
class Touch:
    """A file of the workspace that was touched, and the innermost line of fedcli that did it."""

    event: str
    path: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.event} {self.path}"


@dataclass(frozen=True)
class Watched:
    """How a command ended, and what it touched."""

    exit_code: int
    touches: list[Touch]


def watched(workspace: Path, *arguments: object, log: Path, **environment: str) -> Watched:
    """Run a command in a process that watches a workspace, from a folder outside it."""
    code = (
        "from support.audit import run_watched\n"
        f"run_watched({str(workspace)!r}, {str(log)!r}, {list(map(str, arguments))!r})"
    )
    done = warm()("-c", code, cwd=log.parent, environment={"FEDCLI_WORKSPACE": str(workspace)} | environment)
    assert done.returncode == 0, done.stderr
    exit_code, touches = json.loads(log.read_bytes())
    assert exit_code != 1, done.stderr
    return Watched(exit_code, [Touch(*touch) for touch in touches])


def run_watched(workspace: str, log: str, arguments: list[str]) -> None:
    """Run a command in this process, and write its exit code and its touches to a file."""
    from fedcli.cli import main

    root, touches = os.path.realpath(workspace), []

    def touched(event: str, path: Any, folder: Any) -> None:
        if isinstance(path, int) or path is None:  # what is open already
            return
        full = os.fsdecode(path)
        if isinstance(folder, int) and folder >= 0 and not os.path.isabs(full):
            full = os.path.join(_proc_link(f"/proc/self/fd/{folder}"), full)
        full = os.path.normpath(os.path.join(os.getcwd(), full))
        frame = _innermost(sys._getframe(2))
        if frame is not None and (full.startswith(f"{root}/") or (full == root and event == "os.listdir")):
            file = os.path.relpath(frame.f_code.co_filename, os.path.dirname(PACKAGE))
            touches.append((event, os.path.relpath(full, root), file, frame.f_lineno))

    def hook(event: str, values: tuple[Any, ...]) -> None:
        for path, folder in PATHS.get(event, ()):
            touched(event, values[path], values[folder] if folder is not None and folder < len(values) else None)

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def seen(path: Any, *positional: Any, dir_fd: int | None = None, **options: Any) -> Any:
            if name != "open" or dir_fd is not None:
                touched(f"os.{name}", path, dir_fd)
            return call(path, *positional, **options, **({} if dir_fd is None else {"dir_fd": dir_fd}))

        return seen

    for name in WITHOUT_EVENT:
        call = getattr(os, name)
        replacement = wrapped(name, call)
        for capable in (os.supports_dir_fd, os.supports_follow_symlinks, os.supports_fd, os.supports_effective_ids):
            if call in capable:
                capable.add(replacement)
        setattr(os, name, replacement)
    sys.addaudithook(hook)
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = ended.code
    Path(log).write_text(json.dumps([code, touches]))


def _innermost(frame: FrameType | None) -> FrameType | None:
    while frame is not None and not frame.f_code.co_filename.startswith(f"{PACKAGE}/"):
        frame = frame.f_back
    return frame
