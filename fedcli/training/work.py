"""What a task's trainer gets of a round: the adapter, the rows, and what the manifest and the client rule ask for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedcli.algos import ClientRule
from fedcli.data.encoded import EncodedRow
from fedcli.tasks import Task
from fedcli.tasks.rewards import Answer
from fedcli.training.reports import StepReport, TrainSettings

if TYPE_CHECKING:
    from fedcli.model.lora import AdaptedModel
    from fedcli.training.limits import TimeLimit
    from fedcli.training.moments import Moments


@dataclass(frozen=True)
class Answering:
    """What a trainer needs whose model answers prompts."""

    end_id: int
    """The token that ends an answer."""
    score: Callable[[Sequence[Answer]], Sequence[float]]
    """The reward of each answer, finite."""
    folder: Path
    """A folder of its own for what a library writes; it is gone after the round."""


@dataclass(frozen=True)
class RoundWork:
    """One client's work in one round; the adapter holds the values that training starts from."""

    adapted: "AdaptedModel"
    rows: Sequence[EncodedRow]
    """The drawn rows, batch after batch."""
    task: Task
    settings: TrainSettings
    rule: ClientRule | None
    on_step: Callable[[StepReport], None]
    """Hears of every optimiser step."""
    batch_rows: Sequence[EncodedRow] = ()
    """What the task's hook of this name made of the batches, end to end."""
    answering: Answering | None = None
    """There for tasks with a reward function."""
    limit: "TimeLimit | None" = None
    """What may stop the steps before the last."""
    moments: "Moments | None" = None
    """AdamW's, that it goes on from, and leaves as they are then."""
