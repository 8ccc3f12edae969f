"""What a manifest says of the merge that made its round: which updates counted, which did not, and how."""

from typing import Annotated, Any, Literal

from pydantic import Field

from fedcli.workspace.cluster_records import Split
from fedcli.workspace.lora_records import LoraMerge
from fedcli.workspace.privacy_records import MergeNoise, PrivacyClaim, SecureSum
from fedcli.workspace.record import Finite, Natural, Record, Sha256
from fedcli.workspace.refusal import Refusal, RefusalCode


class CountedUpdate(Record):
    """An update that went into the aggregate; `update` is the hash of its update.json, weights add up to 1."""

    unwritten = ("cosine", "change", "file_weights", "privacy", "cluster", "steps", "base")

    client: Natural
    update: Sha256
    weight: Finite | None
    """None, as the three below, where privacy withholds it, or where only the sum of all weights is known."""
    num_samples: int | None
    train_loss: Finite | None
    delta_norm: Finite | None
    bytes: Natural | None = None
    """Of the files that the client sent; None where the server did not count them."""
    cosine: Finite | None = None
    """Of its difference to the mean's; it and what follows are there where another rule than the mean merged."""
    change: Finite | None = None
    """What leaving it out changes the mean by, in the mean's norm."""
    file_weights: dict[str, Finite] | None = None
    """Its weight in what is made of each file beside the adapter."""
    privacy: PrivacyClaim | None = None
    """What its client says that all its steps so far have spent; None, and not written, but for rows and groups."""
    cluster: Natural | None = None
    """Whose adapter it was made from, where there are clusters; weights add up to 1 in each."""
    steps: Natural | None = None
    """That it made; None, and not written, where all make the same."""
    base: Natural | None = None
    """The round that it was made from; None, and not written, where that is the one that was merged."""


class RefusedUpdate(Record):
    """An update that was not counted, and why."""

    unwritten = ("update", "base")

    client: Natural
    code: RefusalCode
    reason: str
    update: Sha256 | None = None
    """The hash of its update.json; None, and not written, where that could not be read."""
    base: Natural | None = None
    """As of a counted update."""

    @classmethod
    def of(cls, client: int, refusal: Refusal) -> "RefusedUpdate":
        """Return the record of a refusal."""
        return cls(client=client, code=refusal.code, reason=refusal.reason, update=refusal.update)


class Aggregation(Record):
    """How a round's adapter came to be; all lists are sorted by client."""

    unwritten = ("rule", "privacy", "secure", "splits", "lora", "step_weighting", "most_counted")

    algorithm: dict[str, Any]
    counted: list[CountedUpdate]
    refused: list[RefusedUpdate]
    missing: list[Natural]
    surplus: list[Natural] = Field(default_factory=list)
    """Who answered, and was not needed: enough of those drawn before had."""
    rule: dict[str, Any] | None = None
    """What took the place of the weighted mean; None for that itself, and then it is not written."""
    privacy: MergeNoise | None = None
    """The noise of a round of unit client; None for others, and then it is not written."""
    secure: SecureSum | None = None
    """How the sum of masked updates was had; None, and not written, where they were not masked."""
    splits: list[Split] | None = None
    """Which clusters split; None, and not written, where none did."""
    lora: LoraMerge | None = None
    """How products of factors were merged; None, and not written, where factors were averaged and no more is told."""
    step_weighting: Literal["fednova"] | None = None
    """How the numbers of steps weighed; None, and not written, where they did not."""
    most_counted: Annotated[int, Field(ge=1)] | None = None
    """How many updates of a client could count in a window; None, and not written, where that had no limit."""
