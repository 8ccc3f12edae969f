"""fedcli init."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from fedcli.commands.options import JsonOption
from fedcli.commands.output import at, describe_data, print_hint, print_json, rows_display


def init(
    directory: Annotated[
        Path | None, Argument(metavar="DIR", help="The folder of the workspace. Default: this one.")
    ] = None,
    preset: Annotated[str | None, Option(metavar="NAME", help="The settings to start from. Default: demo.")] = None,
    overrides: Annotated[
        list[str] | None, Option("--set", metavar="KEY.PATH=VALUE", help="Override a setting; may be repeated.")
    ] = None,
    list_presets: Annotated[bool, Option("--list-presets", help="List the presets and stop.")] = False,
    workspace: Annotated[Path | None, Option("--workspace", "-w", metavar="DIR", help="The same as DIR.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Make a workspace and open its round 0.

    A folder that holds a fedcli.yaml of yours is initialised from that. Run again after an interruption, it goes on.
    """
    from fedcli.federation import create
    from fedcli.server.create import presets

    if list_presets:
        names = sorted(presets())
        print_json({"presets": names}) if json_output else print(*names, sep="\n")
        return
    directory = directory or workspace or Path(".")
    with rows_display(json_output) as observer:
        creation = create(directory, preset=preset, overrides=overrides or [], observer=observer)
    head, created, data = creation.federation.head, creation.is_new, creation.data
    manifest = head.manifest
    if json_output:
        print_json(
            {
                "status": "created" if created else "exists",
                "workspace": str(directory.absolute()),
                "round": head.number,
                "cohort": manifest.cohort,
                "data": data,
            }
        )
        return
    verb = "made" if created else "already there"
    print(f"workspace {directory.absolute()} {verb}: round {head.number} of {manifest.rounds} is {manifest.state}")
    if data is not None:
        print(describe_data(data))
    if manifest.cohort:
        print(f"cohort: {', '.join(map(str, manifest.cohort))}")
        where = "" if directory.absolute() == Path.cwd() else at(directory)
        if creation.has_rows:
            print_hint(
                f"next: fedcli client train --id {manifest.cohort[0]}{where}, or fedcli run{where} for all rounds"
            )
        else:
            print_hint(f"next: each party: fedcli client join --id N --data SOURCE{where}")
