"""fedcli gc."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from typer import Option

from fedcli.commands.options import JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import print_result
from fedcli.quantities import plural

if TYPE_CHECKING:
    from fedcli.operations.gc import Collection


def gc(
    dry_run: Annotated[bool, Option("--dry-run", help="List what would be removed; remove nothing.")] = False,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Remove the weights of old rounds and their updates, as fedcli.yaml's `retention` says.

    Nothing goes that anything refers to: the start, the open round, the best rounds, rounds that are being scored.
    """
    result = found_federation(workspace).gc(dry_run=dry_run)
    if result is None:
        text = "nothing removed: fedcli.yaml says of no round that it may go"
        hint = "next: set retention.keep_last, the number of rounds that stay whole, in fedcli.yaml"
        print_result(json_output, {"status": "no_retention"}, text, hint)
    else:
        print_result(json_output, {"status": "done", **vars(result)}, _describe(result))


def _describe(result: "Collection") -> Iterator[str]:
    verb = "would be removed" if result.is_dry_run else "removed"
    files, rounds = plural(result.num_files, "file"), plural(len(result.rounds), "round")
    yield f"{verb}: {files} of {rounds}, {result.num_bytes:,} bytes"
    if result.is_dry_run and result.rounds:
        yield f"rounds: {', '.join(map(str, result.rounds))}"
    for reason in dict.fromkeys(result.kept.values()):
        numbers = ", ".join(str(number) for number, found in result.kept.items() if found == reason)
        yield f"stays whole: round {numbers}: {reason}"
    if result.num_foreign:
        verb, of = ("is", "belongs") if result.num_foreign == 1 else ("are", "belong")
        yield f"{plural(result.num_foreign, 'update')} {verb} left, which {of} to other users"
