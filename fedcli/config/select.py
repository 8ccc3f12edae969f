"""fedcli.yaml's `data.select`: which of a client's rows a round trains on, by a score that the client computes."""

import math
from fractions import Fraction
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from fedcli.config.section import Section
from fedcli.tasks.task import Task

ScoreName: TypeAlias = Literal["ira", "ifd", "length"]
OrderName: TypeAlias = Literal["none", "ascending", "descending"]

RANGES: dict[ScoreName, tuple[float, float]] = {"ira": (-4.0, 4.0), "ifd": (0.0, 2.0), "length": (0.0, 1024.0)}
"""What the bins of a histogram divide, the same for every party; the first and the last hold what lies beyond."""


class SelectConfig(Section):
    """The rows of the highest scores are kept, the share `keep` of a client's; `order` sorts the rows of a round.

    ira: how much the prompt lowers the response's mean loss (FedDQC, 2410.11540); ifd: the perplexity of the response
    given the prompt over that without it (2308.12032), where rows of 1 or more are dropped at first; length: the
    response's tokens.
    """

    score: ScoreName
    keep: Annotated[float, Field(gt=0, le=1)] = 0.8
    order: OrderName = "none"

    def most(self, num_rows: int) -> int:
        """Return how many of so many rows are kept at most: keep x rows, rounded up."""
        return math.ceil(Fraction(str(self.keep)) * num_rows)


def describe_select(select: SelectConfig | Literal["off"]) -> str:
    """Return a selection as --select has it."""
    if select == "off":
        return select
    return f"'{{score: {select.score}, keep: {select.keep:g}, order: {select.order}}}'"


def selection_fault(select: SelectConfig, task: Task, unit: str | None, where: str) -> str | None:
    """Return why rows cannot be selected so; None where they can."""
    if not task.item.has_response:
        return f"{where} and task {task.name} exclude each other: scores are of responses, and its rows have none"
    if select.score != "length" and not task.item.teaches_response:
        return (
            f"{where}.score: {select.score} and task {task.name} exclude each other: the score drops responses that "
            "do not fit their prompts, which are what the task learns to avoid"
        )
    if unit in ("row", "group"):
        return (
            f"{where} and privacy.unit: {unit} exclude each other: which rows are kept depends on every other row, and "
            "DP-SGD counts on its own draw"
        )
    return None
