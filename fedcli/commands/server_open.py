"""fedcli server open."""

from fedcli.commands.options import JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import print_json


def open_(workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Open round 0 unless it is open; `fedcli init` does it too."""
    head = found_federation(workspace).server.open()
    if json_output:
        print_json({"round": head.number, "state": head.manifest.state, "cohort": head.manifest.cohort})
    else:
        print(f"round {head.number} of {head.manifest.rounds} is {head.manifest.state}")
