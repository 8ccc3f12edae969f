"""What tests share: real processes, and a small workspace that is initialised once and copied."""

import shutil
from pathlib import Path

import pytest
from support.processes import SMALL, initialised

from fedcli.errors import RequirementError
from fedcli.eval.sandbox import Sandbox


@pytest.fixture(scope="session")
def small_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of SMALL with round 0 open; tests must not change it."""
    return initialised(tmp_path_factory.mktemp("small"), *SMALL)


@pytest.fixture
def small(small_template: Path, tmp_path: Path) -> Path:
    """A copy of the small workspace with round 0 open."""
    return Path(shutil.copytree(small_template, tmp_path / "workspace"))


@pytest.fixture(scope="session")
def signed_template(small_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed workspace `server/W` and the keys of its server; it is never changed."""
    from support.signed import make_signed  # it loads what most tests need not

    folder = tmp_path_factory.mktemp("signed")
    make_signed(small_template, folder / "server/W", folder / "server/home")
    return folder


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    """Return the sandbox for code; tests that need it are skipped where this machine has none."""
    try:
        return Sandbox()
    except RequirementError as error:
        pytest.skip(f"no sandbox on this machine: {error.message}")
