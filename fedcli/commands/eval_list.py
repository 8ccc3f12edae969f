"""fedcli eval list."""

from contextlib import suppress
from typing import Annotated

from typer import Option

from fedcli.commands.options import BenchmarkDataOption, JsonOption, WorkspaceOption
from fedcli.commands.output import print_hint, print_json


def list(
    group: Annotated[str | None, Option(metavar="NAME", help="Only the benchmarks of a group.")] = None,
    data: BenchmarkDataOption = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show all benchmarks: groups, metrics, size, what each needs, and whether its data is on this machine."""
    from fedcli.errors import WorkspaceError
    from fedcli.eval.data import find_roots
    from fedcli.eval.listing import list_benchmarks
    from fedcli.plugins import OWN_PACKAGE
    from fedcli.workspace.layout import find_workspace
    from fedcli.workspace.row_files import find_files

    roots = find_roots(data)
    with suppress(WorkspaceError):  # a workspace may hold rows of its own; the list needs none
        roots = (*roots, find_workspace(workspace).data)
    listed = list_benchmarks(group, roots, find_files)
    if json_output:
        print_json([entry.document() for entry in listed])
        return
    for entry in listed:
        found = entry.benchmark
        metrics = [metric.name for metric in found.metrics if not metric.is_detail]
        num_details = len(found.metrics) - len(metrics)
        origin = "" if entry.package == OWN_PACKAGE else f"; from the package {entry.package}"
        print(f"{found.name}: {found.title} ({found.size:,} items; {', '.join(found.groups) or 'no group'}{origin})")
        print(f"    metrics: {', '.join(metrics)}{f' and {num_details} details' if num_details else ''}")
        needs = f"; needs: {', '.join(found.needs)}" if found.needs else ""
        lacks = f"; this machine lacks: {', '.join(entry.missing)}" if entry.missing else ""
        print(f"    data: {entry.data}{needs}{lacks}")
    print_hint(
        "data: local (its files are here), cached (of the hub), hub (it would be fetched), missing; --json says more"
    )
