"""fedcli gc."""

from typing import Annotated

from typer import Option

from fedcli.commands.options import JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import print_hint, print_json


def gc(
    dry_run: Annotated[bool, Option("--dry-run", help="List what would be removed; remove nothing.")] = False,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Remove the weights of old rounds and their updates, as fedcli.yaml's `retention` says.

    Nothing goes that anything refers to: the start, the open round, the best rounds, rounds that are being scored.
    """
    result = found_federation(workspace).gc(dry_run=dry_run)
    if json_output:
        print_json({"status": "no_retention"} if result is None else {"status": "done", **vars(result)})
        return
    if result is None:
        print("nothing removed: fedcli.yaml says of no round that it may go")
        print_hint("next: set retention.keep_last, the number of rounds that stay whole, in fedcli.yaml")
        return
    verb = "would be removed" if dry_run else "removed"
    print(f"{verb}: {result.num_files} files of {len(result.rounds)} rounds, {result.num_bytes:,} bytes")
    if dry_run and result.rounds:
        print(f"rounds: {', '.join(map(str, result.rounds))}")
    for reason in dict.fromkeys(result.kept.values()):
        numbers = ", ".join(str(number) for number, found in result.kept.items() if found == reason)
        print(f"stays whole: round {numbers}: {reason}")
    if result.num_foreign:
        print(f"{result.num_foreign} updates are left, which belong to other users")
