"""Columns of a study's table, and the figures of a published one."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from fedcli.config.section import Section


def _column(value: Any) -> Any:
    """Take "fpb.accuracy" for a column without a title."""
    if isinstance(value, str):
        benchmark, _, metric = value.partition(".")
        return {"benchmark": benchmark, "metric": metric}
    return value


class Column(Section):
    """A metric of a benchmark, and its title."""

    benchmark: str
    metric: str
    title: str = ""

    @property
    def shown(self) -> str:
        """Its title, or the benchmark's and the metric's name."""
        return self.title or f"{self.benchmark} {self.metric}"


ColumnEntry = Annotated[Column, BeforeValidator(_column)]


class PublishedTable(Section):
    """Figures of a publication: by preset and row (their names in the study) those by column title."""

    source: str
    rows: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Of a study of one preset."""
    presets: dict[str, dict[str, dict[str, float]]] = Field(default_factory=dict)
    """Of a study of several."""
    note: str = ""

    def figure(self, preset: str, row: str, column: str) -> float | None:
        """Return what the publication has in a row and a column, None where that is not known."""
        return {**self.rows, **self.presets.get(preset, {})}.get(row, {}).get(column)

    def labels(self, preset: str) -> list[str]:
        """Return the rows of which the publication has figures."""
        return list({**self.rows, **self.presets.get(preset, {})})
