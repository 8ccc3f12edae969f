"""Named random streams: every draw comes from the federation's one seed and the name of its purpose."""

import hashlib

import numpy as np


def stream_seed(seed: int, purpose: str, *, round_number: int = 0, client: int = 0, part: str = "") -> int:
    """Return the 128-bit seed of a stream; any two names give independent streams."""
    name = f"fedcli/{seed}/{purpose}/{round_number}/{client}/{part}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big")


def stream(seed: int, purpose: str, *, round_number: int = 0, client: int = 0, part: str = "") -> np.random.Generator:
    """Return numpy's generator (PCG64) for a named stream."""
    return np.random.default_rng(stream_seed(seed, purpose, round_number=round_number, client=client, part=part))


def draw_cohort(seed: int, round_number: int, clients: list[int], size: int) -> list[int]:
    """Draw `size` distinct clients for a round, in the order of the draw."""
    chosen = stream(seed, "cohort", round_number=round_number).choice(len(clients), size=size, replace=False)
    return [clients[int(index)] for index in chosen]
