"""What records say of clusters: which adapters a round has, whose they are, and which split."""

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    model_validator,
)

from fedcli.config.clusters import MOST_CLUSTERS
from fedcli.workspace.record import Finite, Id, Natural, Record


class Split(Record):
    """A cluster that split in two: these clients go on with an adapter of their own."""

    cluster: Natural
    into: Natural
    clients: list[Natural]


class ClustersRecord(Record):
    """Which adapters a round has, and whose they are."""

    unwritten = ("of", "names", "most", "split_below")

    by: Literal["groups", "loss", "direction"]
    count: Annotated[int, Field(ge=1, le=MOST_CLUSTERS)]
    of: dict[Id, Natural] | None = None
    """The cluster of each client; None by loss, where each chooses in each round."""
    names: list[str] | None = None
    """Of the groups."""
    most: Annotated[int, Field(ge=2, le=MOST_CLUSTERS)] | None = None
    """By direction: how many there may be; the next is the share of the largest norm below which one splits."""
    split_below: Finite | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.of is not None and (most := max(self.of.values(), default=0)) >= self.count:
            raise ValueError(f"a client is of cluster {most} of {self.count}")
        if self.names is not None and len(self.names) != self.count:
            raise ValueError(f"{len(self.names)} names of {self.count} clusters")
        return self

    def of_client(self, client: int, chosen: int | None) -> int:
        """Return the cluster that a client's update is made for, by its own word where it may choose; 0 without one."""
        return (chosen or 0) if self.of is None else self.of.get(str(client), 0)

    def fault(self, client: int, chosen: int | None) -> str | None:
        """Return what is wrong with the cluster that a client's update names; None for nothing."""
        if (chosen or 0) >= self.count:
            return f"made for cluster {chosen} of {self.count}"
        if (chosen or 0) != self.of_client(client, chosen):
            return f"made for cluster {chosen or 0}, the client is of cluster {self.of_client(client, chosen)}"
        return None
