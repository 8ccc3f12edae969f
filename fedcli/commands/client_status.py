"""fedcli client status."""

from fedcli.commands.client_train import client_document, describe_client
from fedcli.commands.options import ClientOption, JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import at, print_result


def status(client: ClientOption, workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Show how a client stands in the open round."""
    from fedcli.operations.status import next_of_client

    federation = found_federation(workspace)
    result = federation.client(client).status()
    hint = f"next: {next_of_client(federation.workspace, client)}{at(workspace)}" if result.status == "due" else ""
    print_result(json_output, client_document(result), describe_client(result), hint)
