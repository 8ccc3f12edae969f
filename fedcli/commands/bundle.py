"""fedcli bundle: rounds and updates as files."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from fedcli.commands.options import ClientOption, HomeOption, JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import CarryDisplay, at, print_result
from fedcli.commands.sync import describe
from fedcli.errors import IntegrityError
from fedcli.quantities import plural

if TYPE_CHECKING:
    from fedcli.operations.bundle import Bundled, Imported


def bundle_round(
    which: Annotated[str, Argument(metavar="[N|latest] FILE", help="The round, and the file to write.")],
    file: Annotated[Path | None, Argument(hidden=True)] = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Write what a party needs to train in a round into one signed file.

    It holds fedcli.yaml, the enrolment and the rounds; those between the first and this one without their weights.
    """
    number, path = ("latest", Path(which)) if file is None else (which, file)
    with CarryDisplay(json_output, "bundle", visible=False) as observer:
        result = found_federation(workspace).bundle_round(path, number, observer=observer)
    print_result(json_output, result, _describe(result), hint=f"next, at the party: fedcli bundle import {path.name}")


def bundle_update(
    client: ClientOption,
    file: Annotated[Path, Argument(metavar="FILE", help="The file to write.")],
    home: HomeOption = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Write what a party sends into one signed file: its registration, and its update of the open round."""
    with CarryDisplay(json_output, "bundle", visible=False) as observer:
        result = found_federation(workspace).client(client, home=home).bundle(file, observer=observer)
    print_result(json_output, result, _describe(result), hint=f"next, at the server: fedcli bundle import {file.name}")


def bundle_import(
    file: Annotated[Path, Argument(metavar="FILE", help="The bundle.")],
    server: Annotated[
        str | None, Option(metavar="F", help="The fingerprint that the server's keys must have, as its operator told.")
    ] = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Take a bundle in: it makes or completes a party's workspace, or brings a party's part to the server.

    Nothing is taken from a bundle that is damaged, not signed by whoever must, or of another workspace. Taken in twice
    it changes nothing.
    """
    from fedcli.federation import Federation
    from fedcli.workspace.address import find_workspace, workspace_at

    named = workspace or os.environ.get("FEDCLI_WORKSPACE")
    place = workspace_at(named) if named else find_workspace(None)
    with CarryDisplay(json_output, "bundle", visible=False) as observer:
        result = Federation(place).import_bundle(file, server=server, observer=observer)
    print_result(json_output, result, _describe_import(result), hint=_next(result, at(workspace)))
    if result.carried.differing:
        raise IntegrityError(
            f"{plural(len(result.carried.differing), 'thing')} in {file} differ from what is there, and never change",
            hint="They are left as they are; `fedcli verify` tells whether those here are damaged.",
            is_reported=json_output,
        )


def _describe(result: "Bundled") -> Iterator[str]:
    whose = "" if result.client is None else f" of client {result.client}"
    what = f"round {result.round}" if result.client is None else f"update{whose} of round {result.round}"
    if not result.has_update and result.client is not None:
        what = f"registration{whose}, which has sent no update of round {result.round}"
    yield f"{result.path}: {what}, {plural(result.num_files, 'file')}, {result.num_bytes:,} bytes"


def _describe_import(result: "Imported") -> Iterator[str]:
    whose = "" if result.client is None else f" of client {result.client}"
    yield f"a bundle of round {result.round}{whose}"
    if result.server is not None:
        yield f"signed by the server {result.server}"
    yield from describe(result.carried)


def _next(result: "Imported", here: str) -> str:
    if result.unenrolled is not None:
        return (
            f"next: compare client {result.client}'s fingerprint with it by telephone, then run\n"
            f"  fedcli server enrol --id {result.client} --fingerprint {result.unenrolled}{here}"
        )
    if result.client is not None:
        return f"next: fedcli server aggregate{here}"
    if result.carried.is_first and result.server is not None:
        return (
            "next: compare the server's fingerprint with its operator by telephone, then\n"
            f"  fedcli client join --id N --data SOURCE --server {result.server}{here}"
        )
    return f"next: fedcli client train --id N{here}"
