"""Runs code that a model wrote where it can touch nothing.

bubblewrap (bwrap) gives each program its own user, mount, process, network and message namespaces: it sees the Python
installation and the system's libraries, read-only, and one empty folder; no home, no workspace, no network, no other
process. Its environment is `ENVIRONMENT`; `sandbox_child` limits its memory, processes, files, output and time.

Tests run in a second sandbox of the same kind (`Checks`). The program sees neither them nor what they compare with, and
only plain values come out of it. Whether the tests got to their end is told by a token that only their side knows. A
program without `Checks` carries its own tests, as those of DS-1000 do; one that looks for the token in its own process
can find it. Ending early is no way to pass.
"""

import inspect
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import BinaryIO, Literal, Protocol, TypeAlias

from fedcli.errors import RequirementError
from fedcli.eval import sandbox_child, sandbox_runner
from fedcli.eval.sandbox_child import FILE_BYTES, HOME, HOME_BYTES

Outcome: TypeAlias = Literal["passed", "failed", "timed out", "too much memory", "too much output"]
NOBODY = 65534
"""The user and the group of a program, as it sees them; on the machine too where root starts it."""
ENVIRONMENT = {
    "HOME": HOME,
    "LANG": "C.UTF-8",
    "MPLBACKEND": "Agg",
    "MPLCONFIGDIR": HOME,
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PATH": "/usr/bin:/bin",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",
    "TMPDIR": HOME,
}
MOST_WORKERS = 4
SHOWN_BYTES = 2000
"""Of the end of a program's output."""
_GRACE = 30.0
"""Seconds after a program's own time in which its sandbox must have ended."""
_OUTCOMES: dict[int, Outcome] = {
    sandbox_child.SUCCEEDED: "failed",  # it has ended, but not at its end
    sandbox_child.FAILED: "failed",
    sandbox_child.TIMED_OUT: "timed out",
    sandbox_child.OUT_OF_MEMORY: "too much memory",
}
_PROBE = f"""
import os, socket, time
assert os.getuid() == {NOBODY}, "the user is still the same"
assert [name for _, name in socket.if_nameindex()] in ([], ["lo"]), "there are network interfaces"
assert not any(os.access(path, os.W_OK) for path in ("/", "/usr", "/proc/sys/kernel")), "the system can be written"
try:
    for _ in range({2 * sandbox_child.NUM_PROCESSES}):
        if not os.fork():
            time.sleep(60)
except BlockingIOError:
    pass
else:
    raise SystemExit("processes are not limited")
"""


@dataclass(frozen=True)
class Checks:
    """What judges a program from outside: `source` runs behind `setup`, with these `names` of the program's."""

    source: str
    names: tuple[str, ...]
    setup: str = ""


@dataclass(frozen=True)
class Program:
    """A Python program, how long it may run, and its tests where it does not carry them itself."""

    source: str
    seconds: float = 10.0
    tests: Checks | None = None


@dataclass(frozen=True)
class Run:
    """How a program ended, with the end of its output; it passed if its last line, or its tests', was reached."""

    outcome: Outcome
    output: str

    @property
    def passed(self) -> bool:
        """Whether it got to its end."""
        return self.outcome == "passed"


class CodeRunner(Protocol):
    """Runs programs, each in a sandbox of its own."""

    def run_all(self, programs: Sequence[Program]) -> list[Run]:
        """Run programs, some at once, and return how each ended, in order."""


class _BrokenError(Exception):
    """The sandbox could not be made."""


