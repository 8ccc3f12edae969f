"""fedcli.yaml: typed, closed and validated whole before any work."""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import ErrorDetails

from fedcli.algos import ALGORITHMS, Algorithm, AnyAlgorithm, FedAvg
from fedcli.errors import ConfigError, IntegrityError, UsageError, did_you_mean

Count = Annotated[int, Field(ge=1)]
Task: TypeAlias = Literal["sft", "dpo"]
Quantization: TypeAlias = Literal["none", "int8", "nf4"]
RowFormat: TypeAlias = Literal["alpaca", "preference"]
_TASK_FORMATS: dict[Task, RowFormat] = {"sft": "alpaca", "dpo": "preference"}


class Section(BaseModel):
    """A section of fedcli.yaml: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Section):
    """The base model: a name that ships with the package, a folder, or a hub id."""

    base: str = "builtin:tiny"
    quantization: Quantization = "none"
    revision: str | None = None
    trust_remote_code: bool = False


class AdapterConfig(Section):
    """The LoRA adapter (Hu et al. 2021); `init` names a folder with an adapter to start from."""

    rank: Annotated[int, Field(ge=1, le=8192)] = 32
    alpha: Annotated[float, Field(gt=0)] = 64
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = ("q_proj", "v_proj")
    init: str | None = None


class ShardsBy(Section):
    """Rows sorted by a column and cut into equal shards, one a client (McMahan et al. 2017, section 3)."""

    shards_by: str


class DataConfig(Section):
    """Where a simulation's rows come from; no source: data/client-N.jsonl are written by hand."""

    source: str | None = None
    format: RowFormat | None = None
    template: Literal["alpaca"] = "alpaca"
    partition: Literal["iid"] | ShardsBy = "iid"
    max_rows: Count | None = None


class TrainConfig(Section):
    """What one client does in one round."""

    steps: Count = 10
    batch_size: Count = 16
    micro_batch_size: Count | None = None
    max_length: Annotated[int, Field(ge=2)] = 512
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 5e-5
    learning_rate_min: Annotated[float, Field(ge=0)] = 1e-6
    beta: Annotated[float, Field(gt=0)] = 0.1
    gradient_checkpointing: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        if self.learning_rate_min > self.learning_rate:
            raise ValueError("learning_rate_min is larger than learning_rate")
        return self

    def learning_rate_of(self, round_number: int, rounds: int) -> float:
        """Return the cosine schedule's rate: lr_min + (lr_0 - lr_min) (1 + cos(pi t / T)) / 2."""
        cosine = (1 + math.cos(math.pi * round_number / rounds)) / 2
        return self.learning_rate_min + (self.learning_rate - self.learning_rate_min) * cosine


class FederationConfig(Section):
    """Who takes part, how often and how long; `quorum` is the share of a cohort that must have answered."""

    clients: Count = 5
    per_round: Count | None = None
    rounds: Count = 10
    seed: Annotated[int, Field(ge=0)] = 0
    quorum: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.cohort_size > self.clients:
            raise ValueError(f"per_round {self.per_round} is more than the {self.clients} clients")
        return self

    @property
    def cohort_size(self) -> int:
        """The number of clients drawn for a round: `per_round`, or all."""
        return self.clients if self.per_round is None else self.per_round

    def needed_answers(self, cohort_size: int) -> int:
        """Return how many of a cohort must have answered: ceil(quorum x cohort), in exact decimal arithmetic."""
        return math.ceil(Fraction(str(self.quorum)) * cohort_size)


class Config(Section):
    """The whole of fedcli.yaml."""

    task: Task = "sft"
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    algorithm: Annotated[AnyAlgorithm, Field(discriminator="name")] = FedAvg()
    federation: FederationConfig = FederationConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data.format not in (None, _TASK_FORMATS[self.task]):
            raise ValueError(
                f"data.format {self.data.format} is not for task {self.task}, whose rows are {_TASK_FORMATS[self.task]}"
            )
        return self

    def fixed(self) -> dict[str, Any]:
        """Return what may not change once round 0 is open, as JSON values by key.

        Where the base lies is not in it: a model may move on disk, and its fingerprint tells whether it is the same.
        """
        return {
            "task": self.task,
            "model": self.model.model_dump(mode="json", exclude={"base", "trust_remote_code"}),
            "adapter": self.adapter.model_dump(mode="json"),
            "federation.clients": self.federation.clients,
            "federation.seed": self.federation.seed,
        }


