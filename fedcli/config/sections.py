"""The sections of fedcli.yaml, and the whole of it."""

import math
import re
from dataclasses import asdict
from fractions import Fraction
from functools import cache
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PlainValidator,
    Tag,
    TypeAdapter,
    model_validator,
)
from pydantic_core import PydanticCustomError

from fedcli.algos import ALGORITHMS, Algorithm, FedAvg
from fedcli.config.aggregation import AggregationConfig
from fedcli.config.clusters import ClustersConfig
from fedcli.config.data import DataConfig, TaskName, check_format
from fedcli.config.exclusions import excluded
from fedcli.config.personal import PersonalConfig
from fedcli.config.privacy import PrivacyConfig
from fedcli.config.section import Count, Section
from fedcli.config.select import selection_fault
from fedcli.config.slurm import SlurmConfig
from fedcli.errors import did_you_mean
from fedcli.tasks import REWARDS, TASKS
from fedcli.tasks.task import USUAL

Quantization: TypeAlias = Literal["none", "int8", "nf4"]


class ModelConfig(Section):
    """The base model: what ships with fedcli or a package, a folder, a .gguf file, or a hub id."""

    base: str = "builtin:tiny"
    quantization: Quantization = "none"
    revision: str | None = None
    trust_remote_code: bool = False


ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]+$", max_length=200)]
"""The end of a layer's name, and no pattern."""


def _target_modules(value: Any) -> Any:
    """Check what names the layers to adapt: a list of ends of names, all-linear, or null for those usual for a base."""
    if value in (None, "all-linear"):
        return value
    wanted = "a list of linear layers is wanted here, or all-linear, or null for those that are usual for the base"
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{wanted} (found {value!r})")
    if len(value) > 1000:
        raise ValueError(f"it has {len(value)} names, and 1000 are allowed: ends of names such as q_proj will do")
    for name in value:
        if name == "all-linear":
            raise ValueError("all-linear stands alone, and in no list")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.\-]{1,200}", name):
            raise ValueError(f"{name!r} is no layer's name, nor the end of one")
    return tuple(value)


Rank: TypeAlias = Annotated[int, Field(ge=1, le=8192)]
_RANK: TypeAdapter[int] = TypeAdapter(Rank, config=ConfigDict(defer_build=True))
_RANKS: TypeAdapter[dict[str, int]] = TypeAdapter(
    dict[Annotated[str, Field(pattern=r"^(default|0|[1-9][0-9]{0,5})$")], Rank], config=ConfigDict(defer_build=True)
)


def _ranks(value: Any) -> Any:
    """Return a rank, or ranks by client in the order of their names, with `default` for all others."""
    if not isinstance(value, dict):
        return _RANK.validate_python(value, strict=True)
    if "default" not in value:
        raise ValueError(f"ranks by client need `default`, the rank of all others (found {value!r})")
    found = _RANKS.validate_python({str(key): rank for key, rank in value.items()}, strict=True)
    if len(found) < len(value):
        raise ValueError(f"a client is named twice (found {value!r})")
    return dict(sorted(found.items()))


class AdapterConfig(Section):
    """The LoRA adapter (Hu et al. 2021); `init` names a folder with an adapter to start from.

    `rank` is one for all, or a mapping of clients to theirs, with `default` for the others; the global adapter has the
    largest, and `alpha` belongs to that: all have the scale alpha / rank.
    """

    rank: Annotated[int | dict[str, int], PlainValidator(_ranks)] = 32
    alpha: Annotated[float, Field(gt=0)] = 64
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    target_modules: Annotated[tuple[str, ...] | Literal["all-linear"] | None, BeforeValidator(_target_modules)] = None
    init: str | None = None

    @property
    def global_rank(self) -> int:
        """The global adapter's rank, the largest of all."""
        return max(self.rank.values()) if isinstance(self.rank, dict) else self.rank

    @property
    def is_mixed(self) -> bool:
        """Whether clients have ranks of their own, which are not all the same."""
        return isinstance(self.rank, dict) and len({*self.rank.values()}) > 1

    def check_default(self, num_clients: int) -> None:
        """Raise ValueError where the default is nobody's rank, and larger than all: nobody would train all of it."""
        own = {} if isinstance(self.rank, int) else {key: rank for key, rank in self.rank.items() if key != "default"}
        if len(own) == num_clients and (most := max(own.values())) < self.global_rank:
            raise ValueError(
                f"adapter.rank: default is {self.global_rank}, which is no client's rank and larger than all: set "
                f"it to {most}"
            )

    def smaller_ranks(self, num_clients: int) -> dict[str, int] | None:
        """Return the ranks of the clients that have a smaller one than the global adapter; None where none has."""
        if not isinstance(self.rank, dict):
            return None
        ranks = {str(client): self.rank.get(str(client), self.rank["default"]) for client in range(num_clients)}
        return {client: rank for client, rank in ranks.items() if rank < self.global_rank} or None


