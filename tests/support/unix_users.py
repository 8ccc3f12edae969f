"""Commands of several unix users: Python where all of them can reach it, and names for their numbers."""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import fedcli
from support.processes import ENVIRONMENT
from support.warm import Warm

REACHABLE = """
mkdir python packages repository tests
mount --bind "$1" python
mount --bind "$2" packages
mount --bind "$3" repository
mount --bind "$4" tests
mount --bind passwd /etc/passwd
export LD_LIBRARY_PATH="$PWD/python/lib" PYTHONPATH="$PWD/repository:$PWD/packages" PYTHONDONTWRITEBYTECODE=1
program="$PWD/python/bin/$5"
cd tests
shift 5
exec "$program" "$@"
"""
"""Runs Python where every user can reach it (a home of root's is closed); mounts and names end with the process."""


def skip_without_users() -> None:
    """Skip a test where this process cannot be several users."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be several users")
    if subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("needs mounts and a host name of its own, and may not have them here")


@contextmanager
def several_users(stage: Path, users: Iterable[tuple[str, int, Path]]) -> Iterator[Warm]:
    """Yield what runs commands as users, of whom it is given names, numbers and homes; `stage` is a folder to make."""
    stage.mkdir()
    (stage / "cache").mkdir()
    (stage / "cache").chmod(0o1777)  # `datasets` locks what it reads
    entries = [*users, ("root", 0, Path("/root"))]
    lines = [f"{name}:x:{number}:{number}::{home}:/bin/sh\n" for name, number, home in entries]
    (stage / "passwd").write_text("".join(lines))
    tests = Path(__file__).parents[1]
    sources = [sys.base_prefix, sysconfig.get_path("purelib"), Path(fedcli.__file__).parents[1], tests]
    program = f"python{sys.version_info.major}.{sys.version_info.minor}"
    python = ["unshare", "--mount", "--uts", "sh", "-ec", f"cd '{stage}'{REACHABLE}", "sh", *sources, program]
    with Warm(list(map(str, python)), ENVIRONMENT | {"HF_DATASETS_CACHE": str(stage / "cache")}) as warm:
        yield warm
