"""The JSON records of the protocol: manifest.json, update.json and workspace.json."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    ValidationError,
    model_validator,
)

from fedcli.algos.lora import is_first_factor, of_rank
from fedcli.algos.share import Share, is_sent
from fedcli.config import Quantization, ScoreName, TaskName
from fedcli.config.sections import (
    Rounds,
)
from fedcli.config.select import RANGES
from fedcli.workspace.cluster_records import ClustersRecord
from fedcli.workspace.encoding_record import EncodingRecord
from fedcli.workspace.layout import BASE_DELTA_NAME, MASKED_FILE, SHARES_FILE, WORKSPACE_ID
from fedcli.workspace.lora_records import LoraTerms
from fedcli.workspace.merge_records import Aggregation
from fedcli.workspace.parsing import CHANGED, first_fault, is_unchanged, parse_object, sha256
from fedcli.workspace.privacy_records import PrivacyClaim, PrivacyRecord
from fedcli.workspace.record import LARGEST_COUNT, Finite, Natural, Record, Sha256
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.relay_records import RelayedRound, RelayRecord
from fedcli.workspace.train_records import TrainRecord

PROTOCOL = 1


class PublicKeys(Record):
    """The public halves of a party's or the server's keys, 32 bytes in hex: Ed25519 to sign, X25519 to seal."""

    sign: Sha256
    seal: Sha256


class EnrolmentHead(Record):
    """An entry of enrolment/, with all before it: who took part."""

    number: Natural
    sha256: Sha256


class FileEntry(Record):
    """A file's SHA-256 and size in bytes."""

    sha256: Sha256
    bytes: Natural


class TensorEntry(Record):
    """A tensor's shape and type; global adapters are always float32."""

    shape: Annotated[tuple[Natural, ...], Field(strict=False)]
    dtype: Literal["F32"]


class ModelRecord(Record):
    """Which base model the adapters belong to; the fingerprint tells it from others without naming a path."""

    base: str
    revision: str | None
    fingerprint: str
    quantization: Quantization
    num_parameters: Natural | None = None
    """None in rounds of versions that did not count them."""


class Selection(Record):
    """Of a cohort that is larger than needed: the first `count` valid updates in the order of the draw count."""

    order: list[Natural]
    count: Annotated[int, Field(ge=1)]


class Cost(Record):
    """What is communicated: by one client in this round, and by all in the rounds before it (Table 3 of the paper)."""

    base_parameters: Natural | None
    trainable_parameters: Natural
    communicated_parameters: Natural
    """Sent by a client: the adapter's, and as many again for each other file."""
    client_bytes_down: Natural
    """The files that a client reads, manifest.json aside."""
    client_bytes_up: Natural
    """The files that it sends in float32, update.json aside."""
    total_bytes_down: Natural
    total_bytes_up: Natural


class AlgorithmRun(Record):
    """From round `round` on, rounds were merged with this algorithm, up to the next entry's."""

    round: Natural
    algorithm: dict[str, Any]