Steps: TypeAlias = Annotated[int, Field(ge=1, le=10**6)]
BatchSize: TypeAlias = Annotated[int, Field(ge=1, le=10**6)]
MaxLength: TypeAlias = Annotated[int, Field(ge=2, le=10**7)]
"""Bounds of what a party can be asked for: beyond them a round would never end, whoever asks."""
Generations: TypeAlias = Annotated[int, Field(ge=2, le=1024)]
MaxNewTokens: TypeAlias = Annotated[int, Field(ge=1, le=10**5)]
KlWeight: TypeAlias = Annotated[float, Field(ge=0, le=1e6)]
MOST_RATE = 10.0
MOST_ROWS = 10**7
"""Of steps x batch_size: all of a round's rows are drawn at once."""
Clients: TypeAlias = Annotated[int, Field(ge=1, le=10**6)]
Rounds: TypeAlias = Annotated[int, Field(ge=1, le=10**6)]


Minutes: TypeAlias = Annotated[float, Field(gt=0, le=10**6)]
Epochs: TypeAlias = Annotated[float, Field(gt=0, le=10**6)]


def _reward(value: Any) -> Any:
    """Return the name of a reward function that is installed."""
    if value is not None and (not isinstance(value, str) or value not in REWARDS):
        raise ValueError(
            f"unknown reward function {value!r}. {did_you_mean(str(value), REWARDS)} "
            "Where a package brings it (entry points fedcli.rewards), install that here, too"
        )
    return value


class LimitedSteps(Section):
    """At most so many steps: so many passes over a client's own rows, as many as fit into so many minutes, or both.

    At least one step is made.
    """

    max: Steps
    minutes: Minutes | None = None
    epochs: Epochs | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.minutes is None and self.epochs is None:
            raise ValueError("max stands beside minutes or epochs; a number of steps stands alone: steps: 10")
        return self


def _kind_of_steps(value: Any) -> str:
    return "<limited>" if isinstance(value, dict | LimitedSteps) else "<number>"


class TrainConfig(Section):
    """What one client does in one round; a task's hyperparameters, from beta on, have its usual values where None.

    With `keep_optimizer` AdamW goes on from the client's last counted round.
    """

    steps: Annotated[
        Annotated[Steps, Tag("<number>")] | Annotated[LimitedSteps, Tag("<limited>")], Discriminator(_kind_of_steps)
    ] = 10
    batch_size: BatchSize = 16
    micro_batch_size: BatchSize | None = None
    max_length: MaxLength = 512
    learning_rate: Annotated[float, Field(gt=0, le=MOST_RATE)] = 5e-5
    learning_rate_min: Annotated[float, Field(ge=0)] = 1e-6
    beta: Annotated[float, Field(gt=0)] | None = None
    gamma: Annotated[float, Field(ge=0)] | None = None
    lambda_odds: Annotated[float, Field(ge=0)] | None = None
    lambda_desirable: Annotated[float, Field(gt=0)] | None = None
    lambda_undesirable: Annotated[float, Field(gt=0)] | None = None
    gradient_checkpointing: bool = False
    generations: Generations = 4
    max_new_tokens: MaxNewTokens = 64
    reward: Annotated[str | None, BeforeValidator(_reward)] = None
    kl: KlWeight = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    personal: PersonalConfig | None = None
    keep_optimizer: bool = False

    @property
    def most_steps(self) -> int:
        """The steps of a round, or the most of them where a client may make fewer."""
        return self.steps if isinstance(self.steps, int) else self.steps.max

    @property
    def minutes(self) -> float | None:
        """The time limit of a round's steps; None where there is none."""
        return None if isinstance(self.steps, int) else self.steps.minutes

    @property
    def epochs(self) -> float | None:
        """The passes over a client's own rows in a round; None where all clients make the same steps."""
        return None if isinstance(self.steps, int) else self.steps.epochs

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        if self.most_steps * self.batch_size > MOST_ROWS:
            raise ValueError(
                f"steps x batch_size is {self.most_steps * self.batch_size:,}, and {MOST_ROWS:,} are allowed"
            )
        if self.learning_rate_min > self.learning_rate:
            raise ValueError("learning_rate_min is larger than learning_rate")
        return self

    def learning_rate_of(self, round_number: int, rounds: int) -> float:
        """Return the cosine schedule's rate: lr_min + (lr_0 - lr_min) (1 + cos(pi t / T)) / 2."""
        cosine = (1 + math.cos(math.pi * round_number / rounds)) / 2
        return self.learning_rate_min + (self.learning_rate - self.learning_rate_min) * cosine


