"""Clients, servers, gc, status and verify at once, killed at random: the federation ends as if undisturbed.

$FEDCLI_FAULTS federations (3; docs/RELIABILITY.md has a longer run).
"""

import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from support.faults import recorded
from support.federation import configure, read_manifest, restart, train_as
from support.kills import arm, fork, was_killed

from fedcli import Federation
from fedcli.errors import BusyError, NotReadyError
from fedcli.workspace.layout import Workspace

NUM_FEDERATIONS = int(os.environ.get("FEDCLI_FAULTS", "3").replace("all", "100"))
ROUNDS = 6


def work(workspace: Path, seed: int, position: int | None) -> None:
    """Do what comes, in any order; die at a call if `position` names one."""
    generator = random.Random(seed)
    if position is not None:
        arm(position, after=bool(seed % 2))
    commands: list[Callable[[], object]] = [
        *(partial(train_as, client, workspace) for client in range(3)),
        lambda: Federation.open(workspace).server.aggregate(),
        lambda: Federation.open(workspace).server.aggregate(),
        lambda: Federation.open(workspace).status(),
        lambda: Federation.open(workspace).gc(),
    ]
    for _ in range(25):
        with suppress(BusyError, NotReadyError, AssertionError):  # not ready: the round went on, or nothing is due
            generator.choice(commands)()


def ends(workspace: Path) -> list[dict]:
    """Return each round's files, and whose updates it counted."""
    found = []
    for number in range(ROUNDS + 1):
        manifest = read_manifest(workspace, number)
        merged = manifest["aggregation"] or {"counted": []}
        counted = [entry["client"] for entry in merged["counted"]]
        found.append({"files": manifest["files"], "counted": counted})
    return found


def go_on(workspace: Path) -> None:
    federation = Federation.open(workspace)
    while federation.state.head.manifest.state == "open":
        for client in range(3):
            train_as(client, workspace)
        federation.server.aggregate()


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
def test_processes_that_work_at_once_and_are_killed_lose_nothing(small_template, algorithm, tmp_path):
    memory = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path)
    base = memory / f"fedcli-concurrency-{os.getpid()}"
    start = Path(shutil.copytree(small_template, base / "start"))
    configure(start, f"federation.rounds={ROUNDS}", "retention.keep_last=2")
    restart(start, algorithm)
    counts = dict.fromkeys(("federations", "processes", "kills", "lost", "doubled", "left over"), 0)
    problems = []
    try:
        undisturbed = Path(shutil.copytree(start, base / "undisturbed"))
        go_on(undisturbed)
        for seed in range(NUM_FEDERATIONS):
            workspace = base / "W"
            shutil.rmtree(workspace, ignore_errors=True)
            shutil.copytree(start, workspace)
            generator = random.Random(f"{algorithm} {seed}")
            counts["federations"] += 1
            for _ in range(3):
                positions = [generator.randint(1, 300) if number % 2 else None for number in range(6)]
                seeds = [generator.randrange(2**30) for _ in positions]
                children = [
                    fork(partial(work, workspace, own, position))
                    for own, position in zip(seeds, positions, strict=True)
                ]
                counts["processes"] += len(children)
                counts["kills"] += sum([was_killed(child) for child in children])
            go_on(workspace)
            Federation.open(workspace).gc()
            if ends(workspace) != ends(undisturbed):
                counts["lost"] += 1
                problems.append(f"{seed}: another end")
            if violations := Federation(Workspace(workspace)).verify().violations:
                counts["doubled"] += 1
                problems.append(f"{seed}: {violations}")
            if left := list(workspace.rglob(".tmp-*")):
                counts["left over"] += 1
                problems.append(f"{seed}: {left}")
    finally:
        shutil.rmtree(base)
    recorded("concurrency.json", algorithm, counts, problems)
    assert not problems, "\n".join(problems)
