"""fedcli slurm: the federation as jobs of SLURM."""

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from typer import Option

from fedcli.commands.options import JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import at, print_result

if TYPE_CHECKING:
    from fedcli.operations.slurm_submit import Submission


def slurm_script(workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Write the open round's batch scripts for SLURM, and send nothing."""
    scripts = found_federation(workspace).slurm.write_scripts()
    quoted = {kind: shlex.quote(str(path)) for kind, path in scripts.items()}
    after = f"--dependency=afterany:$(sbatch --parsable {quoted['clients']}) " if "clients" in quoted else ""
    print_result(
        json_output,
        {"scripts": scripts},
        map(str, scripts.values()) if scripts else "nothing to write: the federation has finished",
        hint=f"next: fedcli slurm submit, which is\n  sbatch {after}{quoted['server']}" if scripts else "",
    )


def slurm_submit(
    dry_run: Annotated[bool, Option("--dry-run", help="Print what would be sent; send nothing.")] = False,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Send the open round to SLURM: an array of its clients, and a job that merges and sends the next round.

    What is in the queue already is not sent again: run it as often as you like.
    """
    result = found_federation(workspace).slurm.submit(dry_run=dry_run)
    hint = f"next: fedcli status{at(workspace)}" if result.status in ("submitted", "in_place") else ""
    print_result(json_output, result, _describe(result), hint)


def _describe(result: "Submission") -> Iterator[str]:
    if result.cancelled:
        verb = "would cancel" if result.status == "dry_run" else "cancelled"
        yield f"{verb} jobs of closed rounds: {', '.join(map(str, result.cancelled))}"
    if result.status == "finished":
        yield f"nothing to send: the federation has finished at round {result.round}"
    elif result.status == "in_place":
        yield f"nothing to send: the jobs of round {result.round} are in the queue"
    for request in result.requests:
        yield f"would send, for round {result.round}, {request.kind}:\n{result.scripts[request.kind]}"
    for job in result.sent:
        whom = f" for clients {', '.join(map(str, job.clients))}" if job.clients else ""
        yield f"round {result.round}: {job.kind} is job {job.id}{whom}"
    if result.elsewhere:
        yield f"trained elsewhere, and waited for: {', '.join(map(str, result.elsewhere))}"
