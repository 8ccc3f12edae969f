"""A workspace's scores as tables for people and programs: Markdown, CSV and JSON."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fedcli.eval.statistics import Score
from fedcli.printable import in_csv, in_markdown
from fedcli.scoring import client_table, communication
from fedcli.scoring.client_table import as_cells, as_documents
from fedcli.scoring.communication import in_megabytes
from fedcli.scoring.table import Cell, ScoreTable
from fedcli.workspace.layout import Workspace
from fedcli.workspace.scores import ScoreEntry, publish_table


def save_table(workspace: Workspace, table: ScoreTable, name: str) -> list[str]:
    """Write a table as NAME.md, NAME.csv and NAME.json under eval/; return their paths."""
    rows = as_rows(table)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows({name: in_csv(value) for name, value in row.items()} for row in rows)
    document = {"against": table.against, "average_rank": table.average_rank, "scores": rows, "notes": table.notes}
    document |= {"clients": as_documents(table.clients)} if table.clients else {}
    files = {
        f"{name}.md": to_markdown(table),
        f"{name}.csv": text.getvalue(),
        f"{name}.json": json.dumps(document, indent=1) + "\n",
    }
    return [str(path) for path in publish_table(workspace, files)]


def as_rows(table: ScoreTable) -> list[dict[str, Any]]:
    """Return one row for each target and metric."""
    rows = []
    for column in table.columns:
        for target in table.targets:
            if (cell := table.cells.get((target, column))) is None:
                continue
            value = cell.score.model_dump(exclude={"unit", "higher_is_better", "is_detail"})
            lead = {
                f"difference{suffix}": getattr(cell.difference, name, None)
                for suffix, name in (("", "value"), ("_error", "standard_error"), ("_low", "low"), ("_high", "high"))
            }
            moved = {"communication_bytes": table.communication.get(target)} if table.communication else {}
            rows.append({"target": target, **asdict(column), **value, "rank": cell.rank, **lead, **moved})
    return rows


def to_markdown(table: ScoreTable) -> str:
    """Return the table, targets x metrics: best bold, second best underlined; then the differences."""
    head = [
        "",
        *(in_markdown(column.title) for column in table.columns),
        *(["average rank"] if table.average_rank else []),
        *([communication.HEAD] if table.communication else []),
    ]
    lines = [head, ["---", *("---:" for _ in head[1:])]]
    differences = [head[: len(table.columns) + 1], lines[1][: len(table.columns) + 1]]
    for target in table.targets:
        name, cells = in_markdown(target), [table.cells.get((target, column)) for column in table.columns]
        rank = [f"{table.average_rank[target]:.2f}"] if table.average_rank else []
        lines.append([name, *map(_marked, cells), *rank, *show_communication(table, target)])
        if any(found and found.difference for found in cells):
            differences.append([name, *map(show_difference, cells)])
    blocks = ["# Scores", _grid(lines), "Values with 95 % bootstrap intervals; **best**, <u>second best</u>."]
    if len(differences) > 2:
        blocks += [
            f"## Difference to {in_markdown(table.against)}",
            _grid(differences),
            "Paired by item, with 95 % intervals.",
        ]
    if table.clients:
        shown = [[*map(in_markdown, row)] for row in as_cells(table.clients)]
        blocks += ["## Clients' own adapters", _grid([[*client_table.HEAD], ["---"] * len(client_table.HEAD), *shown])]
        blocks += ["Gains are better where they are larger, client by client."]
    blocks += [f"- {in_markdown(note)}" for note in table.notes]
    return "\n\n".join(blocks) + "\n"


def show_communication(table: ScoreTable, target: str) -> list[str]:
    """Return the cell of a target's communication, "" where it is not known; [] where the table has no such column."""
    if not table.communication:
        return []
    moved = table.communication.get(target)
    return ["" if moved is None else in_megabytes(moved)]


def show_score(cell: Cell | None) -> str:
    """Return a value with its interval."""
    return _interval(cell.score) if cell else ""


def show_difference(cell: Cell | None) -> str:
    """Return a difference with its interval, signed."""
    return _interval(cell.difference, "+") if cell and cell.difference else ""


def _interval(score: ScoreEntry | Score, sign: str = "") -> str:
    value, low, high = (
        f"{number:{sign}.3f}" if abs(number) < 10 else f"{number:{sign}.2f}"
        for number in (score.value, score.low, score.high)
    )
    return f"{value} [{low}, {high}]"


def _marked(cell: Cell | None) -> str:
    shown = show_score(cell)
    if cell is None or cell.rank > 2:
        return shown
    return f"**{shown}**" if cell.rank == 1 else f"<u>{shown}</u>"


def _grid(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
