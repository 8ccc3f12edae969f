"""SimPO: Meng et al., "SimPO: Simple Preference Optimization with a Reference-Free Reward", NeurIPS 2024, equation 6.

The reward of a response is beta times the mean of its tokens' log p. There is no reference.
"""

from typing import TYPE_CHECKING

from fedcli.tasks.conversation import Preference
from fedcli.tasks.task import Likelihood, Task

if TYPE_CHECKING:
    from torch import Tensor


def loss(likelihood: Likelihood, *, beta: float, gamma: float) -> "Tensor":
    """Return the sum over pairs of -log sigmoid(beta (lp(chosen) - lp(rejected)) - gamma), lp a mean over tokens."""
    from torch.nn.functional import logsigmoid

    chosen, rejected = likelihood.log_probs / likelihood.num_tokens
    return -logsigmoid(beta * (chosen - rejected) - gamma).sum()


SIMPO = Task(
    name="simpo",
    description="preference alignment (SimPO)",
    item=Preference,
    loss=loss,
    mean_over="rows",
    hyperparameters=("beta", "gamma"),
    usual={"beta": 2.0},
    has_dropout=True,
)
