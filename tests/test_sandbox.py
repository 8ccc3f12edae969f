"""Hostile programs in the sandbox: each ends, nothing outside is touched, and none passes before its end."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedcli
from fedcli.errors import RequirementError
from fedcli.eval.sandbox import ENVIRONMENT, Program, Run, Sandbox
from fedcli.eval.sandbox_child import FILE_BYTES, HOME_BYTES, NUM_PROCESSES

REPOSITORY = Path(__file__).parents[1]
NO_SANDBOX = "no sandbox on this machine"


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox()
    except RequirementError as error:
        pytest.skip(f"{NO_SANDBOX}: {error.message}")


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the same user, outside."""
    with subprocess.Popen(["sleep", "300"]) as process:
        yield process
        process.kill()


def environment() -> dict[str, str]:
    """Return what a process of the test needs to import fedcli."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def run(sandbox: Sandbox, source: str, seconds: float = 10) -> Run:
    return sandbox.run_all([Program(source, seconds)])[0]


def last_line(found: Run) -> str:
    return found.output.strip().rpartition("\n")[2]


def new_name() -> str:
    """Return a name by which processes can be found; `NAMED` gives it to a program and all that it starts."""
    return f"fed-{secrets.token_hex(5)}"


NAMED = "open('/proc/self/comm', 'w').write({!r})\n"


def processes(name: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == name:
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def test_a_program_that_gets_to_its_end_passes(sandbox: Sandbox) -> None:
    assert run(sandbox, "print('done')") == Run("passed", "done\n")
    assert run(sandbox, "print('no end of line', end='')") == Run("passed", "no end of line")
    assert run(sandbox, "") == Run("passed", "")


def test_programs_are_answered_in_their_order(sandbox: Sandbox) -> None:
    programs = [Program(f"import time; time.sleep({(9 - number) / 50}); print({number})") for number in range(10)]
    assert [found.output for found in sandbox.run_all(programs)] == [f"{number}\n" for number in range(10)]


def test_an_exception_is_shown_with_its_line(sandbox: Sandbox) -> None:
    found = run(sandbox, "def f():\n    assert 1 == 2\nf()")
    assert found.outcome == "failed"
    assert 'File "program.py", line 2, in f\n    assert 1 == 2\n' in found.output
    assert last_line(found) == "AssertionError"


@pytest.mark.parametrize(
    "source",
    [
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "exit()",
        "import os; os.execv('/bin/true', ['true'])",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os; os.fork() and os._exit(0); raise SystemExit",
        "import threading, os; threading.Thread(target=os._exit, args=(0,)).start(); import time; time.sleep(1)",
        "import atexit, os; atexit.register(os._exit, 0); assert False",
        "import sys; sys.excepthook = lambda *_: None; assert False",
        "import os; print('passed', flush=True); os._exit(0)",
        "import ctypes; ctypes.string_at(0)",
        "syntax error",
        "print('\0')",
        "\ud800",
    ],
)
def test_ending_early_is_no_way_to_pass(sandbox: Sandbox, source: str) -> None:
    assert run(sandbox, source).outcome == "failed"


def test_a_program_finds_numpy_and_pandas_where_this_python_has_them(sandbox: Sandbox) -> None:
    found = run(
        sandbox, "import sys, importlib.util; print(sys.prefix, importlib.util.find_spec('pandas') is not None)"
    )
    in_prefix = (Path(sysconfig.get_path("purelib")) / "pandas").is_dir()
    assert found == Run("passed", f"{sys.prefix} {in_prefix}\n")


def test_an_endless_loop_is_ended(sandbox: Sandbox) -> None:
    source = "import signal\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\nwhile True: pass"
    start = time.monotonic()
    assert run(sandbox, source, 1) == Run("timed out", "")
    assert time.monotonic() - start < 60


def test_a_fork_bomb_gets_no_more_than_its_processes_and_none_is_left(sandbox: Sandbox) -> None:
    name = new_name()
    counting = """
import os, time
count = 1
while True:
    try:
        if not os.fork():
            time.sleep(60)
    except OSError:
        break
    count += 1
