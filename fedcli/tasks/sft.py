"""Supervised fine-tuning: cross-entropy of the response's tokens."""

from typing import TYPE_CHECKING

from fedcli.tasks.builtin_formats import EXAMPLES
from fedcli.tasks.conversation import Example
from fedcli.tasks.task import Likelihood, Task

if TYPE_CHECKING:
    from torch import Tensor


def loss(likelihood: Likelihood) -> "Tensor":
    """Return the sum of -log p over the supervised tokens."""
    return likelihood.token_losses.sum()


SFT = Task(
    name="sft",
    description="instruction tuning",
    item=Example,
    formats=EXAMPLES,
    loss=loss,
    mean_over="tokens",
    has_dropout=True,
)
