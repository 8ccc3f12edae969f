"""Federations of a small workspace whose clients share one factor, or train an adapter of their own."""

import shutil
from pathlib import Path

from fedcli import Federation
from support.federation import NUM_SAMPLES, configure, restart, train_as


def sharing(small: Path, folder: Path, share: str, algorithm: str = "fedavg", *more: str) -> Path:
    """Return a copy of the small workspace whose round 0 shares so."""
    workspace = Path(shutil.copytree(small, folder))
    configure(workspace, f"aggregation.share={share}", "federation.rounds=4", *more)
    restart(workspace, algorithm)
    return workspace


def play(workspace: Path, rounds: int) -> None:
    """Let all clients answer, and merge, so many times."""
    for _ in range(rounds):
        for client in NUM_SAMPLES:
            train_as(client, workspace)
        assert Federation.open(workspace).server.aggregate().published
