"""What the plain installation lacks: each command that needs an extra names it, and all others work without it."""

import json
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.processes import ENVIRONMENT, runner
from support.scripted import ROWS

from fedcli.errors import EXTRAS

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
PLAIN = (
    f"import sys\nfor name in {sorted(EXTRAS)}: sys.modules[name] = None\n"
    "from fedcli.cli import main\nsys.exit(max(main(words.split()) for words in sys.argv[1:]))\n"
)
"""Runs commands of fedcli, one after the other, as in an installation without extras."""
ROUNDS = ("init w --preset demo --set federation.rounds=1 --set federation.clients=2 --set train.steps=1", "run -w w")
WORK = (
    *ROUNDS,
    "verify -w w",
    "train-alone --id 0 -w w",
    "eval demo --limit 3 -w w",
    "export out -w w",
    "data preview -w w",
)


def test_every_extra_that_an_error_names_brings_its_package() -> None:
    index_names = {"lm_eval": "lm-eval", "sklearn": "scikit-learn", "dp_accounting": "dp-accounting"}
    for name, extra in EXTRAS.items():
        brought = PROJECT["optional-dependencies"][extra]
        assert any(line.startswith(index_names.get(name, name)) for line in brought), name
        assert not any(line.startswith(index_names.get(name, name)) for line in PROJECT["dependencies"]), name


@pytest.mark.parametrize(
    ("command", "package"),
    [
        ("report", "matplotlib"),
        (f"eval mmlu --base --data {ROWS}", "lm_eval"),
        ("data preview -o shares.png", "matplotlib"),
        ("eval lm-eval hellaswag --base", "lm_eval"),
        (f"eval conala --base --data {ROWS}", "sacrebleu"),
        (f"eval finance conala --base --data {ROWS}", "sacrebleu"),
        ("study run -s s", "lm_eval"),
        pytest.param(
            "init t --set 'data.partition={dirichlet: {by: topic, alpha: 1}}'", "sklearn", marks=pytest.mark.slow
        ),
    ],
)
def test_a_command_without_its_extra_names_it(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, command: str, package: str
) -> None:
    monkeypatch.chdir(small)
    run = runner(capsys)
    if command.startswith("study"):
        assert run("study", "init", "demo", "s", "--set", "eval.benchmarks=[gsm8k]")[0] == 0
    for name in [*sys.modules, *EXTRAS]:
        if name.partition(".")[0] in EXTRAS:
            monkeypatch.setitem(sys.modules, name, None)  # its import fails as that of what is not there
    code, _, err = run(*shlex.split(command))
    assert code == 8, err
    assert f"this needs the package {package}, which is not installed" in err
    assert f"pip install 'fedcli[{EXTRAS[package]}]'" in err


@pytest.mark.slow
def test_the_plain_installation_trains_merges_verifies_and_scores_the_demo(tmp_path: Path) -> None:
    line = [sys.executable, "-c", PLAIN, *WORK]
    done = subprocess.run(line, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "picture: none: this needs the package matplotlib" in done.stderr
    record = json.loads((tmp_path / "w/eval/round-00001/demo@limit=3.json").read_bytes())
    assert record["scores"]["exact_match"]["num_items"] == 3
