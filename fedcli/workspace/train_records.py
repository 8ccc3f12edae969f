"""What a manifest says of training: all that a client must obey in its round."""

import math
from datetime import date as Date  # `date` is a key of the protocol
from fractions import Fraction
from typing import Annotated, Literal, Self, get_args

from pydantic import (
    Field,
    model_validator,
)

from fedcli.config import SelectConfig, TemplateChoice
from fedcli.config.personal import PersonalName
from fedcli.config.sections import (
    MOST_RATE,
    MOST_ROWS,
    BatchSize,
    Epochs,
    Generations,
    KlWeight,
    MaxLength,
    MaxNewTokens,
    Minutes,
    Steps,
)
from fedcli.tasks.task import Hyperparameter
from fedcli.workspace.record import LARGEST_COUNT, Finite, Record


class Schedule(Record):
    """The learning rate over the federation's rounds: cosine from `learning_rate` to `learning_rate_min`."""

    name: Literal["cosine"] = "cosine"
    learning_rate: Finite
    learning_rate_min: Finite
    rounds: Annotated[int, Field(le=LARGEST_COUNT)]


class PersonalRecord(Record):
    """The adapter of its own that a client trains beside the shared one; it is never sent."""

    unwritten = ("pull", "weight")

    name: PersonalName
    pull: Annotated[Finite, Field(ge=0)] | None = None
    """Of ditto: the lambda that holds it near the global adapter."""
    weight: Annotated[Finite, Field(gt=0)] | None = None
    """Of feddpa: what its product is multiplied by, beside the global adapter's."""


class TrainRecord(Record):
    """All that a client must obey in its round; `learning_rate` is this round's."""

    unwritten = (
        "date",
        "personal",
        "minutes",
        "epochs",
        "keep_optimizer",
        "select",
        *({*get_args(Hyperparameter)} - {"beta"}),
    )

    steps: Steps
    minutes: Minutes | None = None
    """That the steps may take: a client then makes as many as fit, at least one; None, and not written: all."""
    epochs: Epochs | None = None
    """Passes over its own rows that a client makes, in `steps` at most; None, and not written: it makes all `steps`."""
    batch_size: BatchSize
    micro_batch_size: BatchSize | None
    """None: a client cuts its batches as it likes; the gradient is the same."""
    max_length: MaxLength
    learning_rate: Annotated[float, Field(ge=0, le=MOST_RATE)]
    schedule: Schedule
    weight_decay: Annotated[Finite, Field(ge=0)]
    max_grad_norm: Annotated[Finite, Field(gt=0)]
    beta: Finite | None = None
    """A hyperparameter of the task, as those that follow; None where the task has none."""
    gamma: Finite | None = None
    """Not written where it is None, as those that follow."""
    lambda_odds: Finite | None = None
    lambda_desirable: Finite | None = None
    lambda_undesirable: Finite | None = None
    select: SelectConfig | None = None
    """Which rows a client is to train on, by scores that it keeps to itself; None, and not written: on all."""
    generations: Generations | None = None
    """Of GRPO, as the three below: the answers to each row, of which a batch has `batch_size`; not written if None."""
    max_new_tokens: MaxNewTokens | None = None
    reward: Annotated[str, Field(max_length=200)] | None = None
    kl: KlWeight | None = None
    gradient_checkpointing: bool = False
    template: TemplateChoice
    date: Annotated[str, Field(max_length=10)] | None = None
    """The day that the base's chat template writes, as 2026-11-29; not written where it writes none."""
    personal: PersonalRecord | None = None
    """None, and not written, where clients train the shared adapter alone."""
    seed: Annotated[int, Field(ge=0)]
    keep_optimizer: Literal[True] | None = None
    """AdamW's moments go on from the client's last counted round; None, and not written: they start afresh."""

    @property
    def is_uneven(self) -> bool:
        """Whether clients may make unlike numbers of steps."""
        return self.minutes is not None or self.epochs is not None

    def for_rows(self, num_rows: int, *, least: int = 1) -> "TrainRecord":
        """Return it with the steps that a client of so many rows makes, and `least` of them or all."""
        if self.epochs is None:
            return self
        passes = math.ceil(num_rows * Fraction(str(self.epochs)) / self.rows_per_step)
        return self.model_copy(update={"steps": min(self.steps, max(passes, least, 1)), "epochs": None})

    @property
    def steps_made(self) -> int:
        """The optimiser steps of a client, those of its own adapter with them."""
        return self.steps * (1 if self.personal is None else 2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.steps * self.batch_size > MOST_ROWS:
            raise ValueError(f"steps x batch_size is more than {MOST_ROWS:,}")
        if self.generations is not None and self.batch_size % self.generations:
            raise ValueError("generations does not divide batch_size")
        if self.date is not None:
            Date.fromisoformat(self.date)
        return self

    @property
    def rows_per_step(self) -> int:
        """The rows of a batch: as many as its size, or where each is answered several times as many less."""
        return self.batch_size // (self.generations or 1)

    @property
    def num_drawn(self) -> int:
        """The rows that a client draws in the round."""
        return self.steps * self.rows_per_step
