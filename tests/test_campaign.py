"""The recorded campaigns: kill -9 of real processes at random moments, the federation going on after each.

$FEDCLI_KILLS kills for each algorithm (50 for fedavg, 25 for the others; CI: 5). With $FEDCLI_RECORD=DIR the kills and
their moments are written there as kill_campaign.json (fedavg) and kill_campaign-ALGORITHM.json.
"""

import json
import os
import platform
import random
import subprocess
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support.processes import ENVIRONMENT, SMALL, command, fedcli, settings

from fedcli import Federation
from fedcli.workspace.layout import Workspace

NUM_KILLS = {"fedavg": 50, "scaffold": 25, "fedyogi": 25}
LIFE = 1.5
"""A process is killed at a moment drawn evenly from so many times what it takes undisturbed, if it still lives then."""
MERGED = {
    "fedavg": ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"],
    "scaffold": ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "control.safetensors"],
    "fedyogi": ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "optimizer.safetensors"],
}
"""The files of a merged round, manifest.json aside."""


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", NUM_KILLS)
def test_a_federation_survives_kill_9_at_random_moments_and_ends_as_if_undisturbed(
    tmp_path: Path, algorithm: str
) -> None:
    num_kills = int(os.environ.get("FEDCLI_KILLS", NUM_KILLS[algorithm]))
    rounds = num_kills * 2 // 3 + 5
    # Cohorts of one: so a round needs one training, and the server gets its share of the kills.
    overrides = [*SMALL[2:], "federation.clients=3", "federation.per_round=1", f"federation.rounds={rounds}"]
    for name in ("killed", "undisturbed"):
        done = fedcli("init", name, *settings(*overrides, f"algorithm.name={algorithm}"), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    workspace = Workspace(tmp_path / "killed")
    longest_life = {name: LIFE * seconds for name, seconds in undisturbed_seconds(tmp_path / "undisturbed").items()}
    rng = random.Random(2026)
    kills = []
    steps = []  # what each process was to do: (round, whether it was the server's turn)
    while len(kills) < num_kills:
        status = Federation(workspace).status()
        assert status.state == "open"
        steps.append((status.round, not status.missing))
        name, arguments = choose(rng, status.missing)
        # After two processes the third may finish what is due: so all rounds, and the server, get their share of kills.
        life = rng.uniform(0, longest_life[name]) if steps.count(steps[-1]) <= 2 else 120
        process = subprocess.Popen(
            command(*arguments), cwd=workspace.root, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            _, said = process.communicate(timeout=life)
            assert process.returncode == 0, (name, process.returncode, said)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills.append({"command": name, "seconds": round(life, 3), "round": status.round})
        assert Federation(workspace).verify().violations == []
    started = time.monotonic()
    for name in ("killed", "undisturbed"):
        done = fedcli("run", "-w", name, cwd=tmp_path, timeout=600)
        assert done.returncode == 0, done.stderr
    result = Federation(workspace).verify()
    assert result.violations == []
    assert result.num_recomputed == rounds
    for number in range(rounds + 1):
        ours, theirs = (round_files(tmp_path / name, number) for name in ("killed", "undisturbed"))
        assert sorted(ours) == (MERGED[algorithm] if number else MERGED["fedavg"])
        assert ours == theirs, f"round {number} differs"
    seconds = round(time.monotonic() - started, 1)
    print(f"{algorithm}: {num_kills} kills: {dict(Counter(kill['command'] for kill in kills))}")
    if folder := os.environ.get("FEDCLI_RECORD"):
        file = Path(folder) / ("kill_campaign.json" if algorithm == "fedavg" else f"kill_campaign-{algorithm}.json")
        summary = {"algorithm": algorithm, "date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": commit()}
        summary |= {"machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"}
        summary |= {"kills": kills, "rounds": rounds, "violations": 0, "equal_to_undisturbed": True}
        summary |= {"seconds_to_finish_both": seconds}
        file.write_text(json.dumps(summary, indent=1) + "\n")


def undisturbed_seconds(root: Path) -> dict[str, float]:
    """Let the first round pass; return how long each command takes on this machine, `run` for one round."""
    (client,) = Federation.open(root).status().missing
    seconds = {}
    for name in ("client train", "server aggregate"):
        arguments = [*name.split(), *(["--id", client] if name == "client train" else [])]
        started = time.monotonic()
        assert fedcli(*arguments, cwd=root).returncode == 0
        seconds[name] = time.monotonic() - started
    return seconds | {"run": sum(seconds.values())}


def round_files(root: Path, number: int) -> dict[str, bytes]:
    """Return the files of a round, its manifest aside: that names the workspace's id and the hashes of updates."""
    folder = root / "rounds" / f"{number:05d}"
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    del files["manifest.json"]
    return files


def commit() -> str:
    """Return the commit that is checked out, and whether the package differs from it."""

    def git(*arguments: str) -> str:
        root = Path(__file__).parents[1]
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "fedcli") else "")


def choose(rng: random.Random, missing: list[int]) -> tuple[str, list[object]]:
    """Return a command that has something to do, by name and as arguments."""
    if not missing:
        return "server aggregate", ["server", "aggregate"]
    if rng.random() < 0.2:
        return "run", ["run", "--rounds", 1]
    return "client train", ["client", "train", "--id", rng.choice(missing)]
