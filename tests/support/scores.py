"""Scores as an evaluation keeps them, of marks that a test chooses."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedcli.eval.benchmark import Metric
from fedcli.eval.registry import BENCHMARKS
from fedcli.eval.statistics import score
from fedcli.workspace.layout import Workspace
from fedcli.workspace.scores import ScoreEntry, ScoreRecord, publish_scores

LOSS = Metric("loss", "nats", higher_is_better=False)
ACCURACY, F1, MACRO_F1 = BENCHMARKS["fpb"].metrics


def keep(
    workspace: Workspace,
    target: str,
    benchmark: str,
    marks: Mapping[Metric, Sequence[Any]],
    *,
    variant: str = "",
    adapter: str | None = None,
    data: str = "rows.jsonl",
    judge: str | None = None,
    notes: Sequence[str] = (),
    awaits: str | None = None,
) -> None:
    """Keep a target's marks as an evaluation does."""
    by_item = {metric: {str(number): mark for number, mark in enumerate(found)} for metric, found in marks.items()}
    scores = {
        metric.name: ScoreEntry(
            **vars(score(metric, [found])),
            unit=metric.unit,
            higher_is_better=metric.higher_is_better,
            is_detail=metric.is_detail,
        )
        for metric, found in by_item.items()
    }
    num_items = max(map(len, marks.values()), default=0)
    record = ScoreRecord(
        benchmark=benchmark, variant=variant, target=target, model={"adapter": adapter}, settings={"judge": judge},
        data={"files": data}, scores=scores, awaits=awaits, num_items=num_items, num_unscored=0, notes=list(notes),
        seconds=1.0, num_generated_tokens=0, tokens_per_second=None, versions={}, created="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    items = [
        {
            "item": str(number),
            "marks": {metric.name: found[number] for metric, found in marks.items() if number < len(found)},
        }
        for number in range(num_items)
    ]
    publish_scores(workspace, record, items)
