"""A report's page: one HTML file with everything in it, no script, and nothing from any network."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedcli.printable import printable
from fedcli.quantities import describe_bytes, describe_seconds
from fedcli.report.drawing import Picture
from fedcli.report.remarks import remarks
from fedcli.report.series import BASE, MergedRound, Point, Report

GENERATOR = "fedcli report"
"""What tells a page of ours from others, in its head."""
_MOST_NAMES = 8
"""Clients that a table's cell names."""


def is_ours(page: bytes, generator: str = GENERATOR) -> bool:
    """Return whether a page was written by `generator`."""
    return f'<meta name="generator" content="{generator}">'.encode() in page[:1000]


def render_page(template: str, **values: Any) -> str:
    """Return a page of one of this package's templates, which asks for `generator` and `title`; values are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, loader=PackageLoader("fedcli.report", "."), finalize=_finalize
    )
    return environment.get_template(template).render(**values)


def render(report: Report, pictures: Sequence[Picture]) -> str:
    """Return a federation's page."""
    return render_page(
        "page.html.j2",
        generator=GENERATOR,
        title=f"{report.title}: federation report",
        report=report,
        pictures=pictures,
        remarks=remarks(report),
        tiles=_tiles(report),
        scores=_score_table(report),
        rounds=_rounds_table(report),
        num_rounds=len(report.merged),
        updates=_updates_table(report),
        products=_products_table(report),
        refusals=Table.of(
            ("round", "client", "code", "reason"),
            [
                (TableCell(str(merged.number)), TableCell(str(client)), TableCell(code), TableCell(reason))
                for merged in report.merged
                for client, (code, reason) in merged.refused.items()
            ],
            texts=("code", "reason"),
        ),
    )


def _finalize(value: object) -> object:
    """Write control characters out; a picture is escaped markup already, and stays so."""
    return type(value)(printable(value)) if isinstance(value, str) else value


@dataclass(frozen=True)
class TableCell:
    """A table's text, and whether it is the best or the second best of its column or row."""

    text: str
    is_best: bool = False
    is_second: bool = False


@dataclass(frozen=True)
class Table:
    """A table without the columns in which no row says anything; `kinds` are how columns are set."""

    heads: Sequence[str]
    kinds: Sequence[str]
    rows: Sequence[Sequence[TableCell]]

    @classmethod
    def of(cls, heads: Sequence[str], rows: Sequence[Sequence[TableCell]], *, texts: Sequence[str]) -> "Table":
        """Return the table of some rows; columns whose heads are among `texts` are set as text."""
        kept = [column for column in range(len(heads)) if any(row[column].text for row in rows)]
        kinds = ["text" if heads[column] in texts else "number" for column in kept]
        return cls([heads[column] for column in kept], kinds, [[row[column] for column in kept] for row in rows])


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """Return the key figures: a label, a value and a note each."""
    took = f", {describe_seconds(sum(merged.seconds for merged in report.merged))}" if report.merged else ""
    state = report.state + took
    tiles = [("rounds merged", f"{len(report.merged)} of {report.rounds}", state)]
    if (metric := next((metric for metric in report.scores if metric.rounds), None)) is not None:
        best = metric.best_round
        assert best is not None
        tiles.append((f"best {metric.title}", show_number(metric.rounds[best].value), f"round {best}"))
        if (alone := metric.best_alone) is not None:
            tiles.append(("best client alone", show_number(metric.others[alone].value), alone.replace("-", " ")))
        if BASE in metric.others:
            tiles.append(("base model", show_number(metric.others[BASE].value), "without an adapter"))
    losses = [merged.mean_loss for merged in report.merged if merged.mean_loss is not None]
    if losses:
        tiles.append(("mean training loss", show_number(losses[-1]), f"{show_number(losses[0])} in the first round"))
    per_round = sorted({len(merged.cohort) for merged in report.merged})
    few, most = (per_round[0], per_round[-1]) if per_round else (0, 0)
    drawn = f"{few} drawn a round" if few == most else f"{few} to {most} drawn a round"
    tiles.append(("clients", str(report.num_clients), drawn))
    counted = sum(len(merged.losses) for merged in report.merged)
    refused = sum(len(merged.refused) for merged in report.merged)
    missing = sum(len(merged.missing) for merged in report.merged)
    tiles.append(("updates counted", f"{counted:,}", f"{refused:,} refused, {missing:,} missing"))
    last = report.merged[-1] if report.merged else None
    if last and last.total_bytes_up is not None and last.total_bytes_down is not None:
        down = f"{describe_bytes(last.total_bytes_down)} received by them"
        tiles.append(("sent by clients", describe_bytes(last.total_bytes_up), down))
    return tiles


