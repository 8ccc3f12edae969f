"""Data sets of the hub whose format and split are known."""

from fedcli.config import DataFormat
from fedcli.errors import ConfigError
from fedcli.tasks import FORMATS, TASKS, first_task, formats_of
from fedcli.tasks.format import Format


def known_format(source: str) -> Format | None:
    """Return the format of a known data set of the hub."""
    return next((known for known in FORMATS.usable() if source in known.hub), None)


def choose_format(source: str | None, given: DataFormat | None, task: str) -> DataFormat:
    """Return a source's format: the one given, else the one that a known data set of the hub has, else the task's.

    Raises ConfigError for a known data set whose rows are for another task.
    """
    if given is not None:
        return given
    item = TASKS[task].item
    known = known_format(source or "")
    if known is None:
        return next(formats_of(item))
    if known.item is not item:
        raise ConfigError(
            f"{source} has rows of the format {known.name}, which is not for task {task}",
            hint=f"Set task to {first_task(known.item)}, or name another source.",
        )
    return known.name


def choose_split(source: str, given: str | None) -> str:
    """Return the split to read: the one given, else the one a known data set has its training rows in."""
    known = known_format(source)
    return given or (known.hub[source] if known else "train")
