"""The ledger's records: what a round asks for (manifest.privacy), and what a client claims (update.privacy)."""

import math
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from fedcli.config.privacy import LEAST_NOISE, MOST_RATE, AdaptiveClip, PrivacyConfig, PrivacyTarget, Unit
from fedcli.workspace.record import Finite, Id, Record, Sha256

Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Delta: TypeAlias = Annotated[float, Field(gt=0, lt=1)]


class _Sparse(Record):
    """A record whose keys that are null are not written."""

    @model_serializer(mode="wrap")
    def _without_unwritten(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if value is not None}


class TargetRecord(Record):
    """What a client's noise is calibrated to: all steps of all rounds together spend no more."""

    epsilon: Positive
    delta: Delta


class AdaptiveRecord(Record):
    """How the next round's clip follows from this one's updates; `bit_noise` is sigma_b."""

    quantile: Delta
    rate: Annotated[float, Field(gt=0, le=MOST_RATE)]
    bit_noise: Positive


class PrivacyRecord(_Sparse):
    """manifest.privacy: what a round guarantees, for whom, once it is merged.

    Neighbours differ by one whole unit that is there or not ("add or remove one"). `noise` is the multiplier z; where
    it is not there, each party calibrates its own to `target`.
    """

    unit: Unit | None = None
    relation: Literal["add_or_remove_one"] | None = None
    clip: Positive | None = None
    noise: Positive | None = None
    delta: Delta | None = None
    target: TargetRecord | None = None
    max_epsilon: Positive | None = None
    group_by: str | None = None
    expected: Annotated[int, Field(ge=1)] | None = None
    """Of unit client: the fixed number m that the noisy sum is divided by, whoever answers."""
    row_cap: Annotated[int, Field(ge=1)] | None = None
    adaptive: AdaptiveRecord | None = None
    secure_aggregation: Literal["pairwise", "double"] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        needed = {
            "client": ("clip", "noise", "delta", "expected"),
            "row": ("clip", "delta"),
            "group": ("clip", "delta", "group_by"),
        }
        missing = [name for name in needed.get(self.unit or "", ()) if getattr(self, name) is None]
        if missing:
            raise ValueError(f"unit is {self.unit}, and {missing[0]} is not there")
        if self.is_at_party and (self.noise is None) == (self.target is None):
            raise ValueError(f"unit is {self.unit}, and of noise and target there is not just one")
        if self.unit is not None and self.noise is not None and self.noise < LEAST_NOISE[self.unit]:
            raise ValueError(f"noise is {self.noise}, and unit {self.unit} needs {LEAST_NOISE[self.unit]} at least")
        if self.adaptive is not None and self.noise is not None and 2 * self.adaptive.bit_noise <= self.noise:
            raise ValueError(
                f"bit_noise is {self.adaptive.bit_noise}, and noise {self.noise} needs more than half of it"
            )
        return self

    @property
    def is_at_server(self) -> bool:
        """Whether the server makes the noise."""
        return self.unit == "client"

    @property
    def is_at_party(self) -> bool:
        """Whether parties make the noise, in every step of their training."""
        return self.unit in ("row", "group")


class SecureSum(Record):
    """aggregation.secure: whose answers gave the sum of masked updates, and what their weights add up to."""

    mode: Literal["pairwise", "double"]
    attempt: Sha256
    """Of attempts/round-n-a.json."""
    repair: Sha256 | None
    """Of repair/round-n-a.json; None where all had sent their updates, and no mask was left in the sum."""
    answers: dict[Id, Sha256]
    """By client, the hashes of the answer.json that were used."""
    weight: Annotated[float, Field(allow_inf_nan=False)]


class PrivacyClaim(Record):
    """update.json's privacy: what a client says that all its steps so far have spent."""

    unit: Literal["row", "group"]
    epsilon: Positive
    delta: Delta