class Manifest(Record):
    """The record of one round; written once, chained to the round before by its hash."""

    tells_changes = True  # `Round.check_unchanged`
    unwritten = (
        "update_tensors",
        "enrolment",
        "fedcli",
        "privacy",
        "relay",
        "clusters",
        "encoding",
        "lora",
        "share",
        "private",
        "staleness",
    )

    arrives = True
    protocol: Literal[1] = 1
    workspace: str
    round: Natural
    rounds: Rounds
    state: Literal["open", "finished"]
    parent: Sha256 | None
    task: TaskName
    algorithm: dict[str, Any]
    cohort: list[Natural]
    update_files: list[str]
    model: ModelRecord
    train: TrainRecord
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    aggregation: Aggregation | None
    cost: Cost | None = None
    history: list[AlgorithmRun] = Field(default_factory=list)
    selection: Selection | None = None
    """None where all of the cohort count."""
    opened: Annotated[Finite, Field(ge=0)] | None = None
    """When the round was opened, in seconds since 1970 by the server's clock; None without a deadline."""
    update_tensors: list[str] | None = None
    """Which of `tensors` updates carry; None for all, and then it is not written."""
    encoding: EncodingRecord | None = None
    """How clients may send their differences; None, and not written, where they send values."""
    share: Share | None = None
    """Which of LoRA's factors is sent where not both are, and what becomes of the other; not written for both."""
    private: list[str] | None = None
    """Which of `tensors` each client keeps to itself, by their names; not written for none."""
    enrolment: EnrolmentHead | None = None
    """Who took part when the round was opened; None, and not written, where signatures are off."""
    fedcli: str | None = None
    """The version that opened the round; None, and not written, where signatures are off."""
    privacy: PrivacyRecord | None = None
    """What the round guarantees; None, and not written, where nothing is asked for."""
    relay: RelayRecord | None = None
    """Of a region, where it stands in its parent's round; None, and not written, of other federations."""
    staleness: Annotated[int, Field(ge=1)] | None = None
    """From so many rounds back updates count when this one is merged; None, and not written: of this one alone."""
    lora: LoraTerms | None = None
    """Ranks of clients, and the rank of base_delta/; None, and not written, where there are neither."""
    clusters: ClustersRecord | None = None
    """Which adapters there are; None, and not written, where there is one for all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if unknown := sorted({*(self.private or ())} - self.tensors.keys()):
            raise ValueError(f"private names {unknown[0][:80]!r}, which is no tensor")
        return self

    @property
    def num_clusters(self) -> int:
        """The number of the round's adapters."""
        return 1 if self.clusters is None else self.clusters.count

    @property
    def waits_for_parent(self) -> bool:
        """Whether nobody trains in the open round: its adapter goes to a parent, and the next begins from there."""
        return self.relay is not None and self.relay.left == 0 and self.state == "open"

    @property
    def withholds(self) -> bool:
        """Whether losses, norms and numbers of rows of its updates stay untold."""
        return self.privacy is not None and self.privacy.unit is not None

    @property
    def sent_tensors(self) -> dict[str, TensorEntry]:
        """The tensors of each file of an update."""
        if (names := self.update_tensors) is None:
            return self.tensors
        return {name: entry for name, entry in self.tensors.items() if name in names}

    def rank_of(self, client: int) -> int | None:
        """Return the rank that a client trains; None for the adapter's."""
        return None if self.lora is None or self.lora.ranks is None else self.lora.ranks.get(str(client))

    def sent_by(self, client: int) -> dict[str, TensorEntry]:
        """Return the tensors of each file of a client's update: of its rank."""
        return self.sent_tensors if (rank := self.rank_of(client)) is None else at_rank(self.sent_tensors, rank)

    @property
    def delta_tensors(self) -> dict[str, TensorEntry]:
        """The tensors of base_delta/; none where there is none."""
        rank = None if self.lora is None else self.lora.base_delta
        return {} if rank is None else at_rank(self.tensors, rank, is_exact=True)

    @property
    def base_delta(self) -> str | None:
        """The SHA-256 of the second adapter; None where there is none."""
        return self.files[BASE_DELTA_NAME].sha256 if BASE_DELTA_NAME in self.files else None

    @property
    def unshared_tensors(self) -> set[str]:
        """The tensors that `share` and `private` keep out of updates: frozen ones, and each client's own."""
        return {name for name in self.tensors if not is_sent(self.share, self.round, name)} | {*(self.private or ())}

    @property
    def own_tensors(self) -> set[str]:
        """Those of them that each client trains, and keeps: the factors B with [A], and all that is private."""
        return (self.unshared_tensors if self.share == "A" else set()) | {*(self.private or ())}

    @property
    def dropped_files(self) -> list[str]:
        """The files that lie in an update beside update.json and its signature."""
        if self.secure_aggregation is None:
            return self.update_files
        return [MASKED_FILE, *([SHARES_FILE] if self.secure_aggregation == "double" else [])]

    @property
    def secure_aggregation(self) -> Literal["pairwise", "double"] | None:
        """How updates are masked; None where they are not."""
        return None if self.privacy is None else self.privacy.secure_aggregation

    @property
    def scheduled_rate(self) -> float:
        """The learning rate that the schedule gives to the round (docs/PROTOCOL.md, "Training")."""
        first, last = self.train.schedule.learning_rate, self.train.schedule.learning_rate_min
        cosine = (1 + math.cos(math.pi * self.round / max(1, self.train.schedule.rounds))) / 2
        return last + (first - last) * cosine


