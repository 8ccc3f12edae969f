"""fedcli server discard."""

from fedcli.commands.options import ClientOption, JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import at, print_result


def discard(client: ClientOption, workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Set aside a client's update of the open round, so that the client may send another."""
    discarded = found_federation(workspace).server.discard(client)
    print_result(
        json_output,
        {"status": "discarded" if discarded else "nothing_to_discard", "client": client},
        f"client {client}: {'its update is set aside' if discarded else 'has no update in the open round'}",
        hint=f"next: fedcli client train --id {client}{at(workspace)}" if discarded else "",
    )
