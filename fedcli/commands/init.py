"""fedcli init."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from fedcli.commands.options import JsonOption
from fedcli.commands.output import StepDisplay, at, describe_data, print_result

if TYPE_CHECKING:
    from fedcli.workspace.federation_state import FederationState


def init(
    directory: Annotated[
        str | None, Argument(metavar="DIR|URL", help="The folder or URL of the workspace. Default: this folder.")
    ] = None,
    preset: Annotated[
        str | None, Option(metavar="NAME", help="The settings to start from (--list-presets). Default: demo.")
    ] = None,
    overrides: Annotated[
        list[str] | None, Option("--set", metavar="KEY.PATH=VALUE", help="Override a setting; may be repeated.")
    ] = None,
    list_presets: Annotated[bool, Option("--list-presets", help="List the presets, a line each, and stop.")] = False,
    workspace: Annotated[str | None, Option("--workspace", "-w", metavar="DIR|URL", help="The same as DIR.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Make a workspace and open its round 0.

    A folder that holds a fedcli.yaml of yours is initialised from that. Run again after an interruption, it goes on.
    """
    from fedcli.server.create import create_workspace, describe_preset, presets

    if list_presets:
        found = {name: describe_preset(path) for name, path in sorted(presets().items())}
        text = [f"{name:<{max(map(len, found))}}  {line}" for name, line in found.items()]
        print_result(json_output, {"presets": list(found), "descriptions": found}, text)
        return
    directory = directory or workspace or "."
    with StepDisplay(json_output, visible=False) as observer:
        creation = create_workspace(directory, preset=preset, overrides=overrides or [], observer=observer)
    head, created, data = creation.federation.head, creation.is_new, creation.data
    manifest, where = head.manifest, creation.federation.workspace.address
    verb = "made" if created else "already there"
    text = [f"workspace {where} {verb}: round {head.number} of {manifest.rounds} is {manifest.state}"]
    if creation.has_lost_identity:
        text.append(f"workspace.json was missing: it has the id of round 0 again, {manifest.workspace}")
    text += [] if data is None else [describe_data(data)]
    text += [f"note: {note}" for note in creation.notes]
    keys = _server_keys(creation.federation)
    if keys is not None:
        text.append(f"the server's keys: {keys['fingerprint']}, in {keys['file']}: keep a backup of them")
    option = "" if where == str(Path.cwd()) else at(directory)
    if data is not None:
        told = f"rows longer than train.max_length ({manifest.train.max_length} tokens) are cut, or left out"
        text.append(f"{told}: fedcli data preview{option} counts them")
    hint = ""
    if manifest.cohort:
        text.append(f"cohort: {', '.join(map(str, manifest.cohort))}")
        hint = f"next: each party: fedcli client join --id N --data SOURCE{option}"
        if creation.has_rows:
            hint = f"next: fedcli client train --id {manifest.cohort[0]}{option}, or fedcli run{option} for all rounds"
    document = {"status": "created" if created else "exists", "workspace": where, "round": head.number}
    more = {"cohort": manifest.cohort, "data": data, "notes": creation.notes} | ({"keys": keys} if keys else {})
    print_result(json_output, document | more, text, hint)


def _server_keys(federation: "FederationState") -> dict[str, str] | None:
    """Return the fingerprint of the server's keys, and where they lie; None where signatures are off."""
    if federation.identity.signatures is None:
        return None
    from fedcli.operations.keys import read_keys
    from fedcli.workspace.layout import server_home

    file = server_home(federation.identity.id).keys
    return {"fingerprint": read_keys(federation).server.fingerprint, "file": str(file)}