class Sandbox:
    """Runs programs in bubblewrap.

    Making one tries it out; raises RequirementError where bubblewrap is missing or this machine does not let it work.
    """

    def __init__(self) -> None:
        bubblewrap = shutil.which("bwrap")
        if sys.platform != "linux" or bubblewrap is None:
            raise _refused("bubblewrap (bwrap) is not installed")
        self._bubblewrap = bubblewrap
        self._child, self._runner = map(inspect.getsource, (sandbox_child, sandbox_runner))
        self._workers = min(len(os.sched_getaffinity(0)), MOST_WORKERS)
        self._lock = Lock()
        self._running: set[subprocess.Popen[bytes]] | None = set()
        """None while a call of `run_all` is given up."""
        try:
            probe = self._run(Program(_PROBE))
        except _BrokenError as error:
            raise _refused(str(error)) from error
        if not probe.passed:
            raise _refused(_last_line(probe.output) or probe.outcome)

    def run_all(self, programs: Sequence[Program]) -> list[Run]:
        """Run programs, some at once, and return how each ended, in order.

        No process of theirs is left when it returns. Raises RequirementError where no sandbox can be made any more.
        """
        try:
            with ThreadPoolExecutor(self._workers) as pool:
                try:
                    return list(pool.map(self._run, programs))
                except BaseException:  # an interrupt, too: a thread may have begun another program since
                    pool.shutdown(wait=False, cancel_futures=True)
                    self._kill_all()
                    raise
        except _BrokenError as error:
            raise _refused(str(error)) from error
        finally:
            self._running = set()

    def _kill_all(self) -> None:
        """End what runs, and let nothing else begin."""
        with self._lock:
            running, self._running = self._running, None
        for process in running or ():
            process.kill()

    def _run(self, program: Program) -> Run:
        source, seconds, tests = program.source.encode(errors="replace"), program.seconds, program.tests
        with ExitStack() as stack:
            if tests is None:
                return self._ended(stack.enter_context(self._started("whole", source, seconds)), seconds)
            to_program, to_tests = os.pipe(), os.pipe()
            texts = json.dumps([tests.setup, tests.names, tests.source]).encode()
            try:
                served = stack.enter_context(self._started("serve", source, seconds, to_program[0], to_tests[1]))
                judge = stack.enter_context(self._started("judge", texts, seconds, to_tests[0], to_program[1]))
            finally:
                for end in (*to_program, *to_tests):
                    os.close(end)
            judged = self._ended(judge, seconds)
            if judge.process.returncode != sandbox_child.GONE:
                served.process.kill()
            found = self._ended(served, seconds)
            outcome = found.outcome if judge.process.returncode == sandbox_child.GONE else judged.outcome
            return Run(outcome, (found.output + judged.output)[-SHOWN_BYTES:])

    @contextmanager
    def _started(self, role: str, contents: bytes, seconds: float, *descriptors: int) -> Iterator["_Started"]:
        """Yield the process of a sandbox; raise _BrokenError while all is given up."""
        token = b"" if role == "serve" else secrets.token_hex().encode()
        with open(os.memfd_create("output"), "w+b") as output, open(os.memfd_create("problem"), "w+b") as problem:
            with self._lock:
                if self._running is None:
                    raise _BrokenError("it was interrupted")
                process = subprocess.Popen(
                    self._command(str(seconds), self._runner, role, *map(str, descriptors)),
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=problem,
                    pass_fds=descriptors,
                    env=ENVIRONMENT | _libraries(),
                    cwd="/",
                )
                self._running.add(process)
            with process:
                try:
                    assert process.stdin is not None
                    with suppress(BrokenPipeError), process.stdin as stdin:
                        stdin.write(token + b"\n" + contents)
                    yield _Started(process, output, problem, token)
                finally:
                    process.kill()
            with self._lock:
                if self._running is not None:
                    self._running.discard(process)

    def _ended(self, started: "_Started", seconds: float) -> Run:
        """Wait for the end of a sandbox and return what became of its program."""
        try:
            status = started.process.wait(seconds + _GRACE)
        except subprocess.TimeoutExpired:
            started.process.kill()
            return Run("timed out", "")
        if (problem := _end_of(started.problem, SHOWN_BYTES)) and self._running is not None:
            raise _BrokenError(_last_line(problem))
        text, token = _end_of(started.output, SHOWN_BYTES + len(started.token)), started.token.decode()
        if token and status == sandbox_child.SUCCEEDED and text.endswith(token):
            return Run("passed", text.removesuffix(token))
        outcome = _OUTCOMES.get(status, "failed")  # another status: the machine has killed the watcher
        is_flood = outcome == "failed" and os.fstat(started.output.fileno()).st_size >= FILE_BYTES
        return Run("too much output" if is_flood else outcome, text)

    def _command(self, *arguments: str) -> list[str]:
        paths = visible_paths()
        child = [sys.executable, "-S", "-c", self._child, *arguments]
        command = [self._bubblewrap, *_walls(paths), "--", *child]
        if os.geteuid() != 0 or not _has_user(NOBODY):
            return command
        # root may fork without limit, so it becomes another user first, who sees no more than what a program sees
        outside = ["--unshare-pid", "--die-with-parent", "--dir", HOME]
        outside += ["--dev-bind", "/proc", "/proc", "--dev-bind", "/dev", "/dev"]
        become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
        return [self._bubblewrap, *outside, *_binds(paths), "--", *become, *command]


