"""fedcli verify."""

from pathlib import Path
from typing import Annotated

from typer import Option

from fedcli.commands.options import JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import StepDisplay, print_result, use_one_blas_thread
from fedcli.errors import IntegrityError
from fedcli.printable import on_one_line
from fedcli.quantities import plural


def verify(
    trust: Annotated[
        Path | None, Option(metavar="FILE", help="Keys that you vouch for, as `fedcli keys show --json` prints them.")
    ] = None,
    noise_key: Annotated[
        list[Path] | None,
        Option(metavar="FILE", help="The key of a round's noise, or a folder of keys: it is computed again."),
    ] = None,
    parent: Annotated[
        str | None,
        Option(
            metavar="DIR|URL", help="A region's parent, whose rounds its own begin from. Default: as relayed from here."
        ),
    ] = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Check every round and counted update on disk; list what is wrong, and exit with 7 if anything is."""
    use_one_blas_thread()
    with StepDisplay(json_output, "rounds") as observer:
        federation = found_federation(workspace)
        result = federation.verify(trust=trust, noise_keys=noise_key or [], parent=parent, observer=observer)
    lines = [
        f"checked {plural(result.num_rounds, 'round')}: {plural(result.num_files, 'file')} by hash, "
        f"{plural(result.num_updates, 'counted update')}, {plural(result.num_recomputed, 'aggregate')} computed again, "
        f"{plural(result.num_baselines, 'baseline')}"
        + (f", {plural(result.num_signatures, 'signature')}" if result.num_signatures else "")
        + (f", {plural(result.num_relayed, 'beginning')} from a parent's round" if result.num_relayed else "")
    ]
    if result.num_hidden:
        updates = plural(result.num_hidden, "counted update")
        lines.append(f"{updates} may not be read by this user: let the server's user verify them")
    if result.num_pruned:
        lines.append(
            f"{plural(result.num_pruned, 'aggregate')} not computed again: "
            "`fedcli gc` has removed what they were made of"
        )
    if result.num_gone:
        lines.append(
            f"{plural(result.num_gone, 'counted update')} gone, in part or whole: their hashes are recorded, and what "
            "was made of them is not computed again"
        )
    if result.noisy_rounds:
        lines.append(
            f"not computed again, for the key of the noise in it was not given (--noise-key): the adapter of "
            f"{'round' if len(result.noisy_rounds) == 1 else 'rounds'} {', '.join(map(str, result.noisy_rounds))}"
        )
    lines += [on_one_line(f"note: {remark.path}: {remark.problem}") for remark in result.remarks]
    lines += [on_one_line(f"{violation.path}: {violation.problem}") for violation in result.violations] or [
        "no violation"
    ]
    print_result(json_output, result, lines)
    if result.violations:
        raise IntegrityError(
            plural(len(result.violations), "violation"),
            hint="Restore what is damaged from a backup; what a client dropped, it may drop again.",
            is_reported=True,
        )
