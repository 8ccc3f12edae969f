"""The recorded campaign: kill -9 of real processes at random moments, the federation going on after each.

$FEDCLI_KILLS kills (50; CI: 5). With $FEDCLI_RECORD=FILE the kills and their moments are written there as JSON.
"""

import json
import os
import random
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, SMALL, command, fedcli, settings

from fedcli.rounds.status import read_status
from fedcli.rounds.verification import verify
from fedcli.workspace.layout import Workspace

NUM_KILLS = int(os.environ.get("FEDCLI_KILLS", "50"))
LONGEST_LIFE = {"client train": 9.0, "server aggregate": 0.6, "run": 9.0}
"""Seconds; a process is killed at a moment drawn evenly from its life."""


@pytest.mark.slow
def test_a_federation_survives_kill_9_at_random_moments_and_ends_as_if_undisturbed(tmp_path: Path) -> None:
    rounds = NUM_KILLS + 5
    # Cohorts of one: so a round needs one training, and the server gets its share of the kills.
    overrides = [*SMALL[2:], "federation.clients=3", "federation.per_round=1", f"federation.rounds={rounds}"]
    for name in ("killed", "undisturbed"):
        assert fedcli("init", name, *settings(*overrides), cwd=tmp_path).returncode == 0
    workspace = Workspace(tmp_path / "killed")
    rng = random.Random(2026)
    kills = []
    while len(kills) < NUM_KILLS:
        status = read_status(workspace)
        name, arguments = choose(rng, status.missing)
        life = rng.uniform(0, LONGEST_LIFE[name])
        process = subprocess.Popen(
            command(*arguments), cwd=workspace.root, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            process.communicate(timeout=life)
            assert process.returncode == 0, (name, process.returncode)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills.append({"command": name, "seconds": round(life, 3), "round": status.round})
        assert verify(workspace).violations == []
    started = time.monotonic()
    for name in ("killed", "undisturbed"):
        done = fedcli("run", "-w", name, cwd=tmp_path, timeout=600)
        assert done.returncode == 0, done.stderr
    result = verify(workspace)
    assert result.violations == []
    assert result.num_recomputed == rounds
    for number in range(rounds + 1):
        relative = f"rounds/{number:05d}/adapter/adapter_model.safetensors"
        assert (workspace.root / relative).read_bytes() == (tmp_path / "undisturbed" / relative).read_bytes()
    print(f"{NUM_KILLS} kills: {dict(Counter(kill['command'] for kill in kills))}")
    if record := os.environ.get("FEDCLI_RECORD"):
        summary = {"kills": kills, "rounds": rounds, "violations": 0, "equal_to_undisturbed": True}
        summary["seconds_to_finish_both"] = round(time.monotonic() - started, 1)
        Path(record).write_text(json.dumps(summary, indent=1) + "\n")


def choose(rng: random.Random, missing: list[int]) -> tuple[str, list[object]]:
    """Return a command that has something to do, by name and as arguments."""
    if not missing:
        return "server aggregate", ["server", "aggregate"]
    if rng.random() < 0.2:
        return "run", ["run"]
    return "client train", ["client", "train", "--id", rng.choice(missing)]
