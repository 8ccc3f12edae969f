"""Tasks and formats: what rows teach, and how it is read of their columns; no file, no torch before a loss is asked.

Whoever reads fedcli.yaml imports this, so that it is light.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar, get_args

from fedcli.plugins import Registry
from fedcli.tasks.conversation import Item
from fedcli.tasks.dpo import DPO
from fedcli.tasks.format import Format
from fedcli.tasks.grpo import GRPO
from fedcli.tasks.kto import KTO
from fedcli.tasks.orpo import ORPO
from fedcli.tasks.rewards import REWARDS
from fedcli.tasks.sft import SFT
from fedcli.tasks.simpo import SIMPO
from fedcli.tasks.task import Hyperparameter, Likelihood, Task

__all__ = [
    "DPO",
    "FORMATS",
    "GRPO",
    "KTO",
    "ORPO",
    "REWARDS",
    "SFT",
    "SIMPO",
    "TASKS",
    "Format",
    "Likelihood",
    "Task",
    "first_task",
    "formats_of",
]


KindT = TypeVar("KindT", Task, Format)


def _check(kind: type[KindT]) -> Callable[[str, object], KindT]:
    def check(name: str, loaded: object) -> KindT:
        if not isinstance(loaded, kind) or loaded.name != name:
            raise ValueError(f"it is no {kind.__name__} of the name {name!r}")
        if unknown := {*getattr(loaded, "hyperparameters", ())} - {*get_args(Hyperparameter)}:
            raise ValueError(f"the section train has no {', '.join(sorted(unknown))}")
        return loaded

    return check


_OWN = (SFT, DPO, KTO, ORPO, SIMPO, GRPO)
"""A new task is a file, and its object here."""
TASKS = Registry("fedcli.tasks", {task.name: task for task in _OWN}, _check(Task))
"""All tasks by name."""
FORMATS = Registry("fedcli.formats", {known.name: known for task in _OWN for known in task.formats}, _check(Format))
"""All formats by name."""


def formats_of(item: type[Item]) -> Iterator[str]:
    """Yield the formats of one kind of item, a task's; the first is its default."""
    return (known.name for known in FORMATS.usable() if known.item is item)


def first_task(item: type[Item]) -> str:
    """Return the first task that learns from a kind of item."""
    return next(task.name for task in TASKS.usable() if task.item is item)
