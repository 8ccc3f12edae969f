"""Options that many commands share."""

from pathlib import Path
from typing import Annotated

from typer import Option

from fedcli.federation import Federation
from fedcli.workspace.address import find_workspace


def found_federation(workspace: str | None, threads: int | None = None) -> Federation:
    """Return the federation that --workspace, $FEDCLI_WORKSPACE or the current folder names."""
    return Federation(find_workspace(workspace), threads=threads)


WorkspaceOption = Annotated[
    str | None,
    Option(
        "--workspace",
        "-w",
        metavar="DIR|URL",
        help="The workspace. Default: $FEDCLI_WORKSPACE, else the nearest parent that holds a fedcli.yaml.",
    ),
]
JsonOption = Annotated[bool, Option("--json", help="Print one JSON document on stdout, and nothing else there.")]
ClientOption = Annotated[int, Option("--id", metavar="N", help="The client's id.")]
BenchmarkDataOption = Annotated[
    Path | None,
    Option(metavar="DIR", help="The benchmarks' files; FILE for `rows`. Default: $FEDCLI_BENCHMARKS, else fetched."),
]
ThreadsOption = Annotated[
    int | None,
    Option(
        min=1,
        metavar="N",
        help="CPU threads. Default: $OMP_NUM_THREADS, else all cores; give clients that run at once a share each.",
    ),
]
HomeOption = Annotated[
    Path | None,
    Option(
        metavar="DIR",
        help="A joined party's own folder, outside the workspace. Default: $FEDCLI_HOME, else one below "
        "$XDG_DATA_HOME or ~/.local/share.",
    ),
]
