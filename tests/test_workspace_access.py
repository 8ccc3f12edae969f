"""Who touches the files of a workspace, watched while every command runs: fedcli/workspace/ alone."""

import os
from pathlib import Path

import pytest
import typer
from support.audit import Touch, watched
from support.federation import all_take_part, configure
from support.processes import SMALL, command_names, run_ok, settings
from support.regions import make
from support.warm import write_rows

from fedcli import Federation
from fedcli.cli import app

COMMANDS = {
    "init": ("init", "NEW", *settings(*SMALL)),
    "data partition": ("data", "partition"),
    "data preview": ("data", "preview"),
    "client join": ("client", "join", "--id", 2, "--data", "rows.jsonl", "--home", "home", "--yes"),
    "client status": ("client", "status", "--id", 0),
    "client train": ("client", "train", "--id", 0),
    "client train --any": ("client", "train", "--any"),
    "server open": ("server", "open"),
    "server aggregate": ("server", "aggregate", "--partial"),
    "server discard": ("server", "discard", "--id", 0),
    "server run": ("server", "run"),
    "server score": ("server", "score"),
    "run": ("run", "--rounds", 1),
    "status": ("status",),
    "privacy": ("privacy",),
    "verify": ("verify",),
    "gc": ("gc",),
    "sync": ("sync", "workspace", "NEW"),
    "bundle round": ("bundle", "round", "NEW"),
    "bundle update": ("bundle", "update", "--id", 0, "NEW"),
    "bundle import": ("bundle", "import", "NEW"),
    "audit plant": ("audit", "plant", "--id", 0),
    "audit measure": ("audit", "measure", "--id", 0, "--fillings", 2, "--rows", 2),
    "doctor": ("doctor",),
    "chat": ("chat", "hi", "--base", "--max-new-tokens", 1),
    "report": ("report",),
    "export": ("export", "exported"),
    "train-alone": ("train-alone", "--id", 0),
    "train-pooled": ("train-pooled",),
    "eval run": ("eval", "run", "demo", "--limit", 1, "--round", "latest"),
    "eval list": ("eval", "list"),
    "eval fetch": ("eval", "fetch", "demo"),
    "eval table": ("eval", "table"),
    "eval best": ("eval", "best", "--metric", "demo"),
    "client leave": ("client", "leave", "--id", 0),
    "server enrol": ("server", "enrol", "--id", 0),
    "server revoke": ("server", "revoke", "--id", 0),
    "keys show": ("keys", "show"),
    "keys rotate": ("keys", "rotate"),
    "slurm script": ("slurm", "script"),
    "slurm submit": ("slurm", "submit"),
    "relay": ("relay", "--id", 0, "-w", "PARENT", "--from", "WORKSPACE"),
}
ANSWERED = ("server aggregate", "server discard", "server run", "verify")
MERGED = ("relay", "server run", "report", "status", "gc", "verify", "export", "eval run", "eval table", "eval best")


@pytest.fixture
def workspace(small: Path) -> Path:
    """A workspace outside the folder that commands run in."""
    write_rows(small.parent / "rows.jsonl", [{"instruction": f"say {n}", "output": f"{n}"} for n in range(20)])
    return small


def test_every_command_is_watched() -> None:
    names = {name.removeprefix("fedcli ") for name in command_names(typer.main.get_command(app), "fedcli")}
    watched_here = {name.removesuffix(" --any") for name in COMMANDS}
    assert names == watched_here | {f"study {name}" for name in ("init", "run", "status", "table", "plot", "report")}


LONG = {
    "run",
    "doctor",
    "data preview",
    "server run",
    "train-alone",
    "train-pooled",
    "export",
    "report",
    "eval run",
    "chat",
    "audit measure",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in COMMANDS]
)
def test_files_of_the_workspace_are_listed_examined_and_opened_in_its_own_room_alone(
    workspace: Path, name: str
) -> None:
    places = {"NEW": workspace.parent / "new", "PARENT": workspace.parent / "parent", "WORKSPACE": workspace}
    if name == "relay":
        make(workspace, places["PARENT"], "federation.clients=1")
        configure(workspace, "federation.relay_every=1")
    if name in MERGED:
        all_take_part(workspace)
        Federation.open(workspace).server.aggregate()
    if name in ANSWERED:
        all_take_part(workspace)
    if name == "audit measure":
        run_ok("audit", "plant", "--id", 0, cwd=workspace)
        run_ok("client", "train", "--id", 0, cwd=workspace)
    if name == "bundle import":
        Federation.open(workspace).bundle_round(workspace.parent / "new")
    program = workspace.parent / "programs" / "sbatch"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 7\n")
    program.chmod(0o755)
    program.with_name("squeue").write_text("#!/bin/sh\n")
    program.with_name("squeue").chmod(0o755)
    seen = watched(
        places["NEW"] if name == "init" else workspace,
        *(places.get(str(word), word) for word in COMMANDS[name]),
        log=workspace.parent / "log.json",
        PATH=f"{program.parent}:{os.environ['PATH']}",
        XDG_DATA_HOME=str(workspace.parent / "data"),
    )
    assert seen.touches or name in ("eval list", "eval fetch")
    offenders = sorted({str(touch) for touch in seen.touches if is_foreign(touch)})
    assert not offenders, "\n".join(["", *offenders])


@pytest.mark.slow
def test_a_study_reaches_the_files_of_its_cells_in_the_workspaces_room_alone(tmp_path: Path) -> None:
    study, few = tmp_path / "study", [f"settings.{setting}" for setting in SMALL]
    run_ok("study", "init", "demo", study, *settings(*few, "eval.limit=2", "baselines=[]"), cwd=tmp_path)
    cell = study / "cells/demo/seed-0/fedavg"
    for command in (("run", "--cell", "demo/seed-0/fedavg"), ("status",), ("table",), ("plot",), ("report",)):
        seen = watched(cell, "study", *command, "-s", study, log=tmp_path / "log.json")
        assert seen.touches or command == ("status",)
        offenders = sorted({str(touch) for touch in seen.touches if is_foreign(touch)})
        assert not offenders, "\n".join([str(command), *offenders])


def is_foreign(touch: Touch) -> bool:
    return not touch.file.startswith("fedcli/workspace/")


def test_what_is_watched_is_seen(workspace: Path) -> None:
    """Else the test above would prove nothing: each way to reach a file leaves its trace."""
    seen = watched(workspace, "status", log=workspace.parent / "log.json")
    assert seen.exit_code == 0
    assert {"fedcli.yaml", "workspace.json", "rounds/00000/manifest.json", "rounds"} <= {t.path for t in seen.touches}
    assert {"open", "os.stat"} <= {touch.event for touch in seen.touches}


@pytest.mark.parametrize("name", ["client train", "client train --any", "server aggregate"])
def test_a_command_opens_the_configuration_and_the_identity_once(workspace: Path, name: str) -> None:
    if name == "server aggregate":
        all_take_part(workspace)
    seen = watched(workspace, *COMMANDS[name], log=workspace.parent / "log.json")
    assert seen.exit_code == 0
    opened = {path: [touch for touch in seen.touches if is_opening(touch, path)] for path in OPENED_ONCE}
    assert {path: len(found) for path, found in opened.items()} == dict.fromkeys(OPENED_ONCE, 1), "\n".join(
        ["", *(str(touch) for found in opened.values() for touch in found)]
    )


OPENED_ONCE = ("fedcli.yaml", "workspace.json")


def is_opening(touch: Touch, path: str) -> bool:
    return touch.event in ("open", "os.open") and touch.path == path
