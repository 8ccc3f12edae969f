"""The records of hierarchy: where a region's rounds stand in its parent's, and what a region's update was made of."""

from typing import Annotated

from pydantic import Field

from fedcli.workspace.layout import WORKSPACE_ID
from fedcli.workspace.record import Natural, Record, Sha256

WorkspaceId = Annotated[str, Field(pattern=WORKSPACE_ID)]


class ParentRound(Record):
    """The round of a parent that a region's rounds began from."""

    workspace: WorkspaceId
    round: Natural
    sha256: Sha256
    """Of the parent's manifest.json."""
    client: Natural
    """Which client of the parent the region is."""
    above: list[WorkspaceId]
    """Whose region the parent is, its own parent first; none where it is the topmost federation."""


class RelayRecord(Record):
    """manifest.relay, of a region."""

    left: Natural
    """How many rounds its parties train before the merged adapter goes to the parent; in a round with 0 nobody does."""
    parent: ParentRound | None
    """None before the region has begun from a parent."""


class RelayedRound(Record):
    """update.json's relay: the region's round whose adapter the update is."""

    workspace: WorkspaceId
    round: Natural
    sha256: Sha256
    """Of the region's manifest.json."""
