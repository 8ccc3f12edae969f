"""fedcli verify."""

from fedcli.commands.options import JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import StepDisplay, print_result
from fedcli.errors import IntegrityError


def verify(workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Check every round and counted update on disk; list what is wrong, and exit with 7 if anything is."""
    with StepDisplay(json_output, "rounds") as observer:
        result = found_federation(workspace).verify(observer=observer)
    lines = [
        f"checked {result.num_rounds} rounds: {result.num_files} files by hash, "
        f"{result.num_updates} counted updates, {result.num_recomputed} aggregates computed again, "
        f"{result.num_baselines} baselines"
    ]
    if result.num_hidden:
        lines.append(
            f"{result.num_hidden} counted updates may not be read by this user: let the server's user verify them"
        )
    if result.num_pruned:
        lines.append(
            f"{result.num_pruned} aggregates not computed again: `fedcli gc` has removed what they were made of"
        )
    lines += [f"{violation.path}: {violation.problem}" for violation in result.violations] or ["no violation"]
    print_result(json_output, result, lines)
    if result.violations:
        raise IntegrityError(
            f"{len(result.violations)} violation{'s' if len(result.violations) > 1 else ''}",
            hint="Restore what is damaged from a backup; what a client dropped, it may drop again.",
            is_reported=True,
        )
