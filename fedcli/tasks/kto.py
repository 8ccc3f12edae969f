"""KTO: Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", ICML 2024, equations 7 and 8.

It learns from single verdicts. A client that holds thumbs up alone, or thumbs down alone, trains as any other.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fedcli.tasks.conversation import Judged
from fedcli.tasks.task import Likelihood, Task
from fedcli.tasks.verdict_formats import VERDICTS

if TYPE_CHECKING:
    from torch import Tensor


def mismatched(batch: Sequence[Any]) -> list[Any]:
    """Return each row's prompt with the next row's response, equation 8's pairs (x_i, y_i+1)."""
    import numpy as np

    rows = []
    for row, other in zip(batch, (*batch[1:], batch[0]), strict=True):
        (asks,), (answers,) = row.sides, other.sides
        joined = (
            np.concatenate([ask[: asks.prompt_length], answer[answers.prompt_length :]])
            for ask, answer in ((asks.ids, answers.ids), (asks.supervised, answers.supervised))
        )
        rows.append(replace(row, sides=(type(asks)(*joined),)))
    return rows


def reference_point(likelihood: Likelihood, **_: float) -> dict[str, "Tensor"]:
    """Return z0: of mismatched rows the mean log ratio of policy and reference, which is at least 0."""
    return {"z0": (likelihood.log_probs - likelihood.reference).mean().clamp(min=0)}


def loss(
    likelihood: Likelihood, *, beta: float, lambda_desirable: float, lambda_undesirable: float, z0: "Tensor"
) -> "Tensor":
    """Return the sum over rows of lambda (1 - sigmoid(beta (r - z0))), of z0 - r where a row is undesirable.

    r is the log ratio of policy and reference.
    """
    (label,) = likelihood.numbers
    (log_ratio,) = likelihood.log_probs - likelihood.reference
    weight = lambda_desirable * label + lambda_undesirable * (1 - label)
    total: Tensor = (weight * (1 - (beta * (2 * label - 1) * (log_ratio - z0)).sigmoid())).sum()
    return total


KTO = Task(
    name="kto",
    description="preference alignment of single verdicts (KTO)",
    item=Judged,
    formats=VERDICTS,
    loss=loss,
    mean_over="rows",
    hyperparameters=("beta", "lambda_desirable", "lambda_undesirable"),
    uses_reference=True,
    batch_terms=reference_point,
    batch_rows=mismatched,
    fewest_rows=2,
)
