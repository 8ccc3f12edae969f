"""fedcli.yaml's section `aggregation`, which is also how a manifest records the rule that made a round."""

from dataclasses import asdict
from typing import Annotated, Any, Literal, Self, TypeAlias, cast, get_args

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from fedcli.algos.lora import LoraName, LoraRule, LoraWeights
from fedcli.algos.robust import Rule, RuleName
from fedcli.algos.share import Share
from fedcli.config.section import Section

EncodingName: TypeAlias = Literal["f16", "bf16", "int8", "top_k"]
DownEncodingName: TypeAlias = Literal["f16", "bf16", "int8"]
TOP_K = 0.1
"""The share of the numbers that top_k sends where fedcli.yaml does not say."""

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
    before the rule; `weight_cap` is the most that an update may weigh in the mean, in medians. With an `encoding`
    clients and server send differences in fewer bytes; of those `top_k` is the share that is sent. `lora` and what
    begins with it say how products of LoRA's factors are merged; `max_rank` is of what `lora: exact` keeps beside the
    adapter. `share` is which of LoRA's factors clients send, `private` names tensors that each keeps to itself
    (fedcli.algos.share). `step_weighting` makes differences of unequal steps comparable (algos/unequal.py). Updates
    made from up to `staleness` rounds back count, too, `most_counted` of a client at most in so many merges and the one
    before them.
    """

    rule: RuleName = "mean"
    tolerate: Annotated[int, Field(ge=0)] = 1
    nearest_mixing: bool = False
    weight_cap: Annotated[float, Field(ge=1)] | None = None
    encoding: Literal["f32", "f16", "bf16", "int8", "top_k"] = "f32"
    top_k: Annotated[float, Field(gt=0, lt=1)] | None = None
    lora: LoraName = "factors"
    lora_weights: LoraWeights = "rows"
    lora_fair: Annotated[float, Field(ge=0)] | None = None
    lora_fresh: bool = False
    lora_error: bool = False
    max_rank: Annotated[int, Field(ge=1, le=8192)] | None = None
    share: Annotated[Shared, BeforeValidator(_shared), PlainSerializer(_as_written)] = "[A, B]"
    step_weighting: Literal["none", "fednova"] = "none"
    staleness: Annotated[int, Field(ge=0, le=1000)] = 0
    most_counted: Annotated[int, Field(ge=1)] | None = None

    private: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*$", max_length=200)], ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weight_cap is not None and self.rule != "mean":
            raise ValueError(f"weight_cap is set, and {self.rule} takes no account of rows: only the mean is weighted")
        if self.top_k is not None and self.encoding != "top_k":
            raise ValueError(f"top_k is set, and encoding is {self.encoding}: only top_k sends a share of the numbers")
        if self.lora != "exact" and (odd := [name for name in ("lora_fresh", "max_rank") if getattr(self, name)]):
            raise ValueError(
                f"{odd[0]} is set, and lora is {self.lora}: it would do nothing. It belongs to lora: exact"
            )
        if self.lora != "factors" and self.lora_fair is not None:
            raise ValueError(f"lora_fair is set, and lora is {self.lora}: it corrects the means of lora: factors")
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

    @property
    def counts_late(self) -> bool:
        """Whether the merge can take late updates: rules and products look at one round's updates side by side."""
        return self.as_rule().is_plain_mean and self.as_lora().is_plain

    @property
    def keeps_residual(self) -> bool:
        """Whether the adapter is the mean of the clients' factors, and base_delta/ has what their product lacks."""
        return self.lora == "exact" and not self.lora_fresh

    def as_lora(self) -> LoraRule:
        """Return how products of factors are merged."""
        return LoraRule(**{name: getattr(self, name) for name in asdict(LoraRule())})

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
