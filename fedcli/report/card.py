"""A model card, as hubs have them: README.md with YAML in front, of an adapter or a merged model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from fedcli.report.page import Table, TableCell, show_interval
from fedcli.report.series import MetricScores

MOST_CLIENTS = 20
"""Whose rows a card lists."""
_MARKUP = str.maketrans({letter: f"\\{letter}" for letter in "\\`*_[]|#"} | {"<": "&lt;", ">": "&gt;"})


@dataclass(frozen=True)
class ClientData:
    """What is known of a client's rows; empty texts for what is not."""

    client: int
    rows: int | None
    """None where it is not told."""
    format: str = ""
    left_out: str = ""
    tokens: str = ""


@dataclass(frozen=True)
class Card:
    """What a card tells; nothing of it is a path of some machine."""

    title: str
    task: str
    task_description: str
    round: int
    rounds: int
    num_clients: int
    is_simulation: bool
    algorithm: str
    base: str
    base_id: str | None
    """The base model's id on the hub; None for one that is not from there."""
    template: str
    datasets: Sequence[str]
    """Ids on the hub."""
    facts: Mapping[str, str]
    clients: Sequence[ClientData]
    metrics: Sequence[MetricScores]
    merged_dtype: str | None
    """Of a merged model; None for an adapter."""
    notes: Sequence[str]
    version: str
    privacy: str = "Nothing here is differentially private."
    """What is guaranteed, to whom."""


def render_card(card: Card) -> str:
    """Return the card's text; what comes from files is escaped."""
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, StrictUndefined

    head = ModelCardData(
        base_model=card.base_id,
        library_name="transformers" if card.merged_dtype else "peft",
        pipeline_tag="text-generation",
        tags=["federated-learning", "fedcli", "lora", card.algorithm, card.task],
        datasets=list(card.datasets) or None,
    )
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["plain"] = _plain
    template = environment.from_string(files("fedcli.report").joinpath("card.md.j2").read_text(encoding="utf-8"))
    what = "model" if card.merged_dtype else "adapter"
    data = [
        [
            str(row.client),
            "" if row.rows is None else str(row.rows),
            *map(_plain, (row.format, row.left_out, row.tokens)),
        ]
        for row in card.clients[:MOST_CLIENTS]
    ]
    scores = [
        [_plain(metric.heading), *map(show_interval, (metric.rounds[card.round], *metric.references()))]
        for metric in card.metrics
        if card.round in metric.rounds
    ]
    text = template.render(
        card={
            **vars(card),
            "data": _grid(("client", "rows", "format", "rows left out", "tokens of a row, median"), data),
            "num_more_data": max(0, len(card.clients) - MOST_CLIENTS),
            "scores": _grid(("", f"this {what}", "base", "best client alone", "all rows pooled"), scores),
        }
    )
    return f"---\n{head.to_yaml()}\n---\n\n{text}"


def _grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return Table.of(heads, [list(map(TableCell, row)) for row in rows], texts=())


def _plain(text: str) -> str:
    """Return a text that Markdown shows as it is, on one line."""
    return "".join(letter if letter.isprintable() else " " for letter in text).translate(_MARKUP)
