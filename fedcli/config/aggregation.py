"""fedcli.yaml's section `aggregation`, which is also how a manifest records the rule that made a round."""

from dataclasses import asdict
from typing import Annotated, Any, Literal, Self, TypeAlias, cast, get_args

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from fedcli.algos.robust import Rule, RuleName
from fedcli.algos.share import Share
from fedcli.config.section import Section

Shared: TypeAlias = Literal["[A, B]", "[A]", "[B]", "alternate"]
"""Which of LoRA's factors are sent, as fedcli.yaml has it: a list of them, or one after the other."""


def _shared(value: Any) -> Any:
    if isinstance(value, list | tuple) and all(factor in ("A", "B") for factor in value):
        value = f"[{', '.join(sorted(value))}]"
    if not isinstance(value, str) or value not in get_args(Shared):
        raise ValueError(f"it is none of {'; '.join(get_args(Shared))} (found {str(value)[:40]})")
    return value


def _as_written(value: Shared) -> str | list[str]:
    return value if value == "alternate" else value.strip("[]").split(", ")


class AggregationConfig(Section):
    """What takes the place of the weighted mean of the updates' differences, in every algorithm.

    `tolerate` is how many updates may be hostile; `nearest_mixing` replaces each update by the mean of its nearest
    before the rule; `weight_cap` is the most that an update may weigh in the mean, in medians. `share` is which of
    LoRA's factors clients send, `private` names tensors that each keeps to itself (fedcli.algos.share).
    """

    rule: RuleName = "mean"
    tolerate: Annotated[int, Field(ge=0)] = 1
    nearest_mixing: bool = False
    weight_cap: Annotated[float, Field(ge=1)] | None = None
    share: Annotated[Shared, BeforeValidator(_shared), PlainSerializer(_as_written)] = "[A, B]"

    private: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*$", max_length=200)], ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weight_cap is not None and self.rule != "mean":
            raise ValueError(f"weight_cap is set, and {self.rule} takes no account of rows: only the mean is weighted")
        return self

    def as_rule(self) -> Rule:
        """Return the rule."""
        return Rule(**{name: getattr(self, name) for name in asdict(Rule())})

    @property
    def shared_factor(self) -> Share | None:
        """What is shared, as manifests have it; None where both factors are."""
        return None if self.share == "[A, B]" else cast(Share, self.share.strip("[]"))

    def check_enough(self, num_counted: int) -> None:
        """Raise ValueError where so few updates count in a round that the rule cannot tolerate what it should."""
        rule = self.as_rule()
        if num_counted < rule.fewest:
            what = f"{self.rule}{' with nearest_mixing' if self.nearest_mixing else ''}"
            raise ValueError(
                f"aggregation.tolerate is {self.tolerate}: {what} then needs {rule.fewest} updates a round, "
                f"and {num_counted} count (federation.per_round)"
            )
