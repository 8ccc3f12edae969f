"""fedcli server open."""

from fedcli.commands.options import JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import print_result


def open(workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Open round 0 unless it is open; `fedcli init` does it too."""
    head = found_federation(workspace).server.open()
    manifest = head.manifest
    document = {"round": head.number, "state": manifest.state, "cohort": manifest.cohort}
    print_result(json_output, document, f"round {head.number} of {manifest.rounds} is {manifest.state}")
