"""fedcli verify."""

from fedcli.commands.options import JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import print_json, step_display


def verify(workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Check every round and counted update on disk; list what is wrong, and exit with 7 if anything is."""
    from fedcli.errors import IntegrityError

    with step_display(json_output, "rounds") as observer:
        result = found_federation(workspace).verify(observer=observer)
    if json_output:
        print_json(result)
    else:
        print(
            f"checked {result.num_rounds} rounds: {result.num_files} files by hash, "
            f"{result.num_updates} counted updates, {result.num_recomputed} aggregates computed again, "
            f"{result.num_baselines} baselines"
        )
        if result.num_hidden:
            print(
                f"{result.num_hidden} counted updates may not be read by this user: let the server's user verify them"
            )
        if result.num_pruned:
            print(f"{result.num_pruned} aggregates not computed again: `fedcli gc` has removed what they were made of")
        for violation in result.violations:
            print(f"{violation.path}: {violation.problem}")
    if result.violations:
        raise IntegrityError(
            f"{len(result.violations)} violation{'s' if len(result.violations) > 1 else ''}",
            hint="Restore what is damaged from a backup; what a client dropped, it may drop again.",
            is_reported=True,
        )
    if not json_output:
        print("no violation")
