"""fedcli train-alone."""

from fedcli.commands.options import (
    ClientOption,
    HomeOption,
    JsonOption,
    ThreadsOption,
    WorkspaceOption,
    found_federation,
)
from fedcli.commands.train_pooled import BaselineDisplay, print_baseline


def train_alone(
    client: ClientOption,
    home: HomeOption = None,
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Train one client alone, with the federation's steps and schedule: the baseline that federation must beat."""
    alone = found_federation(workspace, threads).client(client, home=home)
    title = f"client {client} alone"
    with BaselineDisplay(json_output, title) as observer:
        result = alone.train_alone(observer=observer)
    print_baseline(title, result, workspace, json_output)