def claim_fault(
    asked: PrivacyRecord | None, claim: PrivacyClaim | None, num_samples: int = 1, train_loss: float | None = None
) -> str | None:
    """Return what is wrong with an update's claim in a round that asks parties for privacy; None where nothing is.

    The claim is the party's word: what can be checked is that it is what the round asks for.
    """
    if asked is None or not asked.is_at_party:
        return None
    wanted = f"its round asks for unit {asked.unit} at delta {asked.delta}"
    if claim is None:
        return f"it claims no privacy, and {wanted}"
    if (claim.unit, claim.delta) != (asked.unit, asked.delta):
        return f"it claims unit {claim.unit} at delta {claim.delta}, and {wanted}"
    limits = (asked.max_epsilon, None if asked.target is None else asked.target.epsilon)
    if passed := [limit for limit in limits if limit is not None and claim.epsilon > limit]:
        return f"it claims epsilon {claim.epsilon}, and its round allows {min(passed)}"
    if num_samples != 1 or train_loss is not None:
        return "it tells how many rows it has, or its loss: in its round num_samples is 1 and train_loss null"
    return None


class MergeNoise(_Sparse):
    """aggregation.privacy: the noise that a round of unit client was merged with; who has its key can draw it again."""

    noise_sha256: Sha256
    """The hash of the key (privacy/noise.py)."""
    noise: Positive
    """The multiplier of the noise on the updates' sum."""
    below: Finite | None = None
    """How many updates were not clipped, with noise; None without adaptive clipping."""
    releases: Annotated[int, Field(ge=2)] | None = None
    """Sums of the round that had a key, this one included, where kills or refusals made more than one."""


def noise_multiplier(privacy: PrivacyRecord) -> float:
    """Return the multiplier of the noise on the updates' sum: z, or with adaptive clipping z_d, which is larger.

    The noisy number of updates below is a release of its own; both together are one of multiplier z.
    """
    assert privacy.noise is not None
    if privacy.adaptive is None:
        return privacy.noise
    return float((privacy.noise**-2 - (2 * privacy.adaptive.bit_noise) ** -2) ** -0.5)


def next_clip(privacy: PrivacyRecord, merged: MergeNoise | None) -> float | None:
    """Return the clip that adaptive clipping has reached behind a round; None where it has none."""
    if privacy.adaptive is None or privacy.clip is None or privacy.expected is None:
        return None
    if merged is None or merged.below is None:  # the round ended without an update
        return privacy.clip
    distance = min(5.0, max(-5.0, merged.below / privacy.expected - privacy.adaptive.quantile))
    return privacy.clip * math.exp(-privacy.adaptive.rate * distance)


def privacy_record(config: PrivacyConfig, *, num_counted: int, rounds: int, clip: float | None) -> PrivacyRecord | None:
    """Return what a round asks for, as fedcli.yaml has it now; `clip` is the one that adaptive clipping has reached."""
    if config.is_off:
        return None
    secure = None if config.secure_aggregation == "off" else config.secure_aggregation
    if config.unit is None:
        return PrivacyRecord(secure_aggregation=secure)
    is_client, adaptive, target = config.unit == "client", config.adaptive, config.target
    limit = target.epsilon if is_client and target is not None and config.max_epsilon is None else config.max_epsilon
    return PrivacyRecord(
        unit=config.unit,
        relation="add_or_remove_one",
        clip=config.clip if clip is None or adaptive is None else clip,
        noise=config.noise_of_clients(rounds) if is_client else config.noise,
        delta=config.accounted_delta,
        target=None if is_client else _target(target),
        max_epsilon=limit,
        group_by=config.group_by,
        expected=num_counted if is_client else None,
        row_cap=config.row_cap,
        adaptive=None if adaptive is None else _adaptive(adaptive, num_counted),
        secure_aggregation=secure,
    )


def _target(target: PrivacyTarget | None) -> TargetRecord | None:
    return None if target is None else TargetRecord(epsilon=target.epsilon, delta=target.delta)


def _adaptive(adaptive: AdaptiveClip, num_counted: int) -> AdaptiveRecord:
    return AdaptiveRecord(quantile=adaptive.quantile, rate=adaptive.rate, bit_noise=adaptive.bit_noise_of(num_counted))
