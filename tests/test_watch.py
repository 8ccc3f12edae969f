"""`fedcli status --watch`: it shows each change, ends with the federation, and a look costs next to nothing."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from support.handmade import drop, merge
from support.processes import ENVIRONMENT, command, fedcli

from fedcli import Federation
from fedcli.commands.status_watch import render
from fedcli.operations.watch import PastRound, Watcher
from fedcli.workspace.layout import Workspace


@pytest.mark.slow
def test_without_a_terminal_each_change_is_a_line_and_the_last_round_ends_it(small: Path) -> None:
    workspace = Workspace(small)
    process = subprocess.Popen(
        command("status", "--watch"), cwd=small, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "round 0 of 2, open: 0 of 3 answered, 3 must, missing 0, 1, 2\n"
    drop(workspace, 1, loss=0.5)
    assert process.stdout.readline() == "round 0 of 2, open: 1 of 3 answered, 3 must, missing 0, 2\n"
    Federation(workspace).server.aggregate(partial=True)
    merge(workspace, {0: 0.25})
    rest, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert rest.splitlines()[-1] == "round 2 of 2, finished; mean loss 0.2500 in round 1"


def on_a_terminal(folder: Path) -> tuple[int, int]:
    """Start it on a terminal of its own; return its process id and the terminal."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.execve(sys.executable, command("status", "--watch"), ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "100"})
    return process, terminal


def read_all(terminal: int, until: str = "") -> str:
    """Read what a terminal shows, to its end or until it has shown a text."""
    shown = b""
    try:
        while not until or until.encode() not in shown:
            shown += os.read(terminal, 4096)
    except OSError:  # how a terminal ends whose process has left
        pass
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


def test_on_a_terminal_it_shows_the_finished_federation_and_ends(small: Path) -> None:
    workspace = Workspace(small)
    merge(workspace, {0: 2.0, 2: 1.0})
    merge(workspace, {1: 0.5})
    process, terminal = on_a_terminal(small)
    shown = read_all(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert "2 of 2, finished" in shown
    assert "1.500 to 0.500" in shown
    assert "missing 0, 2" in shown


def test_ctrl_c_leaves_with_130(small: Path) -> None:
    process, terminal = on_a_terminal(small)
    assert "0 of 3 have answered" in read_all(terminal, until="Ctrl-C leaves")
    os.kill(process, signal.SIGINT)
    read_all(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130


def test_with_json_it_is_refused(small: Path) -> None:
    assert fedcli("status", "--watch", "--json", cwd=small).returncode == 2


def test_a_look_at_an_unchanged_round_opens_one_file_that_is_not_there(small: Path) -> None:
    watcher = Watcher(Federation.open(small).state)
    opened: list[str] = []
    looking = True
    sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if looking and event == "open" else None)
    watcher.look()
    looking = False
    assert [Path(name).relative_to(small) for name in opened] == [Path("rounds/00001/manifest.json")]


def test_the_time_left_is_that_of_the_last_rounds(small: Path) -> None:
    config = small / "fedcli.yaml"
    config.write_text(config.read_text().replace("rounds: 2", "rounds: 5"))
    workspace = Workspace(small)
    watcher = Watcher(Federation(workspace).state)
    assert watcher.look().eta_seconds is None
    now = time.time()
    for number, ago in ((0, 203), (1, 103), (2, 3)):  # rounds of 100 seconds; the open one began 3 seconds ago
        if number:
            merge(workspace, {0: 1.0})
        os.utime(workspace.round(number) / "manifest.json", (now - ago, now - ago))
    view = watcher.look()
    assert [past.seconds for past in view.past] == pytest.approx([100.0, 100.0])
    assert view.eta_seconds is not None
    assert 3 * 100 - 3 - 60 < view.eta_seconds <= 3 * 100 - 3


def test_a_cohort_of_hundreds_fits_the_screen(small: Path) -> None:
    view = Watcher(Federation.open(small).state).look()
    past = [PastRound(number, 1.0, 3, [1], [2], 60.0) for number in range(60)]
    cohort = list(range(500))
    view = replace(
        view, head=view.head.model_copy(update={"cohort": cohort}), past=past, answered=cohort[:9], missing=cohort[9:]
    )
    console = Console(width=80, record=True, file=StringIO())
    console.print(render(view))
    text = console.export_text()
    assert "479" in text
    assert len(text.splitlines()) < 24, "what a terminal has"
    assert max(map(len, text.splitlines())) <= 80
