"""Printing: data to stdout, progress and hints to stderr, or one JSON document.

All that fedcli prints goes through `tell`, `print_json` and `terminal`: what is foreign in it steers no terminal.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fedcli.observer import Observer
from fedcli.printable import printable, printable_json

SILENCE = 60.0
"""Seconds after which long work says how far it is, where no bar shows it."""

if TYPE_CHECKING:
    from rich.console import Console

    from fedcli.errors import ClientFailure
    from fedcli.parties.simulate import DataSummary
    from fedcli.scoring.after_rounds import RoundScores
    from fedcli.training.reports import StepReport


def use_one_blas_thread() -> None:
    """Let OpenBLAS have one thread, unless the user says otherwise; to be called before numpy is imported.

    Merging has threads of its own. On a busy machine OpenBLAS's would wait for each other: 0.4 s of products took 25.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def tell(text: str = "", *, is_error: bool = False, end: str = "\n") -> None:
    """Print a text on stdout, or stderr, its control characters written out."""
    print(printable(text), end=end, file=sys.stderr if is_error else sys.stdout, flush=is_error)


def print_json(document: object) -> None:
    """Print a JSON document on stdout."""
    print(printable_json(json.dumps(document, default=_plain, ensure_ascii=False, sort_keys=True)))


def terminal(**options: Any) -> "Console":
    """Return rich's Console with these options, in which texts have their control characters written out."""
    from rich.console import Console
    from rich.segment import Segment

    class Terminal(Console):
        def render(self, *arguments: Any, **options: Any) -> Iterator[Segment]:
            for segment in super().render(*arguments, **options):
                yield segment if segment.control else segment._replace(text=printable(segment.text))

    return Terminal(**options)


def print_result(json_output: bool, document: object, text: str | Iterable[str], hint: str = "") -> None:
    """Print a result: under --json its document, else its text or lines of text, and on stderr what to do next."""
    if json_output:
        print_json(document)
        return
    for line in [text] if isinstance(text, str) else text:
        tell(line)
    if hint:
        print_hint(hint)


def print_hint(text: str) -> None:
    """Print what to do next on stderr."""
    tell(text, is_error=True)


def at(workspace: Path | str | None) -> str:
    """Return the option that names the workspace again in the next command; nothing where it was found without."""
    return "" if workspace is None else f" -w {shlex.quote(str(workspace))}"


def relative(paths: Iterable[str | Path]) -> list[str]:
    """Return paths as they are typed from the current folder; those outside it as they are."""
    here = Path.cwd()
    return [str(path.relative_to(here) if path.is_relative_to(here) else path) for path in map(Path, paths)]


class Display(Observer):
    """A bar on stderr while its context lasts; without a terminal, or under --json, none, and rich is not loaded.

    Without a terminal a line is written now and then in its place, so that a log shows that the work goes on.
    """

    columns: tuple[str, ...] = ()
    """What stands behind the bar, in the words of rich: fields of its task."""

    def __init__(self, json_output: bool, title: str = "", *, visible: bool = True) -> None:
        self.title = title
        self.progress = None
        self._is_quiet = json_output
        self._last_line = time.monotonic()
        self._noted: set[str] = set()
        if sys.stderr.isatty() and not json_output:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            front = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
            columns = (*front, *map(TextColumn, self.columns), TimeRemainingColumn())
            self.progress = Progress(*columns, console=terminal(stderr=True), transient=True)
            self._task = self.progress.add_task(title, total=None, visible=visible, loss=float("nan"), speed=0.0)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Put the bar on the terminal."""
        if self.progress is not None:
            self.progress.start()

    def stop(self) -> None:
        """Take the bar off the terminal."""
        if self.progress is not None:
            self.progress.stop()

    def show(self, **fields: Any) -> None:
        """Change what is shown: the fields that rich's Progress.update takes."""
        if self.progress is not None:
            self.progress.update(self._task, **fields)

    def say(self, text: str) -> None:
        """Write a line on stderr that stays, but not under --json."""
        if self._is_quiet:
            return
        self._last_line = time.monotonic()
        if self.progress is None:
            tell(text, is_error=True)
        else:
            self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def noted(self, text: str) -> None:
        """Write a line once."""
        if text not in self._noted:
            self.say(text)
        self._noted.add(text)

    def say_now_and_then(self, text: str) -> None:
        """Write a line where there is no bar, and nothing has been written for SILENCE seconds."""
        if self.progress is None and time.monotonic() - self._last_line >= SILENCE:
            self.say(text)