class Identity(Record):
    """workspace.json: who this workspace is, and the settings that `init` fixed."""

    unwritten = ("signatures",)

    protocol: Literal[1] = 1
    id: Annotated[str, Field(pattern=WORKSPACE_ID)]
    fixed: dict[str, Any]
    simulation: bool | None = None
    """Whether its clients are simulated, with rows in data/; None in workspaces of versions that did not say."""
    signatures: Literal["required"] | None = None
    """Whether updates and rounds must be signed; None, and not written, where they need not."""


class PrunedRecord(Record):
    """PRUNED.json: files of the round that may be gone, as its manifest lists them."""

    protocol: Literal[1] = 1
    round: Natural
    files: dict[str, FileEntry]


class RowScores(Record):
    """update.json's row_scores: how many of a client's rows have which score, in equal bins from low to high."""

    score: str
    low: Finite
    high: Finite
    counts: list[Natural]

    @classmethod
    def of(cls, score: ScoreName, counts: list[int]) -> "RowScores":
        """Return the record of a histogram."""
        low, high = RANGES[score]
        return cls(score=score, low=low, high=high, counts=counts)


class UpdateRecord(Record):
    """update.json: what a client says of its update."""

    unwritten = ("privacy", "salt", "relay", "cluster", "encoding", "base_delta", "row_scores")

    protocol: int
    workspace: str
    round: int
    base: str
    client: int
    num_samples: int
    steps: Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
    train_loss: Finite | None
    files: dict[str, FileEntry]
    encoding: Annotated[str, Field(max_length=40)] | None = None
    """How its adapter's file holds differences; None, and not written, where it holds values."""
    privacy: PrivacyClaim | None = None
    """What a client of row or group level claims; None, and not written, for others."""
    salt: Sha256 | None = None
    """Random: the manifest tells this record's hash, by which who guesses its rows could else try them.

    None, and not written, where privacy has no unit.
    """
    relay: RelayedRound | None = None
    """Of a region, whose adapter this is; None, and not written, of other clients."""
    cluster: Natural | None = None
    """Whose adapter it was made from; None, and not written, where there are no clusters, and then it is 0."""
    base_delta: Sha256 | None = None
    """The hash of the frozen second adapter that it trained beside; None, and not written, where there is none."""
    row_scores: RowScores | None = None
    """What the client's rows were selected by; None, and not written, where their party does not tell."""


def at_rank(tensors: Mapping[str, TensorEntry], rank: int, *, is_exact: bool = False) -> dict[str, TensorEntry]:
    """Return factors' shapes at a smaller rank, or with `is_exact` at a rank of any size."""
    found = {}
    for name, entry in tensors.items():
        shape = of_rank(name, entry.shape, rank)
        if is_exact:
            shape = (rank, *shape[1:]) if is_first_factor(name) else (*shape[:-1], rank)
        found[name] = TensorEntry(shape=shape, dtype=entry.dtype)
    return found


def file_entry(contents: bytes | memoryview) -> FileEntry:
    """Describe a file with these contents."""
    return FileEntry(sha256=sha256(contents), bytes=len(contents))


def parse_update_record(data: bytes) -> UpdateRecord:
    """Read a client's update.json; raise Refusal(json), (duplicate), (samples) or (hash)."""
    document = parse_object(data, "update.json")
    num_samples = document.get("num_samples", 1)  # its absence is noticed below, as that of any key
    if type(num_samples) is not int or not 1 <= num_samples <= LARGEST_COUNT:
        raise Refusal("samples", f"num_samples is {str(num_samples)[:40]}, not an integer from 1 to {LARGEST_COUNT}")
    try:
        record = UpdateRecord.model_validate(document)
    except ValidationError as error:
        raise Refusal("json", f"update.json: {first_fault(error)}") from error
    if not is_unchanged(document):
        raise Refusal("hash", f"update.json has changed: {CHANGED}")
    return record
