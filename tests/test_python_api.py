"""The Python API: what docs/PYTHON.md and the example of sixty lines show is what happens."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import ENVIRONMENT

import fedcli
from fedcli.errors import UsageError

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs" / "federation_in_60_lines.py"


def run_python(code: str | Path, *arguments: object, cwd: Path) -> str:
    """Run a program in a folder; return what it printed."""
    line = [sys.executable, *(["-c", code] if isinstance(code, str) else [code]), *map(str, arguments)]
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_example_of_the_page_is_true(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/PYTHON.md").read_text(), re.M | re.S)
    assert len(blocks) >= 6
    run_python("\n".join(blocks), cwd=tmp_path)


@pytest.mark.slow
def test_the_example_runs_a_federation_in_sixty_lines(tmp_path: Path) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 60
    printed = run_python(EXAMPLE, tmp_path / "study", cwd=tmp_path)
    assert printed.count("loss") == 9
    assert "best: round-00003" in printed
    assert printed.endswith("violations of the protocol: 0\n")


def test_importing_fedcli_loads_nothing_else() -> None:
    code = "import sys, fedcli; print(*sorted(name for name in sys.modules if name.startswith('fedcli')))"
    assert run_python(code, cwd=ROOT).split() == ["fedcli"]


def test_the_public_names_are_there_and_no_others() -> None:
    assert fedcli.__all__ == ["Federation", "Observer", "__version__"]
    assert fedcli.Federation.__name__ == "Federation"
    assert fedcli.Observer.__name__ == "Observer"
    with pytest.raises(AttributeError, match="Federations"):
        fedcli.Federations  # noqa: B018  # looking it up is the test


def test_a_name_that_is_taken_is_not_added(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedcli.algos import ALGORITHMS, FedAvg

    with pytest.raises(ValueError, match="'fedavg' is taken: fedcli gives it"):
        ALGORITHMS.add("fedavg", FedAvg)
    with pytest.raises(ValueError, match="its name is 'fedavg'"):
        ALGORITHMS.add("another", FedAvg)
    assert "another" not in ALGORITHMS


def test_an_argument_that_makes_no_sense_is_a_usage_error(small: Path) -> None:
    federation = fedcli.Federation.open(small)
    for call in (lambda: federation.run(rounds=0), lambda: federation.run(workers=0), federation.evaluate):
        with pytest.raises(UsageError):
            call()
    assert federation.report(output=str(small / "page")).page.parent == small / "page"
