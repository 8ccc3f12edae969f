"""fedcli server score."""

from typing import TYPE_CHECKING

from fedcli.commands.options import JsonOption, ThreadsOption, WorkspaceOption, found_federation
from fedcli.commands.output import describe_round_scores, print_hint, print_result
from fedcli.federation import Federation

if TYPE_CHECKING:
    from fedcli.scoring.after_rounds import RoundScores


def score(threads: ThreadsOption = None, workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Make the scores that are due, as eval.every asks; merge nothing."""
    scored = score_and_tell(found_federation(workspace, threads))
    print_result(json_output, {"scored": scored}, [] if scored else "nothing to do: no scores are due")


def score_and_tell(federation: Federation) -> "list[RoundScores]":
    """Make the scores that are due, and tell of each round; the base model is loaded once at most."""
    scored = []
    for scores in federation.server.score():
        print_hint(describe_round_scores(scores))
        scored.append(scores)
    return scored
