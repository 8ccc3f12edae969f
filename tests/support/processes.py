"""Commands of fedcli: as processes of their own, forked from a warm one, or in this process."""

import atexit
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedcli.cli import main
from support.warm import Warm

SMALL = (
    "federation.clients=3",
    "federation.rounds=2",
    "train.steps=2",
    "train.batch_size=4",
    "adapter.rank=4",
    "adapter.target_modules=[q_proj, v_proj]",
)
"""Settings of a federation of three clients that trains in a second."""

FEW = (*SMALL, "federation.clients=2", "train.steps=4", "train.learning_rate=2e-2", "train.beta=0.5")
"""Settings of two clients that learn preferences."""

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
for _name in ("FEDCLI_WORKSPACE", "FEDCLI_BENCHMARKS", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
    ENVIRONMENT.pop(_name, None)

Run = Callable[..., tuple[int, str, str]]
"""Runs a command; returns its exit code, stdout and stderr."""


def command(*arguments: object) -> list[str]:
    """Return the command line of a fedcli process."""
    return [sys.executable, "-m", "fedcli", *map(str, arguments)]


@functools.cache
def warm() -> Warm:
    """Return the process that forks this worker's fedcli processes."""
    started = Warm([sys.executable], ENVIRONMENT)
    atexit.register(started.__exit__)
    return started


def fedcli(*arguments: object, cwd: Path, **options) -> subprocess.CompletedProcess[str]:
    """Run one fedcli process in a folder, and return what it printed and its exit code.

    Without options of `subprocess.run` it is forked from a process that has imported torch: that saves five seconds.
    """
    if not options:
        return warm()(*arguments, cwd=cwd)
    return subprocess.run(
        command(*arguments), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, **({"timeout": 120} | options)
    )


def settings(*overrides: str) -> list[str]:
    """Return --set options."""
    return [part for override in overrides for part in ("--set", override)]


def run_ok(*arguments: object, cwd: Path) -> dict:
    """Run a command with --json that must succeed, and return its document."""
    done = fedcli(*arguments, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "quiet under --json"
    return json.loads(done.stdout)


def runner(capsys: pytest.CaptureFixture) -> Run:
    """Return what runs a command in this process: exit code, stdout and stderr."""

    def run_main(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return (code, *capsys.readouterr())

    return run_main


def initialised(folder: Path, *overrides: str) -> Path:
    """Initialise a workspace with these settings in this process; return its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FEDCLI_WORKSPACE", raising=False)
        assert main(["init", str(folder), *settings(*overrides)]) == 0
    return folder


def results(run: Run, *arguments: object) -> dict[str, Any]:
    """Run a command with --json that must succeed, and return its document."""
    code, out, err = run(*arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def command_names(command: object, name: str) -> Iterator[str]:
    """Yield the full names of a command's commands that have none of their own."""
    children = getattr(command, "commands", None)
    if children is None:
        yield name
        return
    for child, grandchild in children.items():
        yield from command_names(grandchild, f"{name} {child}")