@dataclass(frozen=True)
class _Started:
    """A sandbox that runs: its process, what its program writes, what is wrong with it, and its token."""

    process: subprocess.Popen[bytes]
    output: BinaryIO
    problem: BinaryIO
    token: bytes


def _end_of(file: BinaryIO, size: int) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - size))
    return file.read().decode(errors="replace")


def visible_paths() -> list[str]:
    """Return what a program may read: the system's programs and libraries, and this Python with its packages."""
    python = (sys.prefix, sys.base_prefix)
    home = Path(os.path.expanduser("~"))
    libraries = [path for path in _libraries().get("LD_LIBRARY_PATH", "").split(":") if not home.is_relative_to(path)]
    wanted = {"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/alternatives", "/etc/ld.so.cache"}
    wanted |= {path for path in (*python, *map(os.path.realpath, python), *libraries) if os.path.isabs(path)}
    shown: list[str] = []
    for path in sorted(filter(os.path.exists, map(os.path.normpath, wanted))):
        if not any(Path(path).is_relative_to(other) for other in shown):
            shown.append(path)
    return shown


def _libraries() -> dict[str, str]:
    """Return the variable without which a Python of environment modules does not start."""
    return {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}


def _walls(paths: Sequence[str]) -> list[str]:
    """Return bubblewrap's options for a sandbox in which a program sees `paths`."""
    # --as-pid-1: the watcher is the first process, which no program can kill or look into, as bubblewrap's own can be
    options = ["--unshare-user", "--unshare-all", "--disable-userns", "--die-with-parent", "--as-pid-1"]
    options += ["--cap-drop", "ALL", "--new-session"]
    options += ["--uid", str(NOBODY), "--gid", str(NOBODY), "--proc", "/proc", "--dev", "/dev"]
    options += ["--size", str(HOME_BYTES), "--tmpfs", HOME, *_binds(paths)]
    return [*options, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", HOME]


def _binds(paths: Sequence[str]) -> list[str]:
    """Return bubblewrap's options that show `paths`, read-only; a link in the root folder (/bin) stays one."""
    options: list[str] = []
    for path in paths:
        folders = [str(folder) for folder in reversed(Path(path).parents)][1:]
        for folder in folders:
            options += ["--dir", folder]  # bubblewrap's own may be closed to nobody
        is_link = not folders and os.path.islink(path)
        options += ["--symlink", os.readlink(path), path] if is_link else ["--ro-bind", path, path]
    return options


def _has_user(number: int) -> bool:
    """Return whether a user exists in this process's user namespace."""
    with open("/proc/self/uid_map") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    return any(first <= number < first + count for first, _, count in ranges)


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def _refused(reason: str) -> RequirementError:
    return RequirementError(
        f"this machine cannot run code in a sandbox: {reason}",
        hint="Install bubblewrap 0.8 or later (on Debian: apt-get install bubblewrap), and let users make user "
        "namespaces (sysctl user.max_user_namespaces and, where there is one, "
        "kernel.apparmor_restrict_unprivileged_userns; in a container, allow unshare and mount). Without "
        "--allow-code-execution the answers are kept, and no code is run.",
    )
