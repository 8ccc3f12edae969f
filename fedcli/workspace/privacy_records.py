"""The ledger's records: what a round asks for (manifest.privacy), and what a client claims (update.privacy)."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from fedcli.config.privacy import AdaptiveClip, PrivacyConfig, PrivacyTarget, Unit
from fedcli.workspace.record import Record, Sha256

Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Delta: TypeAlias = Annotated[float, Field(gt=0, lt=1)]


class _Sparse(Record):
    """A record whose keys that are null are not written."""

    @model_serializer(mode="wrap")
    def _without_null(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if value is not None}


class TargetRecord(Record):
    """What a client's noise is calibrated to: all steps of all rounds together spend no more."""

    epsilon: Positive
    delta: Delta


class AdaptiveRecord(Record):
    """How the next round's clip follows from this one's updates; `bit_noise` is sigma_b."""

    quantile: Delta
    rate: Positive
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
    answers: dict[str, Sha256]
    """By client, the hashes of the answer.json that were used."""
    weight: Annotated[float, Field(allow_inf_nan=False)]


class PrivacyClaim(Record):
    """update.json's privacy: what a client says that all its steps so far have spent."""

    unit: Literal["row", "group"]
    epsilon: Positive
    delta: Delta


def privacy_record(config: PrivacyConfig, *, num_counted: int, rounds: int, clip: float | None) -> PrivacyRecord | None:
    """Return what a round asks for, as fedcli.yaml has it now; `clip` is the one that adaptive clipping has reached."""
    if config.is_off:
        return None
    secure = None if config.secure_aggregation == "off" else config.secure_aggregation
    if config.unit is None:
        return PrivacyRecord(secure_aggregation=secure)
    is_client, adaptive, noise = config.unit == "client", config.adaptive, config.noise
    if is_client and config.target is not None:
        from fedcli.privacy.accounting import gaussian_noise

        noise = gaussian_noise(config.target.epsilon, config.target.delta, rounds)
    return PrivacyRecord(
        unit=config.unit,
        relation="add_or_remove_one",
        clip=config.clip if clip is None or adaptive is None else clip,
        noise=noise,
        delta=config.accounted_delta,
        target=None if is_client else _target(config.target),
        max_epsilon=config.max_epsilon,
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
