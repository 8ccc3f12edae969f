"""fedcli client status."""

from fedcli.commands.client_train import client_document, describe_client
from fedcli.commands.options import ClientOption, JsonOption, WorkspaceOption
from fedcli.commands.output import at, print_hint, print_json


def status(client: ClientOption, workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Show how a client stands in the open round."""
    from fedcli.client.due import client_status
    from fedcli.operations.status import next_of_client
    from fedcli.workspace.layout import find_workspace

    found = find_workspace(workspace)
    result = client_status(found, client)
    if json_output:
        print_json(client_document(result))
        return
    print(describe_client(result))
    if result.status == "due":
        print_hint(f"next: {next_of_client(found, client)}{at(workspace)}")