print(count)
"""
    found = run(sandbox, NAMED.format(name) + counting)
    assert found.passed
    assert NUM_PROCESSES - 4 <= int(found.output) <= NUM_PROCESSES
    assert processes(name) == []
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert run(sandbox, NAMED.format(name) + bomb, 2).outcome == "timed out"
    assert processes(name) == []


def test_a_daemon_does_not_outlive_its_program(sandbox: Sandbox) -> None:
    name = new_name()
    source = (
        "import os, time\nif not os.fork():\n    os.setsid()\n    if not os.fork(): time.sleep(300)\n    os._exit(0)"
    )
    assert run(sandbox, NAMED.format(name) + source).passed
    assert processes(name) == []


def test_all_ends_when_the_process_that_started_it_is_killed(sandbox: Sandbox) -> None:
    name = new_name()
    source = NAMED.format(name) + "while True: pass"
    code = f"from fedcli.eval.sandbox import *; Sandbox().run_all([Program({source!r}, 300)])"
    with subprocess.Popen([sys.executable, "-c", code], env=environment()) as starter:
        wait_for(lambda: processes(name) != [])
        starter.kill()
    wait_for(lambda: processes(name) == [])


def wait_for(holds) -> None:
    deadline = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_home_folder_and_the_workspace_can_be_neither_seen_nor_removed(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text("a secret")
    source = f"""
import os, shutil
home = {str(tmp_path)!r}
assert not os.path.exists(home)
os.system(f"rm -rf {{home}} {{home}}/* {{home}}/.netrc")
shutil.rmtree(home, ignore_errors=True)
for path in (home + "/.netrc", "/etc/passwd", "/etc/shadow", {str(REPOSITORY / "pyproject.toml")!r}):
    try:
        open(path)
    except OSError:
        continue
    raise SystemExit(path + " can be read")
try:
    os.makedirs(home)
    open(home + "/.netrc", "w").write("not what it was")
except OSError:
    pass
print(os.path.expanduser("~"))
"""
    assert run(sandbox, source) == Run("passed", "/tmp\n")
    assert [path.name for path in tmp_path.iterdir()] == [".netrc"]
    assert (tmp_path / ".netrc").read_text() == "a secret"


def test_nothing_can_be_written_but_the_temporary_folder_and_devices(sandbox: Sandbox) -> None:
    source = """
import os
for folder, folders, files in os.walk("/"):
    if folder == "/":
        folders.remove("proc")
    for path in [folder, *(os.path.join(folder, name) for name in files if folder in ("/", "/dev"))]:
        if not os.path.islink(path) and os.access(path, os.W_OK):
            print(path)
for name in ("/x", "/proc/x", "/usr/x", "/dev/x"):
    try:
        open(name, "w")
    except OSError:
        continue
    print(name)
"""
    found = run(sandbox, source, 60)
    assert found.passed, found.output
    others = [line for line in found.output.split() if line != "/tmp" and not line.startswith(("/tmp/", "/dev/"))]
    assert others == []


def test_a_new_program_has_an_empty_folder(sandbox: Sandbox) -> None:
    look = "import os; print(os.getcwd(), os.listdir())"
    writing = run(sandbox, f"open('kept', 'w').write('x'); open('/tmp/too', 'w').write('x')\n{look}")
    assert writing.output.startswith("/tmp [")
    shown = {Path(prefix).parts[2] for prefix in (sys.prefix, sys.base_prefix) if prefix.startswith("/tmp/")}
    in_order = look.replace("os.listdir()", "sorted(os.listdir())")
    assert run(sandbox, in_order).output == (
        f"/tmp {sorted(['program.py', *shown])}\n"  # and the way to a Python that lies there
    )


def test_the_environment_is_not_passed_on(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    source = """
import glob, json, os
seen = []
for path in glob.glob("/proc/[0-9]*/environ"):
    try:
        seen.append(open(path).read())
    except OSError:
        pass
print(json.dumps([sorted(os.environ), "canary" in "".join(seen)]))
"""
    found = run(sandbox, source)
    names, is_seen = json.loads(found.output)
    assert set(names) - {"LC_CTYPE", "LD_LIBRARY_PATH", "PWD"} == set(ENVIRONMENT)
    assert not is_seen


def test_no_socket_outside_can_be_reached(sandbox: Sandbox, tmp_path: Path) -> None:
    abstract = "\0" + new_name()
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix, socket.socket(socket.AF_UNIX) as named:
        tcp.bind(("127.0.0.1", 0))
        unix.bind(abstract)
        named.bind(str(tmp_path / "socket"))
        addresses = [
            (socket.AF_INET, tcp.getsockname()),
            (socket.AF_UNIX, abstract),
            (socket.AF_UNIX, str(tmp_path / "socket")),
            (socket.AF_INET, ("192.0.2.1", 80)),
        ]
        for listener in (tcp, unix, named):
            listener.listen()
            listener.setblocking(False)
        source = f"""
