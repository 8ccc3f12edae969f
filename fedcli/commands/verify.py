"""fedcli verify."""

from fedcli.commands.options import JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import StepDisplay, print_result, use_one_blas_thread
from fedcli.errors import IntegrityError
from fedcli.quantities import plural


def verify(workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Check every round and counted update on disk; list what is wrong, and exit with 7 if anything is."""
    use_one_blas_thread()
    with StepDisplay(json_output, "rounds") as observer:
        result = found_federation(workspace).verify(observer=observer)
    lines = [
        f"checked {plural(result.num_rounds, 'round')}: {plural(result.num_files, 'file')} by hash, "
        f"{plural(result.num_updates, 'counted update')}, {plural(result.num_recomputed, 'aggregate')} computed again, "
        f"{plural(result.num_baselines, 'baseline')}"
    ]
    if result.num_hidden:
        updates = plural(result.num_hidden, "counted update")
        lines.append(f"{updates} may not be read by this user: let the server's user verify them")
    if result.num_pruned:
        lines.append(
            f"{plural(result.num_pruned, 'aggregate')} not computed again: "
            "`fedcli gc` has removed what they were made of"
        )
    lines += [f"{violation.path}: {violation.problem}" for violation in result.violations] or ["no violation"]
    print_result(json_output, result, lines)
    if result.violations:
        raise IntegrityError(
            plural(len(result.violations), "violation"),
            hint="Restore what is damaged from a backup; what a client dropped, it may drop again.",
            is_reported=True,
        )
