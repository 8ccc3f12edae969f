"""A study's tables as Markdown, LaTeX, CSV and JSON."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, Literal, TypeVar

from fedcli.eval.statistics import Score
from fedcli.printable import in_csv, in_markdown
from fedcli.study.columns import Column
from fedcli.study.costs import cost_columns
from fedcli.study.results import Block, StudyScore, StudyTable

Format = Literal["markdown", "latex", "csv", "json"]
SUFFIX: dict[Format, str] = {"markdown": "md", "latex": "tex", "csv": "csv", "json": "json"}
RANK = "average rank"
_Cell = TypeVar("_Cell")
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
}


def render(table: StudyTable, form: Format) -> str:
    """Return a study's tables in a form, which ends with a line's end."""
    forms: dict[Format, Callable[[StudyTable], str]] = {
        "markdown": to_markdown,
        "latex": to_latex,
        "csv": to_csv,
        "json": to_json,
    }
    return forms[form](table)


def to_markdown(table: StudyTable) -> str:
    """Return Markdown: for each preset its scores, the best bold and the second best underlined, and differences."""

    def marked(text: str, rank: int | None) -> str:
        return _marked_markdown(in_markdown(text), rank)

    blocks = [f"# {in_markdown(table.title)}"] if table.title else []
    for block in table.blocks:
        blocks += [f"## {in_markdown(block.title)}"] if len(table.blocks) > 1 else []
        head = ["", *(in_markdown(column.shown) for column in block.columns)]
        beside = [in_markdown(title) for title, _ in columns_beside(block)]
        blocks.append(_grid([[*head, *beside], *score_rows(block, table.source, marked)]))
        if rows := difference_rows(block):
            against = in_markdown(block.rows[block.against])
            named = [[in_markdown(name), *cells] for name, *cells in rows]
            blocks += [f"Difference to {against}:", _grid([head, *named])]
    spread, *notes = legend(table)
    blocks.append("\n".join(f"* {note}" for note in (spread, *map(in_markdown, notes))))
    return "\n\n".join(blocks) + "\n"


def to_latex(table: StudyTable) -> str:
    r"""Return LaTeX: a table environment for each preset, with rules of the package booktabs."""
    blocks = [r"% \usepackage{booktabs} in the preamble"]
    for block in table.blocks:
        names = [*(column.shown for column in block.columns), *(title for title, _ in columns_beside(block))]
        rows = [["", *map(_escaped, names)], *score_rows(block, table.source, _marked_latex)]
        lines = [f"{' & '.join(row)} \\\\" for row in rows]
        differences = [[_escaped(row[0]), *(_escaped(text) for text in row[1:])] for row in difference_rows(block)]
        body = [lines[0], r"\midrule", *lines[1:]]
        if differences:
            spare = [""] * (len(names) - len(block.columns))
            title = _escaped(f"Difference to {block.rows[block.against]}, 95 % interval over seeds and items")
            body += [r"\midrule", rf"\multicolumn{{{len(names) + 1}}}{{l}}{{\emph{{{title}}}}} \\"]
            body += [f"{' & '.join([*row, *spare])} \\\\" for row in differences]
        caption = " ".join(part for part in (table.title, block.title if len(table.blocks) > 1 else "") if part)
        notes = " ".join(f"{note[0].upper()}{note[1:].rstrip('.')}." for note in legend(table, marks=False))
        blocks.append(
            "\n".join(
                [
                    r"\begin{table}",
                    r"\centering",
                    rf"\caption{{{_escaped(caption.rstrip('.') + '. ' + notes if caption else notes)}}}",
                    rf"\begin{{tabular}}{{l{'r' * len(names)}}}",
                    r"\toprule",
                    *body,
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join(blocks) + "\n"


def to_csv(table: StudyTable) -> str:
    """Return CSV: a line for each preset, row and column."""
    rows = as_rows(table)
    text = io.StringIO()
    writer = csv.DictWriter(text, [name for name in rows[0] if name != "by_seed"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows({name: in_csv(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def to_json(table: StudyTable) -> str:
    """Return a JSON document of everything that is known."""
    return json.dumps(document(table), indent=1, ensure_ascii=False) + "\n"


def document(table: StudyTable) -> dict[str, Any]:
    """Return a table as JSON values."""
    return {
        "title": table.title,
        "seeds": table.num_seeds,
        "against": {block.preset: block.against for block in table.blocks},
        "average_rank": {block.preset: dict(block.average_rank) for block in table.blocks},
        "published_in": table.source,
        "communication_bytes": {
            block.preset: {label: dict(sizes) for label, sizes in block.communication.items()}
            for block in table.blocks
            if block.communication
        },
        "goal": {
            block.preset: {
                "column": f"{block.goal.column.benchmark}.{block.goal.column.metric}",
                "value": block.goal.value,
                "bytes": {label: dict(found.num_bytes) for label, found in block.reached.items()},
            }
            for block in table.blocks
            if block.goal is not None
        },
        "scores": as_rows(table),
        "notes": list(table.notes),
    }


def as_rows(table: StudyTable) -> list[dict[str, Any]]:
    """Return one row for each preset, row and column."""
    return [
        _as_row(block, label, column, score)
        for block in table.blocks
        for label in block.rows
        for column in block.columns
        if (score := block.scores.get((label, column.shown))) is not None
    ]


def columns_beside(block: Block) -> list[tuple[str, Mapping[str, str]]]:
    """Return the titles of the columns beside the scores, average ranks and bytes, and their cells by row."""
    ranks = {label: f"{rank:.2f}" for label, rank in block.average_rank.items()}
    return [*([(RANK, ranks)] if ranks else []), *cost_columns(block)]


def _as_row(block: Block, label: str, column: Column, score: StudyScore) -> dict[str, Any]:
    lead = asdict(score.difference) if score.difference is not None else {}
    return {
        "preset": block.preset,
        "row": label,
        "column": column.shown,
        "benchmark": column.benchmark,
        "metric": column.metric,
        "mean": score.mean if score.by_seed else None,
        "deviation": score.deviation if score.by_seed else None,
        "num_seeds": len(score.by_seed),
        "rank": score.rank,
        "difference": lead.get("value"),
        "difference_low": lead.get("low"),
        "difference_high": lead.get("high"),
        "published": score.published,
        "communication_bytes": fmean(moved.values()) if (moved := block.communication.get(label)) else None,
        "by_seed": dict(score.by_seed),
    }


def score_rows(block: Block, source: str | None, cell: Callable[[str, int | None], _Cell]) -> list[list[_Cell]]:
    """Return the lines of scores, and below each the published ones where there are some.

    `cell` makes a cell of its text and its rank in the column, which is None where it has none.
    """
    lines: list[list[tuple[str, int | None]]] = []
    beside = [cells for _, cells in columns_beside(block)]
    for label, title in block.rows.items():
        found = [block.scores.get((label, column.shown)) for column in block.columns]
        if any(score is not None and score.by_seed for score in found) or not _has_figures(found):
            shown = [
                (_shown(score), score.rank) if score is not None and score.by_seed else ("", None) for score in found
            ]
            lines.append([(title, None), *shown, *((cells.get(label, ""), None) for cells in beside)])
        if source is not None and _has_figures(found):
            figures = ["" if score is None or score.published is None else _number(score.published) for score in found]
            texts = [f"{title}, published", *figures, *("" for _ in beside)]
            lines.append([(text, None) for text in texts])
    return [[cell(*entry) for entry in line] for line in lines]


def _has_figures(scores: Sequence[StudyScore | None]) -> bool:
    return any(score is not None and score.published is not None for score in scores)


def difference_rows(block: Block) -> list[list[str]]:
    """Return the lines of differences, of rows that have some."""
    lines = []
    for label, title in block.rows.items():
        found = [block.scores.get((label, column.shown)) for column in block.columns]
        if any(score is not None and score.difference is not None for score in found):
            lines.append([title, *(_difference(score.difference if score else None) for score in found)])
    return lines


def legend(table: StudyTable, *, marks: bool = True) -> list[str]:
    """Return what a reader must know of the numbers."""
    spread = "mean ± sample deviation over seeds" if table.num_seeds > 1 else "one seed"
    notes = [f"{spread}{'; **best**, <u>second best</u>' if marks else ''}"]
    if any(score.difference for block in table.blocks for score in block.scores.values()):
        notes.append("differences have 95 % bootstrap intervals over seeds and items, paired by item")
    if table.source is not None:
        notes.append(f"published figures: {table.source}")
    return [*notes, *table.notes]


def _shown(score: StudyScore) -> str:
    spread = "" if score.deviation is None else f" ± {_number(score.deviation)}"
    return f"{_number(score.mean)}{spread}"


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}" if abs(value) < 10 else f"{value:{sign}.2f}"


def _difference(score: Score | None) -> str:
    if score is None:
        return ""
    return f"{_number(score.value, '+')} [{_number(score.low, '+')}, {_number(score.high, '+')}]"


def _marked_markdown(text: str, rank: int | None) -> str:
    return {1: f"**{text}**", 2: f"<u>{text}</u>"}.get(rank or 0, text)


def _marked_latex(text: str, rank: int | None) -> str:
    text = _escaped(text)
    return {1: rf"\textbf{{{text}}}", 2: rf"\underline{{{text}}}"}.get(rank or 0, text)


def _escaped(text: str) -> str:
    """Return text in which LaTeX sees letters only; what the default encoding may lack becomes a question mark."""
    return "".join(_LATEX.get(letter, letter if letter.isascii() else "?") for letter in text)


def _grid(rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in rows[0][1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))
