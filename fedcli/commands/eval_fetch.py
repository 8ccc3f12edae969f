"""fedcli eval fetch: benchmarks' files, once, into fedcli's cache."""

from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from fedcli.commands.options import JsonOption
from fedcli.commands.output import FetchDisplay, print_hint, print_json, tell
from fedcli.errors import error_document

if TYPE_CHECKING:
    from fedcli.eval.fetched import Fetched


def eval_fetch(
    names: Annotated[list[str] | None, Argument(metavar="[NAME...]", help="Benchmarks or groups.")] = None,
    group: Annotated[str | None, Option(metavar="NAME", help="All benchmarks of a group.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Fetch benchmarks' files once into fedcli's cache, each checked by its sha256; scoring does it by itself.

    The files come from their publishers or the hub ($HF_ENDPOINT); $FEDCLI_MIRROR names a mirror of the publishers.
    """
    from fedcli.eval.fetched import describe, failure, fetch_benchmarks

    with FetchDisplay(json_output, "fetching") as display:
        found = fetch_benchmarks(names or (), group, display)
    error = failure(found)
    if json_output:
        print_json([_document(each) for each in found])
    else:
        for each in found:
            if each.folder is not None:
                tell(describe(each))
            elif each.error is None or each.error is not error:
                print_hint(describe(each))
        if not found:
            print_hint("nothing to fetch: a workspace of the built-in rows holds these benchmarks' rows")
        elif any(each.folder is not None for each in found):
            print_hint(
                "on a machine without a network, copies of these folders belong into its own cache: benchmarks/ in "
                "$FEDCLI_CACHE, else in ~/.cache/fedcli"
            )
    if error is not None:
        error.is_reported = json_output
        raise error


def _document(found: "Fetched") -> dict[str, Any]:
    told = error_document(found.error)["error"] if found.error is not None else None
    return {**vars(found), "error": told}