import socket
for family, address in {[(int(family), address) for family, address in addresses]!r}:
    with socket.socket(family) as caller:
        caller.settimeout(2)
        try:
            caller.connect(address)
        except OSError as error:
            print(type(error).__name__)
print(socket.gethostname() == {socket.gethostname()!r} != "sandbox")
"""
        found = run(sandbox, source)
        assert found.passed, found.output
        refusals = found.output.split()[:4]
        assert refusals[1:3] == ["ConnectionRefusedError", "FileNotFoundError"]
        assert {refusals[0], refusals[3]} <= {"OSError", "ConnectionRefusedError"}
        for listener in (tcp, unix, named):
            with pytest.raises(BlockingIOError):
                listener.accept()


def test_no_process_outside_can_be_seen_killed_or_traced(sandbox: Sandbox, bystander: subprocess.Popen[bytes]) -> None:
    source = f"""
import ctypes, os, signal
print(len([name for name in os.listdir("/proc") if name.isdigit()]))
for pid in (os.getppid(), 1, -1, {os.getpid()}, {bystander.pid}):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGSTOP, signal.SIGKILL):
        try:
            os.kill(pid, number)
        except OSError:
            pass
library = ctypes.CDLL(None)
print(*(library.ptrace(16, pid, 0, 0) for pid in (1, {os.getpid()}, {bystander.pid})))
for name in ("mem", "root", "cwd", "fd/0", "fd/1", "fd/2"):
    try:
        print(os.listdir(f"/proc/1/{{name}}") if name in ("root", "cwd") else open(f"/proc/1/{{name}}", "r+"))
    except OSError:
        pass
"""
    found = run(sandbox, source, 5)
    assert found == Run("passed", "2\n-1 -1 -1\n")
    assert bystander.poll() is None
    assert Path(f"/proc/{bystander.pid}/stat").read_text().split()[2] == "S"


def test_a_program_gets_no_rights_back(sandbox: Sandbox) -> None:
    source = """
import ctypes, os, subprocess
print(os.getuid(), os.geteuid(), os.getgid())
status = dict(line.strip().split(":\\t") for line in open("/proc/self/status") if line.startswith(("Cap", "NoNew")))
print(status["CapEff"], status["CapPrm"], status["CapAmb"], status["NoNewPrivs"])
library = ctypes.CDLL(None)
for flags in (0x10000000, 0x20000, 0x40000000):
    print(library.unshare(flags), end=" ")
print(library.mount(b"none", b"/tmp", b"tmpfs", 0, None), library.setuid(0), library.chroot(b"/tmp"))
"""
    zeros = "0" * 16
    expected = f"65534 65534 65534\n{zeros} {zeros} {zeros} 1\n-1 -1 -1 -1 -1 -1\n"
    assert run(sandbox, source) == Run("passed", expected)


def test_limits_cannot_be_raised(sandbox: Sandbox) -> None:
    source = """
import resource
for name in ("AS", "FSIZE", "NPROC", "NOFILE", "CORE"):
    kind = getattr(resource, "RLIMIT_" + name)
    try:
        resource.setrlimit(kind, (resource.getrlimit(kind)[1] + 1,) * 2)
    except (ValueError, OSError):
        continue
    print(name)
"""
    assert run(sandbox, source) == Run("passed", "")


def test_endless_output_is_cut_off(sandbox: Sandbox) -> None:
    found = run(sandbox, "while True: print('spam ' * 1000)")
    assert found.outcome == "too much output"
    assert set(found.output.split()) <= {"spam", "spa", "sp", "s", "pam", "am", "m"}
    assert len(found.output) < 3000
    deaf = "import os\nwhile True:\n    try: os.write(1, bytes(10**6))\n    except OSError: pass"
    assert run(sandbox, deaf, 1).outcome == "timed out"


def test_endless_memory_is_cut_off(sandbox: Sandbox) -> None:
    at_once = run(sandbox, "x = bytearray(10**11)")
    assert (at_once.outcome, last_line(at_once)) == ("failed", "MemoryError")
    grow = "x = []\nwhile True: x.append(bytearray(10**7))"
    assert run(sandbox, grow, 60).outcome == "too much memory"
    many = "import os\nfor _ in range(3): os.fork()\n" + grow
    assert run(sandbox, many, 60).outcome == "too much memory"


def test_the_disk_cannot_be_filled(sandbox: Sandbox) -> None:
    source = """
import os
try:
    with open("large", "wb") as file:
        file.write(bytes({size} + 1))
except OSError as error:
    print(error.strerror)
