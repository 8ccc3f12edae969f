"""Commands in which one system call fails, or at which they are killed: failing_calls.c in front of libc."""

import errno
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from support.processes import ENVIRONMENT
from support.warm import Warm

SOURCE = Path(__file__).with_name("failing_calls.c")
BEFORE, AFTER, KILL_BEFORE, KILL_AFTER = range(4)
"""When a call fails, or its process dies: before the call is done, or when it has been."""
FAILURES = ("ENOSPC", "EDQUOT", "EIO", "EACCES", "EROFS", "ESTALE", "ETIMEDOUT", "EINTR", "EBUSY", "ENOTCONN")
OF_AN_UPDATE = (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EACCES)
"""What opening an update may fail with by the fault of whoever dropped it."""
RUN = """
import ctypes, os, sys
calls = ctypes.CDLL(None)
log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
from fedcli.cli import main
try:
    import torch; torch.set_num_threads(1)
except ImportError:
    pass
calls.shift_clock(ctypes.c_long({clock}))
calls.call_fail({root!r}.encode(), {position}, {failure}, {mode}, {sticky}, log, {data})
code = main({arguments!r})
calls.calls_counted()
sys.stdout.flush(); sys.stderr.flush()
os._exit(code)
"""


@functools.cache
def library() -> Path:
    """Compile failing_calls.c; return the library."""
    made = Path(tempfile.mkdtemp(prefix="fedcli-faults-")) / "failing_calls.so"
    command = ["gcc", "-O1", "-shared", "-fPIC", "-o", made, SOURCE, "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return made


@functools.cache
def warm() -> Warm:
    """Return the process that forks commands with failing_calls.c in front of libc."""
    return Warm([sys.executable], ENVIRONMENT | {"LD_PRELOAD": str(library())})


@dataclass(frozen=True)
class Fault:
    """What happens to the `position`-th call (0: to none), and with `sticky` to all behind it."""

    position: int = 0
    failure: int = 0
    mode: int = BEFORE
    sticky: bool = False
    clock: int = 0
    """Seconds by which the clock is ahead."""


@dataclass(frozen=True)
class Done:
    """How a command ended, what it said, and its calls: names, paths and second paths."""

    code: int
    out: str
    err: str
    calls: list[list[str]]


def run(arguments: Sequence[object], root: Path, fault: Fault = Fault(), *, data: bool = False) -> Done:  # it is frozen
    """Run a command in a folder, with a fault in a call that touches what lies below it."""
    log = root.with_name(root.name + ".calls")
    code = RUN.format(
        log=str(log), root=str(root), arguments=list(map(str, arguments)), position=fault.position,
        failure=fault.failure, mode=fault.mode, sticky=int(fault.sticky), clock=fault.clock, data=int(data),
    )  # fmt: skip
    done = warm()("-c", code, cwd=root)
    calls = [line.split("\t") for line in log.read_text().splitlines()]
    return Done(done.returncode, done.stdout, done.stderr, calls)


LOCKS = re.compile(r"(server|baseline|)\.?lock|\.[^/]*\.lock")
_TIME = re.compile(
    rb'"(created|seconds|tokens_per_second|num_generated_tokens|checksum)": [^,\n]*|"opened": [0-9.]+'
    rb"|\d{4}-\d\d-\d\d \d\d:\d\d UTC"
)


def snapshot(root: Path, ids: Sequence[bytes] = ()) -> dict[str, str]:
    """Return the hash of every file below a folder by name, locks aside; of moments, checksums and `ids` nothing.

    `fedcli verify` checks the checksums, which cover moments and ids.
    """
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_dir() or LOCKS.fullmatch(path.name):
            continue
        contents = path.read_bytes()
        if path.suffix in (".json", ".html", ".md", ".yaml", ".jsonl"):
            contents = _TIME.sub(b"", contents)
            for known in ids:
                contents = contents.replace(known, b"ID")
        name = re.sub(r"(\.discarded-round-\d+)-[0-9a-f]{8}", r"\1", path.relative_to(root).as_posix())
        found[name] = hashlib.sha256(contents).hexdigest()
    return found


def copied(template: Path, place: Path) -> Path:
    """Return a fresh copy of a folder under one name."""
    shutil.rmtree(place, ignore_errors=True)
    return Path(shutil.copytree(template, place, symlinks=True))


def recorded(file: str, name: str, counts: dict[str, int], problems: list[str]) -> None:
    """Print what came of a campaign; with $FEDCLI_RECORD=DIR keep it there, too."""
    print(f"{name}: {counts}")
    if folder := os.environ.get("FEDCLI_RECORD"):
        path = Path(folder) / file
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | {name: counts | {"problems": problems}}, indent=1))