def _score_table(report: Report) -> Table:
    rows = []
    for metric in report.scores:
        best = metric.best_round
        points = [*metric.references(), None if best is None else metric.rounds[best]]
        values = [point.value for point in points if point is not None]
        leader = (max if metric.higher_is_better else min)(values, default=None)
        cells = [TableCell(show_interval(point), point is not None and point.value == leader) for point in points]
        rows.append([TableCell(metric.heading), *cells, TableCell("" if best is None else str(best))])
    return Table.of(("metric", "base", "best alone", "pooled", "federated", "round"), rows, texts=("metric",))


def _rounds_table(report: Report) -> Table:
    heads = ("round", "algorithm", "learning rate", "counted", "refused", "missing", "mean loss", "time")
    rows = [list(map(TableCell, _round_row(merged))) for merged in report.merged]
    return Table.of(heads, rows, texts=("algorithm", "refused", "missing"))


def _updates_table(report: Report) -> Table:
    others = [name for name in ("steps", "base") if any(getattr(row, name) is not None for row in report.updates)]
    told = {"steps": "steps", "base": "made from"}
    heads = (
        *("round", "client", *(told[name] for name in others)),
        *("rows", "weight", "norm", "cosine to the mean", "change without it", "unusual"),
    )
    rows = [
        (
            TableCell(str(row.round)),
            TableCell(str(row.client)),
            *(TableCell("" if getattr(row, name) is None else str(getattr(row, name))) for name in others),
            TableCell("" if row.num_samples is None else f"{row.num_samples:,}"),
            TableCell("" if row.weight is None else f"{row.weight:.3f}"),
            TableCell("" if row.norm is None else f"{row.norm:.3g}"),
            TableCell("" if row.cosine is None else f"{row.cosine:.3f}"),
            TableCell("" if row.change is None else f"{row.change:.2g}"),
            TableCell(", ".join(row.unusual)),
        )
        for row in report.updates
    ]
    return Table.of(heads, rows, texts=("unusual",))


def _products_table(report: Report) -> Table:
    rows = [
        (
            TableCell(row.module),
            TableCell(f"{row.of_means:.3g}"),
            TableCell("" if row.of_merge is None else f"{row.of_merge:.3g}"),
        )
        for row in report.products
    ]
    return Table.of(("layer", "means of A and B", "published"), rows, texts=("layer",))


def _round_row(merged: MergedRound) -> list[str]:
    loss = merged.mean_loss
    return [
        str(merged.number),
        merged.algorithm,
        f"{merged.learning_rate:.3g}",
        f"{len(merged.losses)} of {len(merged.cohort)}",
        _names([f"{client} ({code})" for client, (code, _) in merged.refused.items()]),
        _names([str(client) for client in merged.missing]),
        "" if loss is None else f"{loss:.4f}",
        describe_seconds(merged.seconds),
    ]


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def show_interval(point: Point | None) -> str:
    """Return a score with its interval; nothing for none."""
    return "" if point is None else f"{show_number(point.value)} [{show_number(point.low)}, {show_number(point.high)}]"


def show_number(value: float) -> str:
    """Return a score's or loss's number in three digits behind the point, two where it is ten or more."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"
