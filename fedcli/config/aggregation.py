"""fedcli.yaml's section `aggregation`, which is also how a manifest records the rule that made a round."""

from dataclasses import asdict
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedcli.algos.robust import Rule, RuleName
from fedcli.config.section import Section


class AggregationConfig(Section):
    """What takes the place of the weighted mean of the updates' differences, in every algorithm.

    `tolerate` is how many updates may be hostile; `nearest_mixing` replaces each update by the mean of its nearest
    before the rule; `weight_cap` is the most that an update may weigh in the mean, in medians. `step_weighting` makes
    differences of unequal steps comparable (algos/unequal.py). Updates made from up to `staleness` rounds back count,
    too, `most_counted` of a client at most in so many merges and the one before them.
    """

    rule: RuleName = "mean"
    tolerate: Annotated[int, Field(ge=0)] = 1
    nearest_mixing: bool = False
    weight_cap: Annotated[float, Field(ge=1)] | None = None
    step_weighting: Literal["none", "fednova"] = "none"
    staleness: Annotated[int, Field(ge=0, le=1000)] = 0
    most_counted: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weight_cap is not None and self.rule != "mean":
            raise ValueError(f"weight_cap is set, and {self.rule} takes no account of rows: only the mean is weighted")
        if self.most_counted is not None and not self.staleness:
            raise ValueError("most_counted is set, and staleness is 0: a client then counts once in a round")
        return self

    def check_most_counted(self, num_clients: int, num_counted: int) -> None:
        """Raise ValueError where clients may count so seldom that a window cannot be filled."""
        window = self.staleness + 1
        if self.most_counted is not None and self.most_counted * num_clients < num_counted * window:
            raise ValueError(
                f"aggregation.most_counted is {self.most_counted}: in {window} rounds {num_clients} clients then give "
                f"{self.most_counted * num_clients} updates, and {num_counted * window} are to count "
                "(federation.per_round)"
            )

    def as_rule(self) -> Rule:
        """Return the rule."""
        return Rule(**{name: getattr(self, name) for name in asdict(Rule())})

    def check_enough(self, num_counted: int) -> None:
        """Raise ValueError where so few updates count in a round that the rule cannot tolerate what it should."""
        rule = self.as_rule()
        if num_counted < rule.fewest:
            what = f"{self.rule}{' with nearest_mixing' if self.nearest_mixing else ''}"
            raise ValueError(
                f"aggregation.tolerate is {self.tolerate}: {what} then needs {rule.fewest} updates a round, "
                f"and {num_counted} count (federation.per_round)"
            )
