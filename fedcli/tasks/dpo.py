"""Direct preference optimisation: Rafailov et al., "Direct Preference Optimization", NeurIPS 2023, equation 7."""

from typing import TYPE_CHECKING

from fedcli.tasks.builtin_formats import PREFERENCES
from fedcli.tasks.conversation import Preference
from fedcli.tasks.task import Likelihood, Task

if TYPE_CHECKING:
    from torch import Tensor


def loss(likelihood: Likelihood, *, beta: float) -> "Tensor":
    """Return the sum over pairs of -log sigmoid(beta (log p(chosen) - log p(rejected) - the reference's margin))."""
    from torch.nn.functional import logsigmoid

    chosen, rejected = likelihood.log_probs
    reference_chosen, reference_rejected = likelihood.reference
    margin = (reference_chosen - reference_rejected).float()
    return -logsigmoid(beta * (chosen - rejected - margin)).sum()


DPO = Task(
    name="dpo",
    description="preference alignment (DPO)",
    item=Preference,
    formats=PREFERENCES,
    loss=loss,
    mean_over="rows",
    hyperparameters=("beta",),
    uses_reference=True,
)
