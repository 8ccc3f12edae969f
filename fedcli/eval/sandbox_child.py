"""The first process of a sandbox: limits a program, runs it and watches it.

`sandbox` starts it inside bubblewrap, as `python -S -c SOURCE SECONDS RUNNER ROLE [FD FD]`. It imports nothing of
fedcli. RUNNER is the source of `sandbox_runner`.
"""

import ctypes
import os
import resource
import signal
import sys
import time

HOME = "/tmp"
"""The only folder where a program may write; it goes with the program."""
MEBI = 2**20
HOME_BYTES = 64 * MEBI
HOME_FILES = 4096
"""Files and folders, which take memory even when they are empty."""
RESIDENT_BYTES = 2048 * MEBI
"""Of all processes of a program together."""
FILE_BYTES = 8 * MEBI
"""Of one file; the output is one."""
NUM_PROCESSES = 32
LIMITS = {
    resource.RLIMIT_AS: 4 * RESIDENT_BYTES,
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_FSIZE: FILE_BYTES,
    resource.RLIMIT_NOFILE: 128,
    resource.RLIMIT_NPROC: NUM_PROCESSES,
}
SUCCEEDED, FAILED, TIMED_OUT, OUT_OF_MEMORY, GONE = 0, 3, 4, 5, 6
"""Exit statuses; a word on stderr means that the sandbox could not be made. `sandbox_runner` tells of GONE."""

_PAUSE = 0.05
"""Seconds between two looks at a program's memory."""
_SET_DUMPABLE = 4
"""An option of prctl(2)."""


def watch(seconds: float, runner: str, role: list[str]) -> int:
    """Run the program of stdin and return how it ended; all that it started ends with this process."""
    if ctypes.CDLL(None).prctl(_SET_DUMPABLE, 0):  # no program may look into this process
        raise OSError("prctl(PR_SET_DUMPABLE) failed")
    for kind, limit in LIMITS.items():
        resource.setrlimit(kind, (limit, limit))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one signal that Python hears, so the one that a program can send
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    command = [sys.executable, "-s", "-P", "-c", runner, *role]
    stderr_to_stdout = (os.POSIX_SPAWN_DUP2, 1, 2)
    program = os.posix_spawn(
        command[0], command, os.environ, file_actions=[stderr_to_stdout], setsigmask=[], setsigdef=[signal.SIGINT]
    )
    deadline = time.monotonic() + seconds
    while True:
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == program:
                status = os.waitstatus_to_exitcode(ended[1])
                return status if status in (SUCCEEDED, GONE) else FAILED
        if time.monotonic() > deadline:
            return TIMED_OUT
        home = os.statvfs(HOME)
        if home.f_files - home.f_ffree > HOME_FILES or _resident_bytes() > RESIDENT_BYTES:
            return OUT_OF_MEMORY
        signal.sigtimedwait([signal.SIGCHLD], _PAUSE)


def _resident_bytes() -> int:
    """Return the memory of all processes of the namespace, this one included, and of what they share without a name."""
    pages = 0
    unnamed = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/statm") as file:
                    pages += int(file.read().split()[1])
                for descriptor in os.listdir(f"/proc/{name}/fd"):
                    status = os.stat(f"/proc/{name}/fd/{descriptor}")
                    if not status.st_nlink:  # memfd_create(2), or a file that was removed
                        unnamed[status.st_dev, status.st_ino] = status.st_blocks * 512
            except (OSError, IndexError):  # it has ended meanwhile
                continue
    with open("/proc/sysvipc/shm") as file:
        segments = sum(int(line.split()[-2]) for line in list(file)[1:])
    return pages * resource.getpagesize() + sum(unnamed.values()) + segments


if __name__ == "__main__":
    os._exit(watch(float(sys.argv[1]), sys.argv[2], sys.argv[3:]))
