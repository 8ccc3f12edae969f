"""What a benchmark is: data, questions, a scorer, and metrics that are functions of sums over items."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from fedcli.eval.data import DataSource, Files
from fedcli.eval.requests import Answerer, Generation, Text

if TYPE_CHECKING:
    from fedcli.eval.judge import Judge
    from fedcli.eval.sandbox import CodeRunner

Need: TypeAlias = Literal["judge", "judge-optional", "code-execution", "gpu-advised", "likelihood"]
Mark: TypeAlias = float | Sequence[float]
"""What one item gives to one metric: a number to average, or a vector of which the metric knows the sum's meaning."""


@dataclass(frozen=True)
class Metric:
    """A metric: the mean of its items' marks, or `of_sum` of the sum of their vectors (F1, BLEU).

    Items without a mark for it are not counted. That sums are enough makes bootstrap resampling cheap.
    """

    name: str
    unit: str = "share"
    """share (0 to 1), points (1 to 10), BLEU (0 to 100) or nats."""
    higher_is_better: bool = True
    of_sum: Callable[[Sequence[float]], float] | None = None
    mean_of: tuple[tuple[str, str], ...] = ()
    """Of a benchmark of parts: the (part, metric) pairs whose values it is the mean of."""
    is_detail: bool = False
    """Details (a subject, a category) are kept with the scores, and left out of tables."""


@dataclass(frozen=True)
class ItemScore:
    """One item with its marks, as the .jsonl beside the scores keeps it."""

    item: str
    """Unique in the benchmark, the same for every model: pairs of models are compared item by item."""
    marks: Mapping[str, Mark]
    """By metric; none where the item could not be scored (no judge, no judgment that parses)."""
    record: Mapping[str, object]
    """What a reader wants to see: prompt, answer, what was expected, what went wrong."""
    cluster: str | None = None
    """What items that are not independent have in common, such as a passage: they are resampled together."""


@dataclass(frozen=True)
class Options:
    """What a user may ask for in place of a benchmark's own settings (None); each is part of a score's name."""

    limit: int | None = None
    """Only the first items, of each part of a benchmark: a subject, a task."""
    shots: int | None = None
    samples: int | None = None
    """Answers to every problem (pass@k)."""
    temperature: float | None = None
    max_new_tokens: int | None = None
    template: str | None = None
    """Instead of the workspace's."""
    baseline: str | None = None
    """The target that mt-bench's pairwise mode compares with."""

    @property
    def variant(self) -> str:
        """What differs from a benchmark's own settings, such as "limit=10,shots=0"; "" where nothing does."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return ",".join(f"{name.replace('_', '-')}={value}" for name, value in sorted(given.items()))

    def given(self) -> list[str]:
        """Return the names of those that a user asks for."""
        return [name for name, value in vars(self).items() if value is not None]

    def of(self, benchmark: "Benchmark") -> "Options":
        """Return those that a benchmark obeys."""
        return replace(self, **{name: None for name in self.given() if not benchmark.obeys(name)})


@dataclass(frozen=True)
class Session:
    """All that a benchmark works with."""

    model: Answerer
    files: Files
    options: Options = field(default_factory=Options)
    judge: "Judge | None" = None
    run_code: "CodeRunner | None" = None
    baseline_answers: Mapping[str, str] | None = None
    """By item, those of the target that Options.baseline names, to the same questions."""

    def generation(
        self,
        prompt: Text,
        max_new_tokens: int,
        stop: tuple[str, ...] = (),
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        sample: int = 0,
    ) -> Generation:
        """Return a request with what a user asks for in place of the benchmark's own length and temperature."""
        asked = self.options
        length = max_new_tokens if asked.max_new_tokens is None else asked.max_new_tokens
        heat = temperature if asked.temperature is None else asked.temperature
        return Generation(prompt, length, stop, heat, top_p, sample)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark. `run` asks the model and scores what it says; raises ConfigError for rows that are not as published.

    What it asks again after an interruption costs nothing: the session's model remembers its answers. A benchmark that
    needs a judge or code execution and has none returns its items without marks, answers and all.
    """

    name: str
    title: str
    groups: tuple[str, ...]
    """Such as finance or paper-table-4; a new name makes a new group."""
    metrics: tuple[Metric, ...]
    size: int
    """Items of the published test set."""
    citation: str
    data: DataSource | None
    run: Callable[[Session], list[ItemScore]] | None
    """None: it is made of others, and asks nothing itself."""
    needs: tuple[Need, ...] = ()
    parts: tuple[str, ...] = ()
    """Of a benchmark that is made of others, these."""
    takes: tuple[str, ...] = ("max_new_tokens", "temperature", "template")
    """The options that it obeys, besides limit."""
    packages: tuple[str, ...] = ()
    """Packages that it needs and not every installation has, by the names that are imported (`errors.EXTRAS`)."""
    programs: tuple[str, ...] = ()
    """Programs of the system, beside Python, that its answers are run with (`eval.programs`)."""
    answers_of: str | None = None
    """The benchmark that asks models the same questions, and so has the same answers."""

    def metric(self, name: str) -> Metric | None:
        """Return the metric of a name; METRIC:PART is a detail, the metric of a part that the data names."""
        known = {metric.name: metric for metric in self.metrics}
        whole = known.get(name.partition(":")[0])
        return known.get(name) or (whole and replace(whole, name=name, is_detail=True))

    def obeys(self, option: str) -> bool:
        """Return whether an option changes what it does."""
        return option == "limit" or option in self.takes