def parse_algorithm(value: object) -> Algorithm:
    """Return the algorithm of a section or a manifest; the class under its name says what else belongs in it.

    Raises ValidationError for its hyperparameters, PydanticCustomError where it has no name or an unknown one.
    """
    if isinstance(value, Algorithm):
        return value
    if not isinstance(value, dict) or "name" not in value:
        raise PydanticCustomError("no_algorithm", "it has no name")
    name = value["name"]
    if not isinstance(name, str) or name not in ALGORITHMS:
        raise PydanticCustomError("unknown_algorithm", "it is unknown", {"name": str(name)})
    kind: Any = ALGORITHMS[name]
    return _adapter(kind).validate_python(value)


AlgorithmSection: TypeAlias = Annotated[Algorithm, PlainValidator(parse_algorithm), PlainSerializer(asdict)]


@cache
def _adapter(kind: type[Algorithm]) -> TypeAdapter[Algorithm]:
    return TypeAdapter(kind)


def _seconds(value: Any) -> Any:
    """Return a length of time such as 90s, 30m, 2h or 1d in seconds; what is no such text, as it is."""
    if isinstance(value, str) and (match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([smhd])", value)):
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
    if isinstance(value, str | bool):
        raise ValueError(f"not a length of time such as 90s, 30m, 2h or 1d (found {value})")
    return value


def parse_bytes(value: Any) -> Any:
    """Return a number of bytes such as 500MB or 200GB, in decimal units; what is no such text, as it is."""
    if isinstance(value, str) and (match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kMGT]?B)", value)):
        return int(Fraction(match[1]) * {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}[match[2]])
    if isinstance(value, str | bool):
        raise ValueError(f"not a number of bytes such as 500MB or 200GB (found {value})")
    return value


def _off(value: Any) -> Any:
    """Return "off" for what YAML reads the bare word as."""
    return "off" if value is False else value


