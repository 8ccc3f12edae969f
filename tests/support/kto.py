"""KTO: Ethayarajh et al., "Model Alignment as Prospect Theoretic Optimization", ICML 2024, equations 7 and 8.

A task in one file, as fedcli/tasks/ or a package of somebody's would have it; both weights lambda are 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedcli.tasks.conversation import Item, Prompt, Turn
from fedcli.tasks.format import MALFORMED, Context, Fields, Format, LeftOut, prompt_of, text
from fedcli.tasks.task import Likelihood, Task

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Judged(Item):
    """A completion of a prompt, which is desirable or not."""

    last_only = True

    prompt: Prompt
    completion: str
    is_desirable: bool

    @property
    def conversations(self) -> tuple[tuple[Turn, ...]]:
        return ((*self.prompt, Turn("assistant", self.completion)),)

    @property
    def numbers(self) -> tuple[float]:
        return (float(self.is_desirable),)


def read(fields: Fields, _: Context) -> Judged:
    """Prompt, completion and label, as trl's unpaired preferences have them."""
    label = fields.get("label")
    if not isinstance(label, bool):
        raise LeftOut(MALFORMED, "column 'label' is neither true nor false")
    return Judged(prompt_of(fields), text(fields, "completion"), label)


def mismatched(batch: Sequence[Any]) -> list[Any]:
    """Return each row's prompt with the next row's response, cut at the longer of the two rows."""
    import numpy as np

    rows = []
    for row, other in zip(batch, (*batch[1:], batch[0]), strict=True):
        (asks,), (answers,) = row.sides, other.sides
        ids = np.concatenate([asks.ids[: asks.prompt_length], answers.ids[answers.prompt_length :]])
        ids = ids[: max(len(asks.ids), len(answers.ids))]
        supervised = np.arange(len(ids)) >= asks.prompt_length
        rows.append(replace(row, sides=(replace(asks, ids=ids, supervised=supervised),)))
    return rows


def reference_point(likelihood: Likelihood, *, beta: float) -> dict[str, "Tensor"]:
    """Return z0: of mismatched rows the mean log ratio of policy and reference, which is at least 0."""
    return {"kl": (likelihood.log_probs - likelihood.reference).mean().clamp(min=0)}


def loss(likelihood: Likelihood, *, beta: float, kl: "Tensor") -> "Tensor":
    """Return the sum over rows of 1 - sigmoid(beta (log ratio - z0)), of the negated difference where undesirable."""
    (label,) = likelihood.numbers
    (log_ratio,) = likelihood.log_probs - likelihood.reference
    return (1 - (beta * (2 * label - 1) * (log_ratio - kl)).sigmoid()).sum()


PLAIN = Format("plain-verdicts", Judged, read)
KTO_PLAIN = Task(
    name="kto-plain",
    description="preference alignment (KTO of a package)",
    item=Judged,
    formats=(PLAIN,),
    loss=loss,
    mean_over="rows",
    hyperparameters=("beta",),
    uses_reference=True,
    batch_terms=reference_point,
    batch_rows=mismatched,
)
