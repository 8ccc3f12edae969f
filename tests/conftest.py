"""What tests share: real processes, and a small workspace that is initialised once and copied."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = (
    "federation.clients=3",
    "federation.rounds=2",
    "train.steps=2",
    "train.batch_size=4",
    "adapter.rank=4",
    "adapter.target_modules=[q_proj, v_proj]",
)
"""Settings of a federation of three clients that trains in a second."""

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ENVIRONMENT.pop("FEDCLI_WORKSPACE", None)


def command(*arguments: object) -> list[str]:
    """Return the command line of a fedcli process."""
    return [sys.executable, "-m", "fedcli", *map(str, arguments)]


def fedcli(*arguments: object, cwd: Path, timeout: float = 120, **options) -> subprocess.CompletedProcess[str]:
    """Run one real fedcli process in a folder, and return what it printed and its exit code."""
    return subprocess.run(
        command(*arguments), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, **options
    )


def settings(*overrides: str) -> list[str]:
    """Return --set options."""
    return [part for override in overrides for part in ("--set", override)]


@pytest.fixture(scope="session")
def small_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of SMALL with round 0 open; tests must not change it."""
    folder = tmp_path_factory.mktemp("small")
    done = fedcli("init", *settings(*SMALL), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def small(small_template: Path, tmp_path: Path) -> Path:
    """A copy of the small workspace with round 0 open."""
    return Path(shutil.copytree(small_template, tmp_path / "workspace"))
