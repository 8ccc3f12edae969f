"""fedcli run."""

import time
from typing import TYPE_CHECKING, Annotated

from typer import Option

from fedcli.commands.options import JsonOption, ThreadsOption, WorkspaceOption, found_federation
from fedcli.commands.output import Silent, describe_round_scores, print_hint, print_json, progress_display
from fedcli.observer import Observer

if TYPE_CHECKING:
    from rich.progress import Progress

    from fedcli.scoring.after_rounds import RoundScores
    from fedcli.server.aggregate import AggregationResult
    from fedcli.training.reports import StepReport
    from fedcli.workspace.history import Round


def run(
    rounds: Annotated[
        int | None, Option(min=1, metavar="N", help="Stop after merging so many. Default: at the last.")
    ] = None,
    workers: Annotated[
        int, Option(min=1, metavar="W", help="Train so many clients at once, each on a GPU or a share of the cores.")
    ] = 1,
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Run the whole federation on this machine: its clients take turns, and the base model stays loaded.

    Interrupted and started again, it goes on where it was.
    """
    from fedcli.data.formats import describe_counts

    federation = found_federation(workspace, threads)
    with progress_display(
        json_output, "loss {task.fields[loss]:.3f}", "{task.fields[speed]:.0f} tokens/s", "ETA"
    ) as progress:
        result = federation.run(rounds=rounds, workers=workers, observer=_Display(progress))
    if json_output:
        print_json(result)
        return
    print(f"merged {result.num_merged} round{'s' * (result.num_merged != 1)}; round {result.round} is {result.state}")
    if result.left_out:
        print(f"left out of the clients' rows: {describe_counts(result.left_out)}")
    print(f"adapter: {federation.workspace.adapter(result.round)}")
    print_hint("next: fedcli status, fedcli verify")


class _Display(Observer):
    """One bar over all optimiser steps of the federation."""

    def __init__(self, progress: "Progress | Silent") -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None, loss=float("nan"), speed=0.0)
        self._title = ""
        self._base = 0
        self._steps_done: dict[int, int] = {}
        self._started = 0.0
        self._num_tokens = 0

    def round_started(self, head: "Round") -> None:
        manifest = head.manifest
        steps_of_round = head.num_counted * manifest.train.steps
        self._base, self._steps_done = head.number * steps_of_round, {}
        self._started, self._num_tokens = time.monotonic(), 0
        self._title = f"round {head.number}/{manifest.rounds}"
        self._progress.update(self._task, total=manifest.rounds * steps_of_round, completed=self._base)

    def client_started(self, client: int) -> None:
        self._progress.update(self._task, description=f"{self._title} client {client}")

    def step_done(self, client: int | None, report: "StepReport") -> None:
        assert client is not None
        self._num_tokens += report.num_tokens
        self._steps_done[client] = report.step
        self._progress.update(
            self._task,
            completed=self._base + sum(self._steps_done.values()),
            loss=report.loss,
            speed=self._num_tokens / (time.monotonic() - self._started),
        )

    def worker_died(self, client: int, exit_code: int | None) -> None:
        print_hint(f"the worker that trained client {client} died ({exit_code}); another one tries again")

    def waiting(self, message: str) -> None:
        print_hint(message)

    def round_done(self, result: "AggregationResult") -> None:
        done = result.aggregation
        if done is None or isinstance(self._progress, Silent):
            return
        losses = [entry.train_loss for entry in done.counted if entry.train_loss is not None]
        mean = sum(losses) / len(losses) if losses else float("nan")
        refused = "".join(f"; refused client {entry.client} ({entry.code})" for entry in done.refused)
        self._progress.console.print(f"round {result.round - 1}: mean loss {mean:.3f}{refused}", highlight=False)

    def round_scored(self, milestone: "RoundScores") -> None:
        print_hint(describe_round_scores(milestone))
