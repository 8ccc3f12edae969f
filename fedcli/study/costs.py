"""What a study's scores cost in bytes: until each round, the last round within a budget, and the cost of a score.

The last two are the views of EdgeFlowerTune (2605.08636): quality under a budget, and cost to a target. They go by the
rounds that have been scored, so by eval.every of study.yaml.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from fedcli.errors import UsageError, did_you_mean
from fedcli.eval.registry import find_benchmarks
from fedcli.scoring.communication import HEAD, bytes_until, in_megabytes, is_worth_a_column
from fedcli.study.columns import Column
from fedcli.study.folder import StudyFolder
from fedcli.study.plan import Cell
from fedcli.study.scored import Scored, metric_of
from fedcli.workspace.layout import Workspace
from fedcli.workspace.target_name import TargetName

if TYPE_CHECKING:
    from fedcli.study.results import Block


@dataclass(frozen=True)
class Goal:
    """A score to reach: BENCHMARK.METRIC=VALUE."""

    column: Column
    value: float

    @classmethod
    def parse(cls, text: str) -> "Goal":
        """Return the goal that a command line names; raise UsageError where it names none."""
        name, _, number = text.rpartition("=")
        benchmark, _, metric = name.partition(".")
        try:
            if not (benchmark and metric):
                raise ValueError
            return cls(Column(benchmark=benchmark, metric=metric), float(number))
        except ValueError:
            hint = "Name one of the table's columns: fedcli study table --goal fpb.accuracy=0.8"
            raise UsageError(f"--goal {text}: it is not BENCHMARK.METRIC=VALUE", hint=hint) from None

    def check(self, benchmarks: Sequence[str]) -> None:
        """Raise UsageError for a column that no benchmark of a study has."""
        known = [f"{found.name}.{metric.name}" for found in find_benchmarks(benchmarks) for metric in found.metrics]
        if (name := f"{self.column.benchmark}.{self.column.metric}") not in known:
            raise UsageError(f"--goal {name}: the study has no such column", hint=did_you_mean(name, known))

    @property
    def head(self) -> str:
        """The title of a column with the costs of reaching it."""
        return f"MB to {self.column.benchmark} {self.column.metric} {self.value:g}"

    def is_reached(self, value: float) -> bool:
        """Return whether a score is as good as it, or better."""
        return value >= self.value if metric_of(self.column).higher_is_better else value <= self.value


@dataclass(frozen=True)
class Reached:
    """What reaching a goal took, by the seeds that reached it in a scored round."""

    num_bytes: Mapping[int, int]
    num_seeds: int

    @property
    def shown(self) -> str:
        """The mean in megabytes; of how many seeds, where not all reached it."""
        if not self.num_bytes:
            return "not reached"
        mean = in_megabytes(fmean(self.num_bytes.values()))
        count = len(self.num_bytes)
        return mean if count == self.num_seeds else f"{mean} ({count} of {self.num_seeds} seeds)"


def bytes_of_round(folder: StudyFolder, cell: Cell, number: int) -> int | None:
    """Return the bytes that all clients of a cell had sent and fetched until a round; None where it is not counted."""
    return bytes_until(Workspace(folder.workspace(cell)), TargetName.of_round(number))


def last_within(folder: StudyFolder, scored: Scored, cell: Cell, budget: int) -> int | None:
    """Return the last round that has been scored and until which no more bytes than a budget were moved."""
    rounds = {
        number
        for target, _ in scored.records(cell)
        if TargetName.parse(target).kind == "round" and (number := TargetName.parse(target).number) is not None
    }
    moved = {number: bytes_of_round(folder, cell, number) for number in rounds}
    return max((number for number, size in moved.items() if size is not None and size <= budget), default=None)


def reached(folder: StudyFolder, scored: Scored, cells: Sequence[Cell], goal: Goal) -> dict[str, Reached]:
    """Return what each algorithm took to reach a goal; none where no round has a score in its column."""
    found: dict[str, dict[int, int]] = {}
    num_seeds: dict[str, int] = {}
    for cell in cells:
        rounds = scored.rounds(cell, goal.column) if cell.algorithm is not None else {}
        if not rounds:
            continue
        num_seeds[cell.label] = num_seeds.get(cell.label, 0) + 1
        for number, value in sorted(rounds.items()):
            if goal.is_reached(value):
                if (moved := bytes_of_round(folder, cell, number)) is not None:
                    found.setdefault(cell.label, {})[cell.seed] = moved
                break
    return {label: Reached(found.get(label, {}), count) for label, count in num_seeds.items()}


def cost_columns(block: "Block") -> list[tuple[str, Mapping[str, str]]]:
    """Return the titles of a block's columns of bytes, and their cells by row."""
    columns: list[tuple[str, Mapping[str, str]]] = []
    means = {label: fmean(sizes.values()) for label, sizes in block.communication.items()}
    if is_worth_a_column(means):
        columns.append((HEAD, {label: in_megabytes(mean) for label, mean in means.items()}))
    if block.goal is not None:
        columns.append((block.goal.head, {label: found.shown for label, found in block.reached.items()}))
    return columns
