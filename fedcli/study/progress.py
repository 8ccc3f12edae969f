"""What a cell tells of itself while it is run."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from fedcli.observer import Observer

if TYPE_CHECKING:
    from fedcli.errors import ClientFailure
    from fedcli.training.reports import StepReport
    from fedcli.workspace.history import Round

INTERVAL = 0.5
"""Seconds between two things told."""


class CellTeller(Observer):
    """Turns a federation's events into short texts: not too many that tell how far it is, and every one to keep."""

    def __init__(self, tell: Callable[[str, bool], object]) -> None:
        self._tell = tell
        self._told = 0.0
        self._where = ""

    def rows_read(self, what: str, count: int) -> None:
        self._say(f"{what}: {count:,}")

    def round_started(self, head: "Round") -> None:
        self._where = f"round {head.number}/{head.manifest.rounds}"
        self._say(self._where)

    def baseline_round(self, number: int, rounds: int, steps: int) -> None:
        self._where = f"baseline, round {number}/{rounds}"
        self._say(self._where)

    def client_failed(self, failure: "ClientFailure") -> None:
        self._tell(f"client {failure.client} failed in round {failure.round}: {failure.message}", True)

    def noted(self, text: str) -> None:
        self._tell(text, True)

    def step_done(self, client: int | None, report: "StepReport") -> None:
        who = "all rows" if client is None else f"client {client}"
        told = "" if report.loss is None else f", loss {report.loss:.3f}"
        self._say(f"{self._where}, {who}: step {report.step}{told}")

    def target_started(self, target: str, benchmark: str) -> None:
        self._where = f"{target} on {benchmark}"
        self._say(self._where)

    def answered(self, num_done: int, num_asked: int) -> None:
        self._say(f"{self._where}: {num_done:,} of {num_asked:,} answered")

    def _say(self, text: str) -> None:
        if time.monotonic() - self._told >= INTERVAL:
            self._told = time.monotonic()
            self._tell(text, False)
