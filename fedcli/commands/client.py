"""fedcli client: what a party does."""

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

from fedcli.commands.options import (
    ClientOption,
    HomeOption,
    JsonOption,
    ThreadsOption,
    WorkspaceOption,
    found_federation,
)
from fedcli.commands.output import StepDisplay, TrainingDisplay, at, print_result, tell
from fedcli.errors import FedError, UsageError, error_document
from fedcli.federation import Federation
from fedcli.quantities import name_clients, plural

if TYPE_CHECKING:
    from fedcli.client.due import ClientResult
    from fedcli.parties.join import Joining
    from fedcli.training.reports import StepReport
    from fedcli.workspace.history import Round


def client_join(
    client: ClientOption,
    data: Annotated[str, Option(metavar="SOURCE", help="Your rows: a file, a folder, or a hub id. They stay there.")],
    data_format: Annotated[
        str | None,
        Option(
            "--format",
            metavar="FORMAT",
            help="What the rows are: a format's name, or '{columns: {instruction: question, response: answer}}'. "
            "Default: as the hub's data set is known to have, else guessed from the columns.",
        ),
    ] = None,
    home: HomeOption = None,
    base: Annotated[
        str | None, Option(metavar="DIR", help="Your copy of the base model. Default: as fedcli.yaml says.")
    ] = None,
    share: Annotated[
        Literal["full", "minimal"] | None,
        Option(help="minimal: tell the number of rows and nothing else. Default: as before, else full."),
    ] = None,
    server: Annotated[
        str | None,
        Option(
            metavar="FINGERPRINT", help="What the server's keys must be. Default: what they are now, or were before."
        ),
    ] = None,
    subset: Annotated[str | None, Option(metavar="NAME", help="Of a hub's data set.")] = None,
    split: Annotated[str | None, Option(metavar="NAME", help="Of a hub's data set.")] = None,
    delimiter: Annotated[
        str | None, Option(metavar="CHARACTER", help="Between the cells of .csv files. Default: as their header shows.")
    ] = None,
    encoding: Annotated[str | None, Option(metavar="NAME", help="Of text files. Default: UTF-8.")] = None,
    floors: Annotated[
        list[str] | None,
        Option(
            "--floor",
            metavar="KEY=VALUE",
            help="The least that a round must ask for: rows, steps, batch_size; targets, where LoRA may lie; "
            "secure, whether what you send must be masked. "
            "Default: as before, else rows=2 and targets=layers.",
        ),
    ] = None,
    select: Annotated[
        str | None,
        Option(
            metavar="SELECTION",
            help="Which of your rows to train on: off, or as '{score: ira, keep: 0.8}'. Default: as before, else as "
            "each round asks.",
        ),
    ] = None,
    share_scores: Annotated[
        bool | None,
        Option(
            "--share-scores/--no-share-scores",
            help="Let your updates tell how many rows have which score. Default: as before, else not.",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Run code that comes with the base model, on your machine.")
    ] = False,
    allow_code_execution: Annotated[
        bool,
        Option("--allow-code-execution", help="Run code that the model wrote, in a sandbox, for task grpo."),
    ] = False,
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask before the data card is written.")] = False,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Join as a real party: your rows stay where they are, and the workspace gets a data card that you see first.

    On a terminal you are asked before it is written; elsewhere, and with --json, you are not. Run again, it replaces
    your card; --share and --base hold as before, and so do --format and the like for the same rows.
    """
    federation = found_federation(workspace)
    asks = not yes and not json_output and sys.stdin.isatty()
    with StepDisplay(json_output, visible=False) as observer:
        joining = federation.client(client, home=home).join(
            data,
            format=data_format,
            subset=subset,
            split=split,
            delimiter=delimiter,
            encoding=encoding,
            base=base,
            trust_remote_code=trust_remote_code,
            allow_code_execution=allow_code_execution,
            share=share,
            server=server,
            floors=floors or (),
            select=select,
            shares_scores=share_scores,
            observer=observer,
        )
    card = joining.card.model_dump(mode="json", exclude_none=True)
    if not json_output:
        _tell_card(joining, card)
    if asks:
        question = f"Write this to {federation.workspace.registration(client)}? [y/N]: "
        tell(question, end="", is_error=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            tell("nothing was written")
            return
    told = joining.commit()
    own = "" if home is None else f" --home {shlex.quote(str(home.absolute()))}"
    document = {"status": "joined", "client": client, "home": str(joining.home.folder), "data": card}
    lines = [f"client {client} has joined; its private state lies in {joining.home.folder}"]
    hint = f"next: fedcli client train --id {client}{own}{at(workspace)}"
    if told is not None:
        document |= {"fingerprint": told, "server_fingerprint": joining.record.server}
        lines += [f"your keys:         {told}", f"the server's keys: {joining.record.server}"]
        hint = f"{_enrolment_hint(federation, client, told)}{hint}"
    print_result(json_output, document | {"remarks": [*joining.remarks], "kept": [*joining.kept]}, lines, hint)


def _tell_card(joining: "Joining", card: dict[str, object]) -> None:
    for line in joining.remarks:
        tell(line)
    if joining.kept:
        tell(f"as before: {', '.join(joining.kept)}")
    if card:
        tell("the workspace learns this of your rows, and nothing else:")
        tell(json.dumps(card, indent=1))
    else:
        tell("the workspace learns nothing of your rows, not even how many there are")


def _enrolment_hint(federation: Federation, client: int, fingerprint: str) -> str:
    """Return what the server's operator has yet to do before the client's updates count; "" where nothing is left."""
    standing = federation.keys().clients.get(client)
    is_leaving = client in federation.status().leaving
    if standing is not None and (standing.state, standing.fingerprint) == ("enrolled", fingerprint) and not is_leaving:
        return ""
    place = at(federation.workspace.address) if federation.workspace.store.is_remote else ""
    first = f"client {client} has left, and is taken out when the server next merges; then\n" if is_leaving else ""
    return first + (
        "compare both fingerprints with the server's operator by telephone, who then runs:\n"
        f"  fedcli server enrol --id {client} --fingerprint {fingerprint}{place}\n"
    )


def client_leave(
    client: ClientOption,
    home: HomeOption = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Leave for good: sign that you are drawn no more, and not waited for.

    The server obeys when it next merges. What you sent and was counted stays part of the model.
    """
    is_new = found_federation(workspace).client(client, home=home).leave()
    text = "leaves: the server draws it no more, and does not wait for it" if is_new else "has left already"
    document = {"status": "leaving" if is_new else "left", "client": client}
    print_result(json_output, document, f"client {client} {text}")


def client_train(
    clients: Annotated[str | None, Option("--id", metavar="N[,N...]", help="The client's id, or several.")] = None,
    any_client: Annotated[
        bool, Option("--any", help="All clients of the round that are here and that nobody trains yet.")
    ] = False,
    wait: Annotated[
        float, Option(min=0, metavar="SECONDS", help="Look again for so long where nothing is due yet.")
    ] = 0.0,
    refresh: Annotated[
        bool, Option("--refresh", help="Register rows that have changed anew, with all that you chose when you joined.")
    ] = False,
    home: HomeOption = None,
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Train a client on the open round and drop its update.

    Where nothing is due (not in the cohort, already sent, finished) it says so and succeeds: run it as often as you
    like, on as many machines as you like. Of several clients one that fails is named, the others are trained, and the
    exit code is the first failure's.
    """
    ids = _parse_ids(clients, any_client, home)
    federation = found_federation(workspace, threads)
    if ids is None and _has_nothing_to_do(federation, wait, json_output):
        return
    failure: FedError | None = None
    with _Display(json_output, visible=False) as display:
        if ids is not None and len(ids) == 1:
            display.client_started(ids[0])
            client = federation.client(ids[0], home=home)
            if refresh:
                client.refresh(observer=display)
            results: Sequence[ClientResult] = [client.train(wait=wait, observer=display)]
        else:
            try:
                results = federation.train_clients(ids, wait=wait, refresh=refresh, observer=display)
            except FedError as error:
                if not error.failed:
                    raise
                failure, results = error, error.done
    document: dict[str, object] = {"clients": [_document(result) for result in results]}
    if ids is None:
        document["status"] = "submitted" if results else "failed" if failure else "nothing_due"
    elif len(ids) == 1:
        document = _document(results[0])
    if failure is not None:
        document |= error_document(failure)
        failure.is_reported = True
    lines = [line for result in results for line in _describe(result)]
    if not lines and not failure:
        lines = [_nothing_due(federation.state.head.missing_clients())]
    is_trained = any(result.training for result in results)
    here = at(workspace)
    hint = f"next: fedcli status{here}; once the cohort has answered, fedcli server aggregate{here}"
    print_result(json_output, document, lines, hint if is_trained else "")
    if failure is not None:
        raise failure


def _has_nothing_to_do(federation: Federation, wait: float, json_output: bool) -> bool:
    """Say so, and return True, where a glance shows that no client has anything to do here, or will have."""
    seen = federation.look()
    if seen is None or seen.may_train or (wait and not seen.is_finished):
        return False
    status, text = "nothing_due", _nothing_due(seen.missing)
    if seen.is_finished:
        status, text = "finished", f"nothing to do: the federation has finished at round {seen.round}"
    print_result(json_output, {"status": status, "clients": []}, text)
    return True


def _nothing_due(missing: "Sequence[int]") -> str:
    waits = f"; it waits for {name_clients(missing)}" if missing else ""
    return f"nothing to do: no client of the open round is here, missing and unclaimed{waits}"


def _parse_ids(clients: str | None, any_client: bool, home: Path | None) -> list[int] | None:
    """Return the ids that --id names, or None for --any; raise UsageError for neither, both, or what is no id."""
    if (clients is None) != any_client:
        raise UsageError("name clients with --id, or take --any", hint="One of the two: --id 3, --id 3,7,9 or --any.")
    if clients is None:
        ids = None
    elif all(part.isascii() and part.strip().isdecimal() and len(part) < 20 for part in clients.split(",")):
        ids = list(dict.fromkeys(map(int, clients.split(","))))
    else:
        raise UsageError(
            f"--id {clients[:80]}: not a client's id", hint="An id is a number from 0: --id 3, or --id 3,7,9."
        )
    if home is not None and (ids is None or len(ids) > 1):
        raise UsageError("--home is one client's folder", hint="Name that client alone: --id N --home DIR.")
    return ids


class _Display(TrainingDisplay):
    """Shows one client's steps after another's."""

    _num_steps = 0

    def client_started(self, client: int) -> None:
        self.title = f"client {client}"
        self.begin()
        self.show(description=f"{self.title}: loading", total=None)

    def model_loading(self, head: "Round") -> None:
        self._num_steps = head.manifest.train.steps_made
        self.show(visible=True)

    def rows_read(self, what: str, count: int) -> None:
        self.show(description=f"{self.title}: {count:,} rows read")

    def step_done(self, client: int | None, report: "StepReport") -> None:
        self.show(description=self.title, total=self._num_steps)
        super().step_done(client, report)


def _document(result: "ClientResult") -> dict[str, object]:
    document: dict[str, object] = {"status": result.status, "client": result.client, "round": result.round}
    if result.training is not None:
        training = result.training
        counts = ("num_samples", "num_truncated", "num_unusable", "seconds", "num_tokens")
        counts_by = ("left_out", "first_cases", "notes", "unused")
        document |= {name: getattr(training, name) for name in (*counts, *counts_by)}
        first, last = (training.losses[0], training.losses[-1]) if training.losses else (None, None)
        document |= {"steps": training.steps, "train_loss": training.mean_loss, "first_loss": first, "last_loss": last}
        if training.spent is not None:
            document["privacy"] = training.spent.model_dump(mode="json")
    return document


def _describe_status(result: "ClientResult") -> str:
    who = f"client {result.client}"
    return {
        "finished": f"{who}: nothing to do, the federation has finished at round {result.round}",
        "gone": f"{who}: nothing to do, it has left, or was revoked",
        "not_selected": f"{who}: nothing to do, it is not in the cohort of round {result.round}",
        "already_submitted": f"{who}: nothing to do, its update of round {result.round} has been sent",
        "submitted": f"{who}: {'trained in' if result.training else 'has trained in'} round {result.round} and "
        f"dropped its update{'' if result.training else ' again'}",
        "due": f"{who}: round {result.round} waits for its update",
        "waiting": f"{who}: nothing to do yet, round {result.round} waits until its clients are enrolled",
        "too_late": f"{who}: nothing to do, round {result.round} goes on without it",
        "repair_due": f"{who}: round {result.round} waits for its answer, without which no sum is known",
        "answered": f"{who}: answered the repair of round {result.round}",
        "already_answered": f"{who}: nothing to do, it has answered the repair of round {result.round}",
    }[result.status]


def _describe(result: "ClientResult") -> Iterator[str]:
    yield _describe_status(result)
    training = result.training
    if training is None:
        return
    if training.withholds and not sys.stdout.isatty():
        yield "losses and rows are not told in what may be a log: the federation asks for privacy (--json tells them)"
        return
    from fedcli.data.row_report import describe_counts, describe_rows

    speed = training.num_tokens / training.seconds
    told = "no batch had rows"
    if training.losses:
        told = f"loss {training.losses[0]:.3f} to {training.losses[-1]:.3f} (mean {training.mean_loss:.3f})"
    yield f"{told} in {plural(training.steps, 'step')}, {training.seconds:.1f} s, {speed:.0f} tokens/s"
    if (spent := training.spent) is not None:
        yield f"privacy: its {spent.unit}s have spent epsilon {spent.epsilon:g} so far (delta {spent.delta:g})"
    left_out = f"; left out: {describe_counts(training.left_out)}" if training.left_out else ""
    yield (
        f"rows: {training.num_samples} usable, of these {training.num_truncated} with a response cut to fit{left_out}"
    )
    lines = describe_rows(training)
    yield from (line for line in lines if not line.startswith("left out"))


def client_status(client: ClientOption, workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Show how a client stands in the open round."""
    from fedcli.operations.status import next_of_client

    federation = found_federation(workspace)
    result = federation.client(client).status()
    is_due = result.status in ("due", "repair_due")
    hint = f"next: {next_of_client(federation.workspace, client)}{at(workspace)}" if is_due else ""
    print_result(json_output, _document(result), _describe_status(result), hint)