class FetchDisplay(Display):
    """Shows files that are fetched, and what is said of them."""

    def noted(self, text: str) -> None:
        self.say(text)

    def fetched(self, what: str, num_bytes: int, total: int | None) -> None:
        self.show(description=f"fetching {what}", completed=num_bytes, total=total)
        size = "" if total is None else f" of {total:,}"
        self.say_now_and_then(f"fetching {what}: {num_bytes:,}{size} bytes")


class CarryDisplay(Display):
    """Shows what is copied from one place to another."""

    def carrying(self, what: str, num_bytes: int) -> None:
        self.show(description=f"{what}: {num_bytes:,} bytes", advance=1, visible=True)
        self.say_now_and_then(f"copying {what}: {num_bytes:,} bytes")


class StepDisplay(Display):
    """Shows what is done now: rows that are read, a check, a client, an update."""

    def rows_read(self, what: str, count: int) -> None:
        self.show(description=f"{what}: {count:,}", visible=True)

    def checking(self, what: str) -> None:
        self.show(advance=1, description=what)

    def client_started(self, client: int) -> None:
        self.show(advance=1, description=f"client {client}")

    def update_read(self, round_number: int, client: int) -> None:
        self.show(advance=1, description=f"round {round_number}, update of client {client}")


class TrainingDisplay(Display):
    """Shows optimiser steps: how many are done, the last loss, and the tokens of a second."""

    columns: tuple[str, ...] = ("loss {task.fields[loss]:.3f}", "{task.fields[speed]:.0f} tokens/s")

    def __init__(self, json_output: bool, title: str = "", *, visible: bool = True) -> None:
        super().__init__(json_output, title, visible=visible)
        self._told: dict[str, ClientFailure] = {}
        """Why clients failed: the first one for each reason."""
        self._scoring = ""
        self.begin()

    def begin(self, steps_before: int = 0) -> None:
        """Count steps from here, so many of which came before, and their tokens anew."""
        self._steps_before, self._num_tokens, self._started = steps_before, 0, 0.0
        self._steps: dict[int | None, int] = {}

    def step_done(self, client: int | None, report: "StepReport") -> None:
        if self._steps:
            self._num_tokens += report.num_tokens
        else:  # loading ends with the first step: speed is measured from here
            self._started = time.monotonic()
        self._steps[client] = report.step
        speed = self._num_tokens / max(1e-9, time.monotonic() - self._started)
        done = self._steps_before + sum(self._steps.values())
        told = "" if report.loss is None else f" loss {report.loss:.3f},"
        self.show(completed=done, speed=speed, **({} if report.loss is None else {"loss": report.loss}))
        who = "" if client is None or self.title == f"client {client}" else f", client {client}"
        self.say_now_and_then(f"{self.title}{who}: step {report.step},{told} {speed:.0f} tokens/s")

    def rows_read(self, what: str, count: int) -> None:
        self.say_now_and_then(f"{self.title}: {what}, {count:,} so far")

    def target_started(self, target: str, benchmark: str) -> None:
        self._scoring = f"{target}: {benchmark}"

    def answered(self, num_done: int, num_asked: int) -> None:
        text = f"{self._scoring}: {num_done:,} of {num_asked:,} answered"
        self.show(description=text)
        self.say_now_and_then(text)

    def client_failed(self, failure: "ClientFailure") -> None:
        """Name who failed and why, the same reason once."""
        what = f"client {failure.client} failed in round {failure.round}"
        told = self._told.setdefault(failure.message, failure)
        if told is failure:
            self.say(f"{what}: {failure.message}\n  {failure.hint}")
        else:
            again = "again" if told.client == failure.client else f"as client {told.client} did"
            self.say(f"{what}, {again}, for the same reason")


def describe_data(data: "DataSummary") -> str:
    """Return how a simulation's rows were split: used, left out by reason, shares."""
    from fedcli.data.row_report import describe_rows

    sizes = data.sizes
    share = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else str(sizes[0])
    text = f"rows: {data.num_rows} read, {sum(sizes)} given to {len(sizes)} clients, {share} each"
    return "\n".join([*data.remarks, text, *describe_rows(data)])


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