_ALGORITHM: TypeAdapter[AnyAlgorithm] = TypeAdapter(Annotated[AnyAlgorithm, Field(discriminator="name")])


def algorithm_from(record: dict[str, Any]) -> Algorithm:
    """Return the algorithm that a manifest records; raise IntegrityError where this version knows none such."""
    try:
        return _ALGORITHM.validate_python(record)
    except ValidationError as error:
        raise IntegrityError(
            f"a manifest asks for an algorithm that this version does not know: {record}",
            hint="Use the version of fedcli that opened the round, or a later one.",
        ) from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, but a key that stands twice is an error and not silently the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", node.start_mark)
        return super().construct_mapping(node, deep)


def read_document(text: str, where: Path) -> dict[str, Any]:
    """Parse YAML into its top-level mapping; raise ConfigError with the line."""
    try:
        document = yaml.load(text, _UniqueKeyLoader)
    except (yaml.YAMLError, RecursionError) as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{where} is not valid YAML: {problem}", hint="Correct that line.") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{where} does not hold a mapping of sections", hint="Start from `fedcli init`'s file.")
    return document


def apply_overrides(document: dict[str, Any], overrides: Sequence[str]) -> None:
    """Put `key.path=value` settings, values in YAML, into a parsed document."""
    for override in overrides:
        key, separator, value = override.partition("=")
        *sections, leaf = key.split(".")
        if not separator or not all([*sections, leaf]):
            raise UsageError(f"--set {override!r} is not of the form key.path=value", hint="As in train.steps=20.")
        target = document
        for section in sections:
            if not isinstance(target.get(section), dict):  # a plain value, as in partition: iid, gives way
                target[section] = {}
            target = target[section]
        try:
            target[leaf] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {override!r}: the value is not YAML", hint="Quote it.") from error


def parse_config(document: dict[str, Any], where: Path) -> Config:
    """Validate a parsed document; raise one ConfigError that lists every fault with its key."""
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        faults = list(dict.fromkeys(_describe(fault) for fault in error.errors()))
        raise ConfigError(
            f"{where} has {len(faults)} fault{'s' if len(faults) > 1 else ''}:\n  " + "\n  ".join(faults),
            hint="Correct the keys that are named.",
        ) from error


def _describe(fault: ErrorDetails) -> str:
    """Return one fault as `key: what is wrong`, with the nearest valid name where there is one."""
    location = tuple(str(part) for part in fault["loc"])
    if location[:1] == ("algorithm",) and len(location) > 1:  # pydantic puts the algorithm's name in the path
        location = (location[0], *location[2:])
    key = ".".join(location) or "the file"
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{key}: unknown key. {did_you_mean(location[-1], _keys_of(tuple(map(str, fault['loc']))[:-1]))}"
    if fault["type"] == "union_tag_invalid":
        name = str(fault["ctx"]["tag"])
        return f"algorithm.name: unknown algorithm {name!r}. {did_you_mean(name, ALGORITHMS)}"
    if fault["type"] == "union_tag_not_found":
        return f"algorithm: it has no name. Known: {', '.join(ALGORITHMS)}."
    if fault["type"] == "value_error":
        return f"{key}: {fault['msg'].removeprefix('Value error, ')}"
    return f"{key}: {fault['msg']} (found {fault['input']!r})"


def _keys_of(section: tuple[str, ...]) -> list[str]:
    """Return the keys that a section knows."""
    fields = Config.model_fields
    if section[:1] == ("algorithm",):
        return sorted(field.name for field in dataclasses.fields(ALGORITHMS[section[1]]))
    if section[:2] == ("data", "partition"):
        return list(ShardsBy.model_fields)
    if section:
        annotation = fields[section[0]].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, Section)
        return list(annotation.model_fields)
    return list(fields)
