"""A task: what rows teach, and the loss that teaches it, as a function of the likelihoods of responses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from fedcli.tasks.conversation import Item
from fedcli.tasks.format import Format

if TYPE_CHECKING:
    from torch import Tensor

Hyperparameter: TypeAlias = Literal[
    "beta",
    "gamma",
    "lambda_odds",
    "lambda_desirable",
    "lambda_undesirable",
    "generations",
    "max_new_tokens",
    "reward",
    "kl",
]
"""A key of fedcli.yaml's section train that a task may use."""
USUAL: Mapping[Hyperparameter, float] = {
    "beta": 0.1,
    "gamma": 0.5,
    "lambda_odds": 0.1,
    "lambda_desirable": 1.0,
    "lambda_undesirable": 1.0,
}
"""Their values where neither fedcli.yaml nor the task says another."""
LOOP = "fedcli.training.trainer:train_round"
"""fedcli's own loop of optimiser steps."""


class Likelihood(NamedTuple):
    """What the model in training says of n rows of s responses: an example's one, or a preference's two."""

    token_losses: "Tensor"
    """-log p of every supervised token, float32, (tokens,)."""
    log_probs: "Tensor"
    """log p of every response, the sum over its tokens, float32, (s, n)."""
    num_tokens: "Tensor"
    """The supervised tokens of every response, (s, n)."""
    reference: "Tensor"
    """`log_probs` of the reference, round 0's adapter, float64, (s, n); (0, n) for a task without one."""
    numbers: "Tensor"
    """The items' numbers, float32, (numbers of an item, n)."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task; fedcli.yaml names it, and a manifest records the name.

    Who reads fedcli.yaml loads the task, and the server does: a loss imports torch inside its function.
    """

    name: str
    description: str
    """What a federation does with it, for reports and model cards: "instruction tuning"."""
    item: type[Item]
    """What it learns from: the formats that make such items of rows are its formats."""
    formats: tuple[Format, ...] = ()
    """Formats that are known with it, where it is fedcli's own."""
    loss: "Callable[..., Tensor] | None" = None
    """loss(likelihood, **hyperparameters) is the sum over the rows (or tokens) of a part of a batch.

    None alone for a task whose `trainer` is not fedcli's loop.
    """
    mean_over: Literal["tokens", "rows"]
    """A step's loss is that sum over the whole batch, over the number of its supervised tokens or rows."""
    hyperparameters: tuple[Hyperparameter, ...] = ()
    usual: Mapping[Hyperparameter, float] = field(default_factory=dict)
    """Values of hyperparameters where fedcli.yaml gives none, which differ from `USUAL`."""
    uses_reference: bool = False
    """Whether the log-probabilities of round 0's adapter are computed for every row, once a client."""
    has_dropout: bool = False
    """Whether adapter.dropout is on: a loss that compares with a reference, which has none, does without."""
    batch_terms: "Callable[..., Mapping[str, Tensor]] | None" = None
    """batch_terms(likelihood of the whole batch, **hyperparameters) gives the step's losses further arguments.

    It is called before each step, without gradients, and costs a forward pass over the batch.
    """
    batch_rows: Callable[[Sequence[Any]], Sequence[Any]] | None = None
    """batch_rows(a batch) makes as many other rows of it, whose likelihood `batch_terms` gets instead of the batch's.

    A row is a `fedcli.data.encoded.EncodedRow`: KTO joins each prompt with the response of another row. What is longer
    than train.max_length is cut.
    """
    fewest_rows: int = 1
    """The rows that a batch must have at least: two, where one row is compared with another."""
    trainer: str = LOOP
    """How a round is trained: "module:function", imported when a client trains.

    The function gets a `fedcli.training.work.RoundWork`, trains its adapter in place and returns the steps' losses.
    """
    packages: tuple[str, ...] = ()
    """The packages, of `fedcli.errors.EXTRAS`, that training needs beside fedcli's own."""

    @property
    def is_row_by_row(self) -> bool:
        """Whether a step's gradient is a sum over rows, each by itself, as privacy of rows and groups needs it."""
        return self.trainer == LOOP and self.batch_terms is None and self.batch_rows is None

    def hyperparameters_of(self, given: object) -> dict[Hyperparameter, Any]:
        """Return the values of the task's hyperparameters: those that a section train gives, else the usual ones."""
        usual: dict[Hyperparameter, Any] = {**USUAL, **self.usual}
        found = {name: getattr(given, name) for name in self.hyperparameters}
        return {name: usual.get(name) if value is None else value for name, value in found.items()}