os.remove("large")
written = 0
for number in range(10**6):
    try:
        with open(str(number), "wb") as file:
            written += file.write(bytes(2**20))
    except OSError as error:
        print(error.strerror, written)
        break
""".replace("{size}", str(FILE_BYTES))
    large, full = run(sandbox, source).output.splitlines()
    assert (full.rpartition(" ")[0], large) == ("No space left on device", "File too large")
    assert HOME_BYTES * 0.9 < int(full.rpartition(" ")[2]) <= HOME_BYTES
    names = "for number in range(10**6): open(str(number), 'w')"
    assert run(sandbox, names).outcome == "too much memory"  # each takes some, though all are empty


ASK = """
from fedcli.eval.sandbox import *
try:
    Sandbox()
except RequirementError as error:
    print(error.exit_code, error.message, error.hint)
"""
REFUSED = """
echo 0 > /proc/sys/user/max_user_namespaces
exec "$1" -c "$2"
"""


def test_a_machine_without_namespaces_is_told_why_and_what_to_do(sandbox: Sandbox) -> None:
    command = ["unshare", "--user", "--map-root-user", "sh", "-ec", REFUSED, "sh", sys.executable, ASK]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.startswith("8 this machine cannot run code in a sandbox: bwrap: ")
    assert "max_user_namespaces" in done.stdout.partition(" Install bubblewrap 0.8 or later")[2]


def test_a_machine_without_bubblewrap_is_told_how_to_get_it(tmp_path: Path) -> None:
    nowhere = environment() | {"PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", ASK], env=nowhere, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("8 this machine cannot run code in a sandbox: bubblewrap (bwrap) is not installed ")
    assert "apt-get install bubblewrap" in done.stdout


@pytest.mark.parametrize("fault", ["echo 'bwrap: Unknown option --size' >&2; exit 1", "exit 0", "exit 3"])
def test_a_bubblewrap_that_does_not_do_its_work_is_refused(tmp_path: Path, fault: str) -> None:
    (tmp_path / "bwrap").write_text(f"#!/bin/sh\n{fault}\n")
    (tmp_path / "bwrap").chmod(0o755)
    broken = environment() | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", ASK], env=broken, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("8 this machine cannot run code in a sandbox: ")


REACHABLE = """
mkdir python packages repository
mount --bind "$1" python
mount --bind "$2" packages
mount --bind "$3" repository
export LD_LIBRARY_PATH="$PWD/python/lib" PYTHONPATH="$PWD/repository:$PWD/packages" PYTHONDONTWRITEBYTECODE=1
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1  # of the Python that is shown, whatever it has installed
unset PYTEST_XDIST_WORKER PYTEST_ADDOPTS
exec setpriv --reuid=65534 --regid=65534 --clear-groups "$PWD/python/bin/$4" -m pytest -q -rs --noconftest \
    -p no:cacheprovider --basetemp scratch/here repository/tests/test_sandbox.py
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="all of this has just run as another user than root")
def test_all_of_this_holds_for_a_user_who_is_not_root() -> None:
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("needs mounts of its own, to show this Python to another user")
    packages, repository = sysconfig.get_path("purelib"), Path(fedcli.__file__).parents[1]
    program = f"python{sys.version_info.major}.{sys.version_info.minor}"
    with tempfile.TemporaryDirectory(prefix="fedcli-nobody-", dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        scratch = Path(folder, "scratch")
        scratch.mkdir()
        os.chown(scratch, 65534, 65534)
        command = ["unshare", "--mount", "sh", "-ec", REACHABLE, "sh", sys.base_prefix, packages, repository, program]
        done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False)
    if NO_SANDBOX in done.stdout:
        pytest.skip("users who are not root have " + done.stdout[done.stdout.index(NO_SANDBOX) :].splitlines()[0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed, 1 deselected" in done.stdout


def test_an_interrupt_from_the_keyboard_ends_all_at_once(sandbox: Sandbox) -> None:
    name = new_name()
    source = NAMED.format(name) + "while True: pass"
    code = f"from fedcli.eval.sandbox import *; Sandbox().run_all([Program({source!r}, 300)] * 9)"
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment(), start_new_session=True, stderr=subprocess.PIPE
    ) as starter:
        wait_for(lambda: processes(name) != [])
        os.killpg(starter.pid, signal.SIGINT)
        _, errors = starter.communicate(timeout=300)
    assert errors.strip().endswith(b"KeyboardInterrupt")
    wait_for(lambda: processes(name) == [])  # the kernel takes a moment to end a namespace
