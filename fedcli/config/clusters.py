"""fedcli.yaml's section `clusters`: several adapters in place of one, each of some of the clients."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedcli.config.section import Section

MOST_CLUSTERS = 64


class ClustersConfig(Section):
    """How clients come together to adapters: `by` groups that are named here, by loss, or by direction.

    By loss a client takes, in each round, the adapter of the least loss on its own rows (IFCA, Ghosh et al. 2020). By
    direction there is one adapter at first; it splits in two where its clients' differences point apart: where the norm
    of their mean is below `split_below` of the largest (CFL, Sattler et al. 2021). `count` is how many there are by
    loss, and at most by direction.
    """

    by: Literal["groups", "loss", "direction"] | None = None
    count: Annotated[int, Field(ge=2, le=MOST_CLUSTERS)] | None = None
    groups: dict[str, tuple[Annotated[int, Field(ge=0)], ...]] | None = None
    split_below: Annotated[float, Field(gt=0, lt=1)] = 0.4

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.by == "groups") != (self.groups is not None):
            raise ValueError("groups names each group's clients, with by: groups and no other")
        if (self.by in ("loss", "direction")) != (self.count is not None):
            raise ValueError(
                "count is how many adapters there are by loss, and at most by direction; else leave it out"
            )
        if self.groups is not None and not 2 <= len(self.groups) <= MOST_CLUSTERS:
            raise ValueError(f"groups has {len(self.groups)} names: 2 to {MOST_CLUSTERS} are allowed")
        if self.groups is not None and (empty := [name for name, clients in self.groups.items() if not clients]):
            raise ValueError(f"groups.{empty[0]} names no client: nobody would train its adapter")
        if self.by != "direction" and self.split_below != ClustersConfig.model_fields["split_below"].default:
            raise ValueError(f"split_below is of by: direction, and by is {self.by}")
        return self

    def check_clients(self, num_clients: int) -> None:
        """Raise ValueError where not every client is in one group, or there are more adapters than clients."""
        if self.by == "loss" and self.count is not None and self.count > num_clients:
            raise ValueError(
                f"clusters.count is {self.count}, and federation.clients is {num_clients}: an adapter "
                "would have no client"
            )
        if self.groups is None:
            return
        named = sorted(client for clients in self.groups.values() for client in clients)
        if named != list(range(num_clients)):
            odd = sorted({*named} ^ {*range(num_clients)}) or [each for each in named if named.count(each) > 1]
            raise ValueError(
                f"clusters.groups must name each of the clients 0 to {num_clients - 1} once: see client {odd[0]}"
            )
