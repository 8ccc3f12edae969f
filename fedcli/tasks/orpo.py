"""ORPO: Hong et al., "ORPO: Monolithic Preference Optimization without Reference Model", EMNLP 2024, equations 4 to 7.

The likelihood of a response is the geometric mean over its tokens, so that lp below is the mean of their log p. There
is no reference. The authors' code, and trl's, learns the prompt's tokens too; this loss, as equation 6, does not.
"""

from typing import TYPE_CHECKING

from fedcli.tasks.conversation import Preference
from fedcli.tasks.task import Likelihood, Task

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = -1e-7
"""The most that a mean log p counts as: at 0, a response that is certain, the odds would be infinite."""


def loss(likelihood: Likelihood, *, lambda_odds: float) -> "Tensor":
    """Return the sum over pairs of -lp(chosen) - lambda log sigmoid(log odds(chosen) - log odds(rejected))."""
    from torch.nn.functional import logsigmoid

    means = likelihood.log_probs / likelihood.num_tokens
    chosen, rejected = log_odds(means)
    return (-means[0] - lambda_odds * logsigmoid(chosen - rejected)).sum()


def log_odds(log_probs: "Tensor") -> "Tensor":
    """Return log(p / (1 - p)) of log p."""
    bounded = log_probs.clamp(max=LARGEST)
    return bounded - (-bounded.expm1()).log()


ORPO = Task(
    name="orpo",
    description="preference alignment (ORPO)",
    item=Preference,
    loss=loss,
    mean_over="rows",
    hyperparameters=("lambda_odds",),
    has_dropout=True,
)
