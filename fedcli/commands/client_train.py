"""fedcli client train."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from fedcli.commands.options import ClientOption, HomeOption, JsonOption, ThreadsOption, WorkspaceOption
from fedcli.commands.output import print_hint, print_json, progress_display

if TYPE_CHECKING:
    from fedcli.rounds.client import ClientResult
    from fedcli.rounds.parties import Party
    from fedcli.rounds.runtime import Runtime
    from fedcli.training.reports import StepReport
    from fedcli.workspace.history import Round


def train(
    client: ClientOption,
    wait: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Look again for so long where nothing is due yet.")
    ] = 0.0,
    home: HomeOption = None,
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Train a client on the open round and drop its update.

    Where nothing is due (not in the cohort, already sent, finished) it says so and succeeds: run it as often as you
    like.
    """
    from fedcli.rounds.client import train_client
    from fedcli.rounds.settings import read_running_config
    from fedcli.workspace.layout import find_workspace

    found = find_workspace(workspace)
    with progress_display(json_output, "loss {task.fields[loss]:.3f}", "{task.fields[speed]:.0f} tokens/s") as progress:
        task = progress.add_task(f"client {client}: loading", total=None, visible=False, loss=float("nan"), speed=0.0)
        started = time.monotonic()
        num_tokens = steps = 0
        num_rows = 0

        def count_rows(count: int) -> None:
            nonlocal num_rows, started
            num_rows += count
            started = time.monotonic()
            progress.update(task, description=f"client {client}: {num_rows:,} rows read")

        def load_runtime(head: "Round", party: "Party") -> "Runtime":
            from fedcli.rounds.runtime import Runtime

            nonlocal steps
            steps = head.manifest.train.steps
            progress.update(task, visible=True)
            config = read_running_config(found)
            return Runtime(found, config, head, threads=threads, party=party, on_rows=count_rows)

        def show(report: "StepReport") -> None:
            nonlocal num_tokens
            num_tokens += report.num_tokens
            speed = num_tokens / (time.monotonic() - started)
            progress.update(
                task,
                description=f"client {client}",
                total=steps,
                completed=report.step,
                loss=report.loss,
                speed=speed,
            )

        result = train_client(found, client, home=home, wait=wait, load_runtime=load_runtime, on_step=show)
    print_json(client_document(result)) if json_output else _print(result)


def client_document(result: "ClientResult") -> dict[str, object]:
    """Return the JSON form of a client's result."""
    document: dict[str, object] = {"status": result.status, "client": result.client, "round": result.round}
    if result.training is not None:
        training = result.training
        document |= {
            "num_samples": training.num_samples,
            "num_truncated": training.num_truncated,
            "num_unusable": training.num_unusable,
            "left_out": training.left_out,
            "steps": len(training.losses),
            "train_loss": training.mean_loss,
            "first_loss": training.losses[0],
            "last_loss": training.losses[-1],
            "seconds": training.seconds,
            "num_tokens": training.num_tokens,
        }
    return document


def describe_client(result: "ClientResult") -> str:
    """Return one line on how a client stands."""
    who = f"client {result.client}"
    return {
        "finished": f"{who}: nothing to do, the federation has finished at round {result.round}",
        "not_selected": f"{who}: nothing to do, it is not in the cohort of round {result.round}",
        "already_submitted": f"{who}: nothing to do, its update of round {result.round} has been sent",
        "submitted": f"{who}: trained in round {result.round} and dropped its update",
        "due": f"{who}: round {result.round} waits for its update",
    }[result.status]


def _print(result: "ClientResult") -> None:
    from fedcli.data.formats import describe_counts

    print(describe_client(result))
    training = result.training
    if training is None:
        return
    speed = training.num_tokens / training.seconds
    print(
        f"loss {training.losses[0]:.3f} to {training.losses[-1]:.3f} (mean {training.mean_loss:.3f}) "
        f"in {len(training.losses)} steps, {training.seconds:.1f} s, {speed:.0f} tokens/s"
    )
    left_out = f"; left out: {describe_counts(training.left_out)}" if training.left_out else ""
    print(
        f"rows: {training.num_samples} usable, of these {training.num_truncated} with a response cut to fit{left_out}"
    )
    print_hint("next: fedcli status; once the cohort has answered, fedcli server aggregate")
