"""Printing: data to stdout, progress and hints to stderr, or one JSON document."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress


def print_json(document: object) -> None:
    """Print a JSON document on stdout."""
    print(json.dumps(document, default=_plain, ensure_ascii=False, sort_keys=True))


def print_hint(text: str) -> None:
    """Print what to do next on stderr."""
    print(text, file=sys.stderr)


@contextmanager
def progress_display(json_output: bool, *columns: str) -> Iterator["Progress"]:
    """Show progress bars on stderr; stay quiet under --json or where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *(TextColumn(column) for column in columns),
        TimeRemainingColumn(),
        console=console,
        disable=json_output or not console.is_terminal,
        transient=True,
    ) as progress:
        yield progress


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return str(value)
