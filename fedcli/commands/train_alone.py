"""fedcli train-alone."""

from fedcli.commands.options import ClientOption, HomeOption, JsonOption, ThreadsOption, WorkspaceOption
from fedcli.commands.train_pooled import train_and_print


def train_alone(
    client: ClientOption,
    home: HomeOption = None,
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Train one client alone, with the federation's steps and schedule: the baseline that federation must beat."""
    train_and_print(client, threads, workspace, json_output, home)
