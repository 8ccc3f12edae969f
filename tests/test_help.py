"""The command line's manners: help, examples, completion, presets."""

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from support.processes import ENVIRONMENT, Run, command, command_names, runner

from fedcli.cli import app
from fedcli.commands.help_pages import EXAMPLES, PANELS, example_lines
from fedcli.server.create import presets

ROOT: Any = typer.main.get_command(app)


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Run:
    return runner(capsys)


def test_every_command_is_in_a_panel_and_has_an_example() -> None:
    listed = [word for words in PANELS.values() for word in words]
    assert len(listed) == len(set(listed))
    assert set(ROOT.commands) <= set(listed)
    assert list(ROOT.commands) == [word for word in listed if word in ROOT.commands]
    assert {f"fedcli {name}" for name in EXAMPLES} == set(command_names(ROOT, "fedcli"))


@pytest.mark.parametrize("typed", [typed for found in EXAMPLES.values() for typed, _ in found])
def test_an_example_is_a_command_line_that_is_understood(typed: str) -> None:
    words = shlex.split(typed.rpartition("| ")[2])
    assert words.pop(0) == "fedcli"
    found, names = ROOT, []
    with ROOT.make_context("fedcli", [], resilient_parsing=True) as ctx:
        while hasattr(found, "commands"):
            names.append(words.pop(0) if words[0] in found.commands else "run")
            found = found.commands[names[-1]]
        with found.make_context(names[-1], words, ctx) as parsed:
            assert parsed.command_path == f"fedcli {names[-1]}"
    assert any(typed == line.partition("  # ")[0].rstrip() for line in example_lines(" ".join(names)))


def test_help_is_plain_off_a_terminal_and_short_and_long_are_the_same(run: Run) -> None:
    for arguments in ((), ("client",), ("chat",)):
        code, out, err = run(*arguments, "--help")
        assert (code, err) == (0, "")
        assert run(*arguments, "-h") == (0, out, "")
        assert "..." not in out.partition("Commands:")[2], "no line is cut"
        assert "\x1b" not in out
    assert out.endswith("".join(f"  {line}\n" for line in example_lines("chat")))


@pytest.mark.slow
def test_help_on_a_terminal_has_panels() -> None:
    shown = [re.sub(r"\x1b\[[0-9;]*m", "", on_a_terminal(*arguments)) for arguments in (["-h"], ["chat", "-h"])]
    for panel in PANELS:
        assert f" {panel} ─" in shown[0]
    assert "╭─ Examples ─" in shown[1]
    assert "fedcli chat --compare" in shown[1]


def on_a_terminal(*arguments: str) -> str:
    """Return what a command shows on a terminal that is 100 columns wide."""
    process, terminal = pty.fork()
    if process == 0:
        os.execve(sys.executable, command(*arguments), ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "100"})
    shown = b""
    try:
        while found := os.read(terminal, 4096):
            shown += found
    except OSError:  # how a terminal ends whose process has left
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    return shown.decode()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("fedcli cl", ["client"]),
        ("fedcli client tr", ["train"]),
        ("fedcli chat --co", ["--compare"]),
        ("fedcli eval ta", ["table"]),
    ],
)
@pytest.mark.slow
def test_a_shell_completes_commands_and_options(tmp_path: Path, words: str, found: list[str]) -> None:
    asked = {"_FEDCLI_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = subprocess.run(command(), cwd=tmp_path, env=ENVIRONMENT | asked, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == found


def test_presets_are_listed_with_a_line_each(run: Run) -> None:
    _, out, _ = run("init", "--list-presets")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines.keys() == presets().keys()
    assert lines["fedit-code"] == (
        "OpenFedLLM's setting (KDD 2024) for code: 20 clients, 2 a round, 20,000 rows of CodeAlpaca"
    )
    assert all(line[0].isupper() and not line.endswith((".", ":")) for line in lines.values())
    document = json.loads(run("init", "--list-presets", "--json")[1])
    assert document == {"presets": sorted(lines), "descriptions": lines}
