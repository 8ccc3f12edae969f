"""Printing: data to stdout, progress and hints to stderr, or one JSON document."""

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fedcli.observer import Observer

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from fedcli.parties.simulate import DataSummary
    from fedcli.scoring.after_rounds import RoundScores


def print_json(document: object) -> None:
    """Print a JSON document on stdout."""
    print(json.dumps(document, default=_plain, ensure_ascii=False, sort_keys=True))


def print_hint(text: str) -> None:
    """Print what to do next on stderr."""
    print(text, file=sys.stderr)


def at(workspace: Path | None) -> str:
    """Return the option that names the workspace again in the next command; nothing where it was found without."""
    return "" if workspace is None else f" -w {shlex.quote(str(workspace))}"


class Silent:
    """Takes what rich's Progress is told, and shows nothing."""

    def add_task(self, description: str, **_: Any) -> "TaskID":
        """Return a number that stands for nothing."""
        return cast("TaskID", 0)

    def update(self, task_id: "TaskID", **_: Any) -> None:
        """Pass over it."""

    def start(self) -> None:
        """Pass over it."""

    def stop(self) -> None:
        """Pass over it."""


@contextmanager
def progress_display(json_output: bool, *columns: str) -> "Iterator[Progress | Silent]":
    """Show progress bars on stderr; stay quiet, and load nothing, under --json or where stderr is no terminal."""
    if json_output or not sys.stderr.isatty():
        yield Silent()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *(TextColumn(column) for column in columns),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        yield progress


@contextmanager
def rows_display(json_output: bool) -> Iterator[Observer]:
    """Show how many rows were read or written so far."""
    with progress_display(json_output) as progress:
        yield _StepDisplay(progress, "rows", visible=False)


@contextmanager
def step_display(json_output: bool, title: str) -> Iterator[Observer]:
    """Show what is done now: a check, a client, an update that is read."""
    with progress_display(json_output) as progress:
        yield _StepDisplay(progress, title, visible=True)


class _StepDisplay(Observer):
    """A line that says what is done now."""

    def __init__(self, progress: "Progress | Silent", title: str, *, visible: bool) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=None, visible=visible)

    def rows_read(self, what: str, count: int) -> None:
        self._progress.update(self._task, description=f"{what}: {count:,}", visible=True)

    def checking(self, what: str) -> None:
        self._progress.update(self._task, advance=1, description=what)

    def client_started(self, client: int) -> None:
        self._progress.update(self._task, advance=1, description=f"client {client}")

    def update_read(self, round_number: int, client: int) -> None:
        self._progress.update(self._task, advance=1, description=f"round {round_number}, update of client {client}")


def describe_data(data: "DataSummary") -> str:
    """Return how a simulation's rows were split: used, left out by reason, shares."""
    from fedcli.data.formats import describe_counts

    sizes = data.sizes
    share = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else str(sizes[0])
    text = f"rows: {data.num_rows} read, {sum(sizes)} given to {len(sizes)} clients, {share} each"
    if data.left_out:
        text += f"\nleft out: {describe_counts(data.left_out)}"
    if data.notes:
        text += f"\nnoted: {describe_counts(data.notes)}"
    return text


def describe_round_scores(milestone: "RoundScores") -> str:
    """Return the scores of a new round in a line, and why there are none of others."""
    found = [
        f"{record.name} {name} {entry.value:.3f}"
        for record in milestone.scores
        for name, entry in record.scores.items()
        if not entry.is_detail
    ]
    waiting = [f"{record.name} waits for {record.awaits}" for record in milestone.scores if record.awaits]
    told = [f"round {milestone.round} scored: {'; '.join(found + waiting)}"] if milestone.scores else []
    if milestone.error is not None:
        told.append(f"round {milestone.round} is published, but could not be scored: {milestone.error}")
    return "\n".join(told)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return str(value)
