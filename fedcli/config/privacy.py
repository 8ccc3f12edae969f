"""fedcli.yaml's section `privacy`: whose rows are protected, by how much noise, and from whom."""

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from fedcli.config.aggregation import AggregationConfig
from fedcli.config.section import Count, Section
from fedcli.privacy.accounting import LEAST_STEP_NOISE
from fedcli.secure_aggregation.terms import FEWEST, MOST

Unit: TypeAlias = Literal["client", "row", "group"]
"""Whose presence the published rounds hide: a whole client, one row of a client, or all its rows of one group."""
SecureAggregation: TypeAlias = Literal["off", "pairwise", "double"]

Positive: TypeAlias = Annotated[float, Field(gt=0)]
Delta: TypeAlias = Annotated[float, Field(gt=0, lt=1)]
MOST_RATE = 10.0
"""Of adaptive clipping: a clip changes by less than exp(MOST_RATE) in a round."""
LEAST_NOISE: dict[Unit, float] = {"client": 1e-6, "row": LEAST_STEP_NOISE, "group": LEAST_STEP_NOISE}
"""Multipliers below which accountants find no epsilon, or not in minutes."""


class PrivacyTarget(Section):
    """What the whole federation may spend: the noise multiplier follows from it."""

    epsilon: Positive
    delta: Delta


class AdaptiveClip(Section):
    """Clipping that follows a quantile of the updates' norms (Andrew et al. 2021, 1905.03871); `clip` is its start.

    `bit_noise` is the deviation of the noise on the number of updates below; None: a twentieth of those who count.
    """

    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    rate: Annotated[float, Field(gt=0, le=MOST_RATE)] = 0.2
    bit_noise: Positive | None = None

    def bit_noise_of(self, num_counted: int) -> float:
        """Return sigma_b for so many clients a round."""
        return num_counted / 20 if self.bit_noise is None else self.bit_noise


def _off(value: object) -> object:
    """Return "off" for what YAML reads the bare word as."""
    return "off" if value is False else value


class PrivacyConfig(Section):
    """What is guaranteed (docs/PRIVACY.md).

    `clip` is the most that one unit moves a sum: an update's norm for clients, a gradient's for rows and groups.
    `noise` is the noise multiplier z: the deviation of the noise on that sum is z x clip. `delta` belongs to `noise`;
    `target` has its own. With `row_cap` a client weighs min(rows / row_cap, 1), else all clients weigh the same.
    """

    unit: Unit | None = None
    clip: Positive | None = None
    noise: Positive | None = None
    delta: Delta = 1e-5
    target: PrivacyTarget | None = None
    max_epsilon: Positive | None = None
    group_by: str | None = None
    row_cap: Count | None = None
    adaptive: AdaptiveClip | None = None
    secure_aggregation: Annotated[SecureAggregation, BeforeValidator(_off)] = "off"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.unit is None:
            self._refuse("unit is null", "clip", "noise", "target", "max_epsilon", "group_by", "row_cap", "adaptive")
            return self
        if self.clip is None:
            raise ValueError(f"unit is {self.unit}, and clip is null: noise hides nothing that is not bounded")
        if (self.noise is None) == (self.target is None):
            raise ValueError("set noise or target: exactly one of them says how much noise there is")
        least = LEAST_NOISE[self.unit]
        if self.noise is not None and self.noise < least:
            raise ValueError(f"noise is {self.noise:g}, and with less than {least:g} nothing is hidden")
        if (self.unit == "group") != (self.group_by is not None):
            raise ValueError("group_by names the column that tells a group's rows, with unit: group and no other")
        if self.unit != "client":
            self._refuse(f"unit is {self.unit}", "row_cap", "adaptive")
        if self.unit == "client" and self.secure_aggregation != "off":
            raise ValueError(
                f"unit is client and secure_aggregation is {self.secure_aggregation}: the server clips updates, and "
                "there it sees none. Set unit to row or group, or secure_aggregation to off"
            )
        return self

    def _refuse(self, reason: str, *names: str) -> None:
        if found := [name for name in names if getattr(self, name) is not None]:
            raise ValueError(f"{reason}, and {found[0]} is set: it would do nothing")

    @property
    def is_off(self) -> bool:
        """Whether a federation runs as one without the section does."""
        return self.unit is None and self.secure_aggregation == "off"

    @property
    def accounted_delta(self) -> float:
        """The delta that epsilon is told for."""
        return self.delta if self.target is None else self.target.delta

    def noise_of_clients(self, rounds: int) -> float | None:
        """Return the noise multiplier of unit client, which a target gives for so many rounds; None for other units."""
        if self.unit != "client" or self.target is None:
            return self.noise if self.unit == "client" else None
        from fedcli.privacy.accounting import gaussian_noise

        return gaussian_noise(self.target.epsilon, self.target.delta, rounds)

    def check_adaptive(self, num_counted: int, rounds: int) -> None:
        """Raise ValueError where the noisy number of updates below would spend more than all noise together may."""
        noise = self.noise_of_clients(rounds)
        if self.adaptive is None or noise is None:
            return
        bit_noise = self.adaptive.bit_noise_of(num_counted)
        if 2 * bit_noise <= noise:
            told = "" if self.adaptive.bit_noise else f" (a twentieth of the {num_counted} clients that count)"
            raise ValueError(
                f"privacy.adaptive needs 2 x bit_noise > noise: bit_noise is {bit_noise:g}{told}, and noise is "
                f"{noise:g}. Leave adaptive out, and set clip from public data; or let more clients count"
            )

    def check_against(
        self, aggregation: AggregationConfig, signatures: str | None, num_counted: int, num_drawn: int | None = None
    ) -> None:
        """Raise ValueError where the section and another one cannot both hold; the message names both."""
        ways = {
            "privacy.unit: client": self.unit == "client",
            f"privacy.secure_aggregation: {self.secure_aggregation}": self.secure_aggregation != "off",
        }
        for way in (name for name, is_on in ways.items() if is_on):
            if aggregation.rule != "mean" or aggregation.nearest_mixing:
                what = f"rule: {aggregation.rule}" if aggregation.rule != "mean" else "nearest_mixing"
                raise ValueError(f"{way} and aggregation.{what} exclude each other: the one sums, the other compares")
            if aggregation.weight_cap is not None:
                hint = "privacy.row_cap bounds weights" if self.unit == "client" else "the server sees no weights"
                raise ValueError(f"{way} and aggregation.weight_cap exclude each other: {hint}")
        if self.unit == "client" and num_drawn is not None and num_drawn > num_counted:
            raise ValueError(
                "privacy.unit: client and federation.select exclude each other: who leaves lets another one in, and "
                "the sum moves by both. Draw more with per_round, and let quorum or deadline say how many are enough"
            )
        if self.secure_aggregation == "off":
            return
        way = f"privacy.secure_aggregation: {self.secure_aggregation}"
        if signatures == "off":
            raise ValueError(
                f"{way} and federation.signatures: off exclude each other: masks are made of enrolled keys"
            )
        if num_counted < FEWEST:
            raise ValueError(
                f"{way} needs {FEWEST} or more clients a round, and {num_counted} count (federation.per_round): "
                "the sum of fewer tells each one's update"
            )
        most = MOST[self.secure_aggregation]
        if num_counted > most:
            raise ValueError(f"{way} is for {most} clients a round or fewer, and {num_counted} count")
        if num_drawn is not None and num_drawn > num_counted:
            raise ValueError(
                f"{way} and federation.select exclude each other: whoever is masked with others is summed with them. "
                "Draw more with per_round, and let quorum or deadline say how many are enough"
            )
