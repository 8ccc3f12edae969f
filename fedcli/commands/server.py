"""fedcli server: what the server does."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from typer import Option

from fedcli.commands.options import ClientOption, JsonOption, ThreadsOption, WorkspaceOption, found_federation
from fedcli.commands.output import (
    StepDisplay,
    at,
    describe_round_scores,
    print_hint,
    print_json,
    print_result,
    tell,
    use_one_blas_thread,
)
from fedcli.errors import NotReadyError, UsageError
from fedcli.federation import Server
from fedcli.observer import Observer
from fedcli.quantities import plural

if TYPE_CHECKING:
    from fedcli.scoring.after_rounds import RoundScores
    from fedcli.server.aggregate import AggregationResult


def server_open(workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Open round 0 unless it is open; `fedcli init` does it too."""
    head = found_federation(workspace).server.open()
    manifest = head.manifest
    document = {"round": head.number, "state": manifest.state, "cohort": manifest.cohort}
    print_result(json_output, document, f"round {head.number} of {manifest.rounds} is {manifest.state}")


def server_aggregate(
    algorithm: Annotated[
        str | None, Option("--algo", metavar="NAME", help="Merge with this algorithm, this time only.")
    ] = None,
    partial: Annotated[bool, Option("--partial", help="Go ahead with one valid update or more.")] = False,
    abandon: Annotated[
        bool, Option("--abandon", help="End a round of secure aggregation without its updates.")
    ] = False,
    refuse_arriving: Annotated[
        bool, Option("--refuse-arriving", help="Refuse updates that are not all there: nothing more of them comes.")
    ] = False,
    wait: Annotated[float, Option(min=0, metavar="SECONDS", help="Wait so long for missing updates.")] = 0.0,
    dry_run: Annotated[bool, Option("--dry-run", help="Read and check all updates; publish nothing.")] = False,
    no_score: Annotated[
        bool, Option("--no-score", help="Leave the scores of eval.every to `fedcli server score`.")
    ] = False,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Merge the open round's updates and publish the next round.

    Exits with 6, naming the missing clients, while too few of the cohort have answered. Then makes the scores that are
    due, as eval.every asks.
    """
    use_one_blas_thread()
    server = found_federation(workspace).server
    scores = not (dry_run or no_score)
    try:
        with StepDisplay(json_output, "updates") as observer:
            result = server.aggregate(
                algorithm=algorithm,
                partial=partial,
                abandon=abandon,
                refuse_arriving=refuse_arriving,
                dry_run=dry_run,
                wait=wait,
                observer=observer,
            )
    except NotReadyError:
        if scores:
            _scores(server)
        raise
    if not json_output:
        _print(result, at(workspace), abandon=abandon)
    scored = _scores(server) if scores else []
    if json_output:
        document = {name: getattr(result, name) for name in ("status", "round", "state", "aggregation")}
        print_json(document | ({"scored": scored} if scored else {}))


def _print(result: "AggregationResult", here: str, *, abandon: bool = False) -> None:
    if result.aggregation is None:
        tell(f"nothing to do: the federation has finished at round {result.round}")
        return
    done = result.aggregation
    clients = ", ".join(
        str(entry.client) if entry.base is None else f"{entry.client} from round {entry.base}" for entry in done.counted
    )
    verb = {"published": "merged", "overtaken": "another server merged", "dry_run": "would merge"}[result.status]
    who = "client" if len(done.counted) == 1 else "clients"
    if done.counted:
        tell(f"{verb} {plural(len(done.counted), 'update')} ({who} {clients})")
    else:
        why = "the round was abandoned" if abandon else "all clients of the round have left or were revoked"
        tell(f"{verb} no update: {why}; the adapter stays as it is")
    for entry in done.refused:
        tell(f"refused client {entry.client}: {entry.code}: {entry.reason}")
    if done.missing:
        tell(f"missing: {', '.join(map(str, done.missing))}")
    if done.surplus:
        tell(f"not needed: {', '.join(map(str, done.surplus))}")
    if result.status != "dry_run":
        tell(f"round {result.round} is {result.state}")
    elif done.refused:
        print_hint(f"next: fedcli server discard --id {done.refused[0].client}{here} lets that client send again")


def server_run(workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Merge every round as soon as it is ready, until the last; clients train elsewhere.

    Scores that eval.every asks for are made while it waits, and at the end.
    """
    use_one_blas_thread()
    server = found_federation(workspace).server
    display = _Display(server, json_output)
    head = server.run(observer=display)
    display.score()
    document = {"round": head.number, "state": head.manifest.state}
    print_result(json_output, document, f"the federation has finished at round {head.number}")


@dataclass
class _Display(Observer):
    """Says what goes on, and scores what is due while there is nothing to merge."""

    server: Server
    json_output: bool

    def round_done(self, result: "AggregationResult") -> None:
        if not self.json_output:
            print_hint(f"round {result.round} is there")

    def waiting(self, message: str) -> None:
        if not self.json_output:
            print_hint(message)
        self.score()

    def score(self) -> None:
        for scores in self.server.score():
            if scores.error or not self.json_output:
                print_hint(describe_round_scores(scores))


def server_score(
    threads: ThreadsOption = None, workspace: WorkspaceOption = None, json_output: JsonOption = False
) -> None:
    """Make the scores that are due, as eval.every asks; merge nothing."""
    scored = _scores(found_federation(workspace, threads).server)
    print_result(json_output, {"scored": scored}, [] if scored else "nothing to do: no scores are due")


def _scores(server: Server) -> "list[RoundScores]":
    """Make the scores that are due, and tell of each round; the base model is loaded once at most."""
    scored = []
    for scores in server.score():
        print_hint(describe_round_scores(scores))
        scored.append(scores)
    return scored


def server_enrol(
    client: ClientOption,
    fingerprint: Annotated[
        str | None, Option(metavar="F", help="Of the party's keys, as it read it out to you.")
    ] = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Enrol a joined party under its keys, once you have compared their fingerprint; from then on its updates count.

    On a terminal it shows the fingerprint and asks; elsewhere --fingerprint is needed. New keys of an enrolled party,
    which its old ones signed, need none.
    """
    server = found_federation(workspace).server
    try:
        told, is_new = server.enrol(client, fingerprint)
    except UsageError as error:
        if fingerprint is not None or json_output or not sys.stdin.isatty():
            raise
        tell(f"{error.message}\nDid client {client} read out the same to you? [y/N]: ", end="", is_error=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            tell("nobody was enrolled")
            return
        told, is_new = server.enrol(client, error.message.split()[-1])
    text = f"client {client} {'is enrolled' if is_new else 'was enrolled already'} under {told}"
    document = {"status": "enrolled", "client": client, "fingerprint": told, "is_new": is_new}
    print_result(json_output, document, text)


def server_revoke(client: ClientOption, workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Take a client out: it is drawn no more, not waited for, and its updates are refused.

    What was counted stays part of the model. `fedcli server enrol` takes it in again.
    """
    is_new = found_federation(workspace).server.revoke(client)
    text = "is revoked: it is drawn no more, and not waited for" if is_new else "was revoked already"
    print_result(json_output, {"status": "revoked", "client": client, "is_new": is_new}, f"client {client} {text}")


def server_discard(client: ClientOption, workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Set aside a client's update of the open round, so that the client may send another.

    Where it has none it is the client's oldest update of an earlier round that may still count.
    """
    discarded = found_federation(workspace).server.discard(client)
    print_result(
        json_output,
        {"status": "discarded" if discarded else "nothing_to_discard", "client": client},
        f"client {client}: {'its update is set aside' if discarded else 'has no update that may still count'}",
        hint=f"next: fedcli client train --id {client}{at(workspace)}" if discarded else "",
    )