class FederationConfig(Section):
    """Who takes part, how often and how long; `quorum` is the share that must have answered, of those who count.

    With `select` more clients are drawn than count. `deadline` is in seconds from a round's opening: then one answer
    is enough. An update of whose files nothing more came for `arriving` seconds is refused. With `multi_user` parties
    may run under unix users of their own. With `relay_every` the federation is a region: after so many rounds its
    adapter goes to a parent, from whose next round it goes on (docs/HIERARCHY.md). Without `signatures` they are
    required where parties join, and off in a simulation. `budget` is in bytes that all rounds together may move, both
    ways: init and doctor say where they would move more.
    """

    clients: Clients = 5
    per_round: Count | None = None
    rounds: Rounds = 10
    seed: Annotated[int, Field(ge=0)] = 0
    quorum: Annotated[float, Field(gt=0, le=1)] = 1.0
    select: Count | None = None
    deadline: Annotated[float, BeforeValidator(_seconds), Field(gt=0)] | None = None
    arriving: Annotated[float, BeforeValidator(_seconds), Field(gt=0)] | None = None
    multi_user: bool = False
    relay_every: Count | None = None
    signatures: Annotated[Literal["required", "off"] | None, BeforeValidator(_off)] = None
    budget: Annotated[int, BeforeValidator(parse_bytes), Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_counted > self.clients:
            raise ValueError(f"per_round {self.per_round} is more than the {self.clients} clients")
        if not self.num_counted <= self.cohort_size <= self.clients:
            raise ValueError(
                f"select is {self.select}: it must lie between per_round, {self.num_counted}, "
                f"and the {self.clients} clients"
            )
        return self

    @property
    def num_counted(self) -> int:
        """The number of updates that count in a round: `per_round`, or all."""
        return self.clients if self.per_round is None else self.per_round

    @property
    def cohort_size(self) -> int:
        """The number of clients drawn for a round: `select`, or as many as count."""
        return self.num_counted if self.select is None else self.select

    def needed_answers(self, num_counted: int) -> int:
        """Return how many clients must have answered: ceil(quorum x those who count), in exact decimal arithmetic."""
        return math.ceil(Fraction(str(self.quorum)) * num_counted)


class EvalConfig(Section):
    """Scores of new rounds: of every `every`-th and the last one, on `benchmarks`, as `fedcli eval` makes them."""

    every: Count | None = None
    benchmarks: tuple[str, ...] = ()
    data: str | None = None
    limit: Count | None = None
    judge_model: str | None = None
    judge_url: str | None = None
    allow_code_execution: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.every is not None and not self.benchmarks:
            raise ValueError("every is set, and no benchmarks are")
        return self


class RetentionConfig(Section):
    """Which rounds `fedcli gc` leaves whole: the last `keep_last`, and every `keep_every`-th; None removes nothing."""

    keep_last: Count | None = None
    keep_every: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.keep_every is not None and self.keep_last is None:
            raise ValueError("keep_every is set, and keep_last is not")
        return self


class Config(Section):
    """The whole of fedcli.yaml."""

    task: TaskName = "sft"
    model: ModelConfig = ModelConfig.model_construct()
    adapter: AdapterConfig = AdapterConfig.model_construct()
    data: DataConfig = DataConfig.model_construct()
    train: TrainConfig = TrainConfig.model_construct()
    algorithm: AlgorithmSection = FedAvg()
    aggregation: AggregationConfig = AggregationConfig.model_construct()
    clusters: ClustersConfig = ClustersConfig.model_construct()
    federation: FederationConfig = FederationConfig.model_construct()
    privacy: PrivacyConfig = PrivacyConfig.model_construct()
    eval: EvalConfig = EvalConfig.model_construct()
    retention: RetentionConfig = RetentionConfig.model_construct()
    slurm: SlurmConfig = SlurmConfig.model_construct()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for given in (self.data.format, *(entry.format for entry in self.data.sources)):
            if given is not None:
                check_format(given, self.task)
        if isinstance(self.adapter.rank, dict):
            for client in self.adapter.rank.keys() - {"default"}:
                if int(client) >= self.federation.clients:
                    raise ValueError(
                        f"adapter.rank names client {client}, and federation.clients is {self.federation.clients}"
                    )
            self.adapter.check_default(self.federation.clients)
        self._check_task()
        self.aggregation.check_enough(self.federation.num_counted)
        federation = self.federation
        self.clusters.check_clients(federation.clients)
        self.aggregation.check_most_counted(federation.clients, federation.num_counted)
        self.privacy.check_adaptive(federation.num_counted, federation.rounds)
        self.privacy.check_against(
            self.aggregation, federation.signatures, federation.num_counted, federation.cohort_size
        )
        if federation.relay_every is not None:
            self._check_region()
        for problem in excluded(self, Config.model_construct()):
            raise ValueError(problem)
        return self

    def _check_task(self) -> None:
        """Raise ValueError for a hyperparameter of another task, and for what the task cannot be trained with.

        A beta stands in files of all tasks: earlier versions wrote one.
        """
        task = TASKS[self.task]
        for name in (*USUAL, "reward", "generations", "max_new_tokens", "kl"):
            default = TrainConfig.model_fields[name].default
            if name not in ("beta", *task.hyperparameters) and getattr(self.train, name) != default:
                uses = ", ".join(other.name for other in TASKS.usable() if name in other.hyperparameters)
                raise ValueError(f"train.{name} is set, and task {task.name} has none: it is of task {uses}")
        if self.train.batch_size < task.fewest_rows:
            raise ValueError(
                f"train.batch_size is {self.train.batch_size}: task {task.name} compares the rows of a batch with each "
                f"other, and needs {task.fewest_rows} or more (8, for an estimate that is not all noise)"
            )
        if "reward" in task.hyperparameters and self.train.reward is None:
            raise ValueError(f"train.reward is not set, and task {self.task} needs one: {', '.join(REWARDS)}")
        if "generations" in task.hyperparameters and self.train.batch_size % self.train.generations:
            raise ValueError(
                f"train.generations {self.train.generations} does not divide batch_size {self.train.batch_size}"
            )
        if not task.is_row_by_row and self.privacy.unit in ("row", "group"):
            raise ValueError(
                f"task {task.name} and privacy.unit {self.privacy.unit} exclude each other: a row's part in a step "
                "depends on other rows or answers, so that no clipping bounds it"
            )
        select = self.data.select
        if select is not None and (fault := selection_fault(select, task, self.privacy.unit, "data.select")):
            raise ValueError(fault)

    def _check_region(self) -> None:
        """Raise ValueError where a region would send up anything else than the mean of its updates by rows."""
        refused = {
            f"algorithm.name: {self.algorithm.name}": self.algorithm.name != "fedavg",
            f"aggregation.rule: {self.aggregation.rule}": self.aggregation.rule != "mean",
            "aggregation.nearest_mixing": self.aggregation.nearest_mixing,
            "aggregation.weight_cap": self.aggregation.weight_cap is not None,
            f"privacy.unit: {self.privacy.unit}": self.privacy.unit is not None,
        }
        if found := [name for name, is_set in refused.items() if is_set]:
            raise ValueError(
                f"federation.relay_every and {found[0]} exclude each other: a region sends its parent the mean of its "
                "updates by rows, and its parties train as the parent's rounds ask (docs/HIERARCHY.md)"
            )

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
            **({} if self.clusters.by is None else {"clusters": self.clusters.model_dump(mode="json")}),
        }
