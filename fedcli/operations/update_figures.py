"""What status and report show of each counted update, with what is unusual marked; nothing acts on a mark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedcli.algos.diagnostics import Diagnosis, outliers
from fedcli.workspace.merge_records import CountedUpdate

MANY_ROWS = 10.0
"""Times the median of the numbers of rows, beyond which one is marked."""


@dataclass(frozen=True)
class UpdateFigures:
    """A counted update; `cosine` and `change` are None where only a report, which reads the updates, can tell them."""

    client: int
    weight: float | None
    num_samples: int | None
    """None, as the norm and maybe the weight, where privacy withholds it."""
    norm: float | None
    cosine: float | None
    """Of its difference to the mean's."""
    change: float | None
    """What leaving it out changes the mean by, in the mean's norm."""
    unusual: list[str]
    """Which of its figures lie over 5 median absolute deviations from the median; rows: over ten times the median."""
    steps: int | None = None
    """That it made; None where all make the same."""
    base: int | None = None
    """The round that it was made from; None where that is the one that was merged."""


def figures_of(counted: Sequence[CountedUpdate], found: Mapping[int, Diagnosis] | None = None) -> list[UpdateFigures]:
    """Return the figures of a round's counted updates: its manifest's, else those that were `found` by client."""
    given = {} if found is None else found
    cosines = [entry.cosine if entry.client not in given else given[entry.client].cosine for entry in counted]
    changes = [entry.change if entry.client not in given else given[entry.client].change for entry in counted]
    norms = [entry.delta_norm for entry in counted]
    marks = outliers({"norm": norms, "cosine": cosines, "change": changes})
    ordered = sorted(entry.num_samples for entry in counted if entry.num_samples is not None)
    most = MANY_ROWS * ordered[(len(ordered) - 1) // 2] if ordered else 0.0
    return [
        UpdateFigures(
            entry.client,
            entry.weight,
            entry.num_samples,
            entry.delta_norm,
            cosine,
            change,
            [*mark, *(["rows"] if (entry.num_samples or 0) > most else [])],
            entry.steps,
            entry.base,
        )
        for entry, cosine, change, mark in zip(counted, cosines, changes, marks, strict=True)
    ]


def describe_unusual(figures: UpdateFigures) -> str:
    """Return what is unusual about an update."""
    values = {
        "norm": f"norm {figures.norm:.3g}",
        "cosine": "" if figures.cosine is None else f"cosine to the mean {figures.cosine:.2f}",
        "change": "" if figures.change is None else f"the mean changes by {figures.change:.2g} without it",
        "rows": f"{figures.num_samples} rows",
    }
    return ", ".join(values[name] for name in figures.unusual)
