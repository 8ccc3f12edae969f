"""fedcli run."""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from typer import Option

from fedcli.commands.options import JsonOption, ThreadsOption, WorkspaceOption, found_federation
from fedcli.commands.output import TrainingDisplay, at, describe_round_scores, print_result
from fedcli.quantities import describe_seconds, name_clients, plural

if TYPE_CHECKING:
    from fedcli.scoring.after_rounds import RoundScores
    from fedcli.server.aggregate import AggregationResult
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

    Interrupted and started again, it goes on where it was. A client that fails is named, and the round goes on with the
    others; where too few are left for federation.quorum, the command ends with the first failure's exit code.
    """
    from fedcli.data.row_report import describe_rows

    federation = found_federation(workspace, threads)
    with _Display(json_output, "starting") as display:
        result = federation.run(rounds=rounds, workers=workers, observer=display)
    merged = f"merged {plural(result.num_merged, 'round')}"
    text = [f"{merged}; round {result.round} is {result.state}"]
    text += describe_rows(result, of=" of the clients' rows")
    if result.failed:
        names = name_clients(sorted({failure.client for failure in result.failed}))
        text.append(f"not all of the rounds were answered by {names}: stderr says why")
    text.append(f"adapter: {federation.workspace.adapter(result.round)}")
    document = {name: value for name, value in asdict(result).items() if name != "failed" or value}
    print_result(json_output, document, text, f"next: fedcli status{at(workspace)}, fedcli verify{at(workspace)}")


class _Display(TrainingDisplay):
    """One bar over all optimiser steps of the federation."""

    columns = (*TrainingDisplay.columns, "ETA")

    def round_started(self, head: "Round") -> None:
        steps_of_round = head.num_counted * head.manifest.train.steps_made
        steps_before = head.number * steps_of_round
        self.begin(steps_before)
        self.title = f"round {head.number}/{head.manifest.rounds}"
        self._round_started = time.monotonic()
        self.show(total=head.manifest.rounds * steps_of_round, completed=steps_before)

    def client_started(self, client: int) -> None:
        self.show(description=f"{self.title} client {client}")

    def worker_died(self, client: int, exit_code: int | None) -> None:
        self.say(f"the worker that trained client {client} died ({exit_code}); another one tries again")

    def waiting(self, message: str) -> None:
        self.say(message)

    def round_done(self, result: "AggregationResult") -> None:
        done = result.aggregation
        if done is None:
            return
        losses = [entry.train_loss for entry in done.counted if entry.train_loss is not None]
        mean = f"mean loss {sum(losses) / len(losses):.3f}" if losses else "no loss told"
        refused = "".join(f"; refused client {entry.client} ({entry.code})" for entry in done.refused)
        missing = f"; without {name_clients(done.missing)}" if done.missing else ""
        took = describe_seconds(time.monotonic() - self._round_started)
        who = plural(len(done.counted), "client")
        self.say(f"round {result.round - 1}: {mean}, {who}, {took}{refused}{missing}")

    def round_scored(self, milestone: "RoundScores") -> None:
        self.say(describe_round_scores(milestone))
