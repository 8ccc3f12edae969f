"""The errors that a user can meet; each class carries the exit code of the public contract."""

import errno
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

_NETWORK = (errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH)


class FedError(Exception):
    """An error with its cure: `message` says what and where, `hint` what to do next.

    `is_reported` says that the command has printed its result, the faults included, as its JSON document. Where several
    clients were to be trained, `failed` are those that could not be, and `done` is how the others stand.
    """

    exit_code = 1
    failed: "Sequence[ClientFailure]" = ()
    done: Sequence[Any] = ()

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


class DeniedError(WorkspaceError):
    """Whoever runs this may look at the workspace, and may not write there."""


class BusyError(FedError):
    """Another process holds the lock."""

    exit_code = 5


class NotReadyError(FedError):
    """Something that must come first has not come yet."""

    exit_code = 6


class IntegrityError(FedError):
    """Something on disk is not what it claims to be."""

    exit_code = 7


class ArrivingError(IntegrityError):
    """Something has not come whole yet, as while a tool copies it; where nothing does, it is damaged."""

    exit_code = 6


class RequirementError(FedError):
    """A package, a device or a model that the work needs is missing."""

    exit_code = 8


EXTRAS = {
    **dict.fromkeys(("lm_eval", "openai", "sacrebleu", "sklearn"), "eval"),
    **{"matplotlib": "report", "tensorboardX": "tensorboard", "gguf": "gguf", "dp_accounting": "privacy"},
    **{"obstore": "s3", "paramiko": "sftp", "trl": "grpo"},
}
"""The extra of fedcli that brings a package, by the name that is imported."""


def missing_package(name: str) -> RequirementError:
    """Return the error for a package of EXTRAS that is not installed."""
    return RequirementError(
        f"this needs the package {name}, which is not installed",
        hint=f"Install fedcli's extra that brings it: pip install 'fedcli[{EXTRAS[name]}]'.",
    )


def require_packages(names: Iterable[str]) -> None:
    """Raise RequirementError for the first of some packages of EXTRAS that is not installed; import none."""
    from importlib.util import find_spec

    for name in names:
        if find_spec(name) is None:
            raise missing_package(name)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that names the nearest known names, or all of them where none is near."""
    import difflib

    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=2)
    return f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(names)}."


@dataclass(frozen=True)
class ClientFailure:
    """What kept a client from answering a round, while the work went on without it."""

    client: int
    round: int
    message: str
    hint: str
    exit_code: int


def failure_of(client: int, number: int, error: Exception) -> ClientFailure:
    """Return what is kept of a client's error in a round: no frames, which would keep a training's tensors alive."""
    told = explain(error)
    return ClientFailure(client, number, told.message, told.hint, told.exit_code)


def error_of(message: str, failed: Sequence[ClientFailure]) -> FedError:
    """Return the error that ends work for which clients failed, of the first one's kind; they have been named."""
    kinds = {kind.exit_code: kind for kind in FedError.__subclasses__()}
    hint = "Mend what was said of that, and run the same command again: what the others did is kept."
    error = kinds.get(failed[0].exit_code, FedError)(message, hint=hint)
    error.failed = failed
    for failure in failed:
        error.add_note(f"client {failure.client}: {failure.message}\n  {failure.hint}")
    return error


def explain(error: Exception) -> FedError:
    """Return what to tell of an exception: a FedError as it is; of others a disk's refusal is no bug."""
    if isinstance(error, FedError):
        return error
    if isinstance(error, OSError):
        return _explain_os_error(error)
    if isinstance(error, ModuleNotFoundError) and (package := (error.name or "").partition(".")[0]) in EXTRAS:
        return missing_package(package)
    hint = "This is a bug. Run it again with --debug and report what it prints."
    return FedError(f"internal error: {type(error).__name__}: {error}", hint=hint)


def error_document(error: FedError) -> dict[str, object]:
    """Return an error as --json prints it, with the clients that failed."""
    found = {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}
    failed = {"failed": [asdict(failure) for failure in error.failed]} if error.failed else {}
    return {"error": found, **failed}


def _explain_os_error(error: OSError) -> FedError:
    """Return what to tell of an error of the system: of memory, of the network, or of a file or disk."""
    import socket

    problem = error.strerror or str(error) or type(error).__name__
    if error.errno == errno.ENOMEM:
        return RequirementError(f"out of memory: {problem}", hint="Free some memory, then run it again.")
    if error.filename is not None:
        name = error.filename
        path = name.decode(errors="surrogateescape") if isinstance(name, bytes) else name
        return WorkspaceError(f"cannot use {path}: {problem}", hint="Check that path and its permissions.")
    is_socket_timeout = isinstance(error, TimeoutError) and error.errno is None  # a disk's has its number: ETIMEDOUT
    is_of_network = isinstance(error, (ConnectionError, socket.gaierror)) or error.errno in _NETWORK
    if is_of_network or is_socket_timeout:
        return RequirementError(f"the network fails: {problem}", hint="Check the network, then run it again.")
    return WorkspaceError(
        f"this machine or its disk fails: {problem}", hint="Check both, then run it again; --debug shows where it was."
    )
