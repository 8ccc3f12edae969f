"""fedcli server run."""

from typing import TYPE_CHECKING

from fedcli.commands.options import JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import describe_round_scores, print_hint, print_result
from fedcli.federation import Server
from fedcli.observer import Observer

if TYPE_CHECKING:
    from fedcli.server.aggregate import AggregationResult


def run(workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Merge every round as soon as it is ready, until the last; clients train elsewhere.

    Scores that eval.every asks for are made while it waits, and at the end.
    """
    server = found_federation(workspace).server
    display = _Display(server, json_output)
    head = server.run(observer=display)
    display.score()
    document = {"round": head.number, "state": head.manifest.state}
    print_result(json_output, document, f"the federation has finished at round {head.number}")


class _Display(Observer):
    """Says what goes on, and scores what is due while there is nothing to merge."""

    def __init__(self, server: Server, json_output: bool) -> None:
        self._server = server
        self._json_output = json_output

    def round_done(self, result: "AggregationResult") -> None:
        if not self._json_output:
            print_hint(f"round {result.round} is there")

    def waiting(self, message: str) -> None:
        if not self._json_output:
            print_hint(message)
        self.score()

    def score(self) -> None:
        for scores in self._server.score():
            if scores.error or not self._json_output:
                print_hint(describe_round_scores(scores))
