"""The errors that a user can meet; each class carries the exit code of the public contract."""

from collections.abc import Iterable
from functools import partial
from typing import Any


class FedError(Exception):
    """An error with its cure: `message` says what and where, `hint` what to do next.

    `is_reported` says that the command has printed its result, the faults included, as its JSON document.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str, is_reported: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.is_reported = is_reported

    def __reduce__(self) -> tuple[Any, ...]:
        """Let it travel between processes, hint and all."""
        return partial(type(self), hint=self.hint, is_reported=self.is_reported), (self.message,)


class UsageError(FedError):
    """The command line asks for something that does not exist."""

    exit_code = 2


class ConfigError(FedError):
    """fedcli.yaml, or the data that it names, is not valid."""

    exit_code = 3


class WorkspaceError(FedError):
    """The workspace is missing, cannot be written, or cannot do what was asked."""

    exit_code = 4


class BusyError(FedError):
    """Another process holds the lock."""

    exit_code = 5


class NotReadyError(FedError):
    """Something that must come first has not come yet."""

    exit_code = 6


class IntegrityError(FedError):
    """Something on disk is not what it claims to be."""

    exit_code = 7


class RequirementError(FedError):
    """A package, a device or a model that the work needs is missing."""

    exit_code = 8


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that names the nearest known names, or all of them where none is near."""
    import difflib

    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=2)
    return f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(names)}."
