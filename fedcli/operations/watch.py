"""Looking at a federation again and again: manifests are read when a round is new, else a look is a few stat calls."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from fedcli.server.late import countable, late_of
from fedcli.server.quorum import needed_answers, seconds_left
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.history import Round, read_round
from fedcli.workspace.records import Manifest

WATCH_SECONDS = 1.0
"""Between two looks."""
MOST_PAST = 60
"""Merged rounds that are remembered."""
_TIMED = 5
"""The last rounds, whose time tells how long the next ones will take."""


@dataclass(frozen=True)
class PastRound:
    """A merged round; `mean_loss` is of the counted updates that tell theirs."""

    number: int
    mean_loss: float | None
    num_counted: int
    refused: Sequence[int]
    missing: Sequence[int]
    seconds: float
    """From its publication to the next one's, by the disk's clock."""


@dataclass(frozen=True)
class View:
    """A federation at one instant."""

    workspace: str
    head: Manifest
    answered: Sequence[int]
    missing: Sequence[int]
    needed: int
    past: Sequence[PastRound]
    deadline_seconds: float | None
    """To the open round's deadline, negative past it; None where it has none."""
    eta_seconds: float | None
    """To the end of the last round, if rounds go on as the last ones did; None where that is not known."""


class Watcher:
    """Looks at one workspace."""

    def __init__(self, federation: FederationState) -> None:
        self._federation = federation
        self._past: deque[PastRound] = deque(maxlen=MOST_PAST)
        self._before: Round | None = None

    def look(self) -> View:
        """Return how the federation stands now; raise IntegrityError for a damaged manifest."""
        federation = self._federation
        federation.refresh()
        head, manifest = federation.head, federation.head.manifest
        first = self._before.number + 1 if self._before else max(0, head.number - MOST_PAST)
        for number in range(first, head.number + 1):
            self._remember(head if number == head.number else read_round(federation.workspace, number))
        missing = head.missing_clients()
        return View(
            workspace=federation.workspace.title,
            head=manifest,
            answered=sorted({*head.awaited_clients()} - {*missing}),
            missing=sorted(missing),
            needed=max(0, needed_answers(federation) - self._num_late()),
            past=list(self._past),
            deadline_seconds=seconds_left(federation),
            eta_seconds=self._eta(),
        )

    def views(self) -> Iterator[View]:
        """Yield a view every WATCH_SECONDS until the federation has finished; the last one shows it finished."""
        while (view := self.look()).head.state == "open":
            yield view
            time.sleep(WATCH_SECONDS)
        yield view

    def _num_late(self) -> int:
        """Return how many updates of earlier rounds may count in the open round's merge."""
        federation = self._federation
        if federation.head.manifest.staleness is None or federation.head.manifest.state != "open":
            return 0
        return len(countable(*late_of(federation)))

    def _remember(self, after: Round | None) -> None:
        before, self._before = self._before, after
        if before is None or after is None or after.manifest.aggregation is None:
            return
        done = after.manifest.aggregation
        losses = [entry.train_loss for entry in done.counted if entry.train_loss is not None]
        self._past.append(
            PastRound(
                number=before.number,
                mean_loss=sum(losses) / len(losses) if losses else None,
                num_counted=len(done.counted),
                refused=[entry.client for entry in done.refused],
                missing=done.missing,
                seconds=max(0.0, after.published - before.published),
            )
        )

    def _eta(self) -> float | None:
        head, config = self._federation.head, self._federation.config
        manifest = head.manifest
        known = [past.seconds for past in self._past][-_TIMED:]
        if manifest.state != "open" or not known:
            return None
        each, spent = median(known), max(0.0, time.time() - head.published)
        return max(0.0, each - spent) + each * (config.federation.rounds - manifest.round - 1)
