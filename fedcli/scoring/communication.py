"""What all clients of a federation had sent and fetched by the time that a scored model was there."""

from collections.abc import Mapping

from fedcli.workspace.history import read_round
from fedcli.workspace.layout import Workspace
from fedcli.workspace.target_name import TargetName

HEAD = "MB sent and fetched"
"""Of a table's column: megabytes, 10^6 bytes."""


def bytes_until(workspace: Workspace, target: TargetName) -> int | None:
    """Return the bytes that all clients had sent and fetched until a round was published, as its manifest counts them.

    A client alone sends and fetches none. None for any other model, and for a round whose manifest counts nothing.
    """
    if target.kind == "alone":
        return 0
    if target.kind != "round" or target.number is None:
        return None
    found = read_round(workspace, target.number)
    if found is None or (cost := found.manifest.cost) is None:
        return None
    return cost.total_bytes_up + cost.total_bytes_down


def in_megabytes(num_bytes: float) -> str:
    """Return a number of bytes in megabytes, with two decimals."""
    return f"{num_bytes / 1e6:,.2f}"


def is_worth_a_column(communication: Mapping[str, float]) -> bool:
    """Return whether some model took any communication."""
    return any(communication.values())
