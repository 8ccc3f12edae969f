"""The command line: registers the commands, and turns errors into exit codes."""

import errno
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from fedcli import __version__
from fedcli.errors import FedError, RequirementError, WorkspaceError

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
PIPE_CLOSED = 128 + signal.SIGPIPE
_NETWORK = (errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN)

app = typer.Typer(
    name="fedcli",
    help="Federated fine-tuning of language models over a shared directory: no daemon, no port, no broker.",
    epilog="Every command takes --debug: tracebacks for errors.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich's help costs a tenth of a second
)


class EvalGroup(TyperGroup):
    """A group whose command `run` need not be named: `fedcli eval mmlu` is `fedcli eval run mmlu`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `run` in front of a benchmark's name."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


def _add_commands(group: typer.Typer, prefix: str, names: str) -> None:
    """Add commands to a group: `fedcli client join` is the function `join` of commands/client_join.py."""
    for name in names.split():
        function = name.replace("-", "_")
        module = import_module(f"fedcli.commands.{prefix}{function}")
        group.command(name)(getattr(module, function))


_add_commands(app, "", "init run status report export verify gc doctor train-alone train-pooled")
for _name, _help, _commands in (
    ("client", "What a party does.", "join train status"),
    ("data", "Rows: how they look, and how they are split among simulated clients.", "preview partition"),
    ("eval", "Scores: benchmarks, tables, the best round.", "run list table best"),
    ("server", "What the server does.", "open aggregate run score discard"),
    ("slurm", "The federation as jobs of SLURM.", "script submit"),
):
    _group = typer.Typer(cls=EvalGroup if _name == "eval" else TyperGroup, help=_help, no_args_is_help=True)
    _add_commands(_group, f"{_name}_", _commands)
    app.add_typer(_group, name=_name)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fedcli {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Federated fine-tuning of language models over a shared directory: no daemon, no port, no broker."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (docs/PROTOCOL.md lists them)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except OSError as error:  # the reader of stdout has left, or the disk that it goes to is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more at its end
        if isinstance(error, BrokenPipeError):
            return PIPE_CLOSED
        print(f"fedcli: error: cannot print the result: {error.strerror}\n  The work itself is done.", file=sys.stderr)
        return WorkspaceError.exit_code
    return code


def _run(arguments: list[str]) -> int:
    debug, as_json = "--debug" in arguments, "--json" in arguments
    try:
        app(args=[argument for argument in arguments if argument != "--debug"], prog_name="fedcli")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
        if code == 1:  # Typer's answer to a closed pipe, and to nothing else here
            return PIPE_CLOSED
        if code in (INTERRUPTED, TERMINATED):
            print("stopped; nothing is lost: run the same command again to go on", file=sys.stderr)
        if code != 0 and as_json:  # what is wrong with a command line, Typer has said on stderr
            message = "stopped" if code in (INTERRUPTED, TERMINATED) else "the command line is not valid"
            _print_error(message, "See `fedcli --help`.", code)
        return code
    except Exception as error:  # whatever it is, the user gets one line and an exit code
        raised, failure = error, _explain(error)
    else:
        return 0
    if debug:
        traceback.print_exception(raised)
    if as_json and not failure.is_reported:
        _print_error(failure.message, failure.hint, failure.exit_code)
    print(f"fedcli: error: {failure.message}\n  {failure.hint}", file=sys.stderr)
    return failure.exit_code


def _explain(error: Exception) -> FedError:
    """Return what to tell of an exception: a FedError as it is; of others a disk's refusal is no bug."""
    if isinstance(error, FedError):
        return error
    if isinstance(error, OSError):
        return _explain_os_error(error)
    hint = "This is a bug. Run it again with --debug and report what it prints."
    return FedError(f"internal error: {type(error).__name__}: {error}", hint=hint)


def _explain_os_error(error: OSError) -> FedError:
    """Return what to tell of an error of the system: of memory, of the network, or of a file or disk."""
    problem = error.strerror or str(error) or type(error).__name__
    if error.errno == errno.ENOMEM:
        return RequirementError(f"out of memory: {problem}", hint="Free some memory, then run it again.")
    if error.filename is not None:
        return WorkspaceError(
            f"cannot use {os.fsdecode(error.filename)}: {problem}", hint="Check that path and its permissions."
        )
    is_of_network = isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)) or error.errno in _NETWORK
    if is_of_network:
        return RequirementError(f"the network fails: {problem}", hint="Check the network, then run it again.")
    return WorkspaceError(
        f"this machine or its disk fails: {problem}", hint="Check both, then run it again; --debug shows where it was."
    )


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)


def _print_error(message: str, hint: str, exit_code: int) -> None:
    print(json.dumps({"error": {"message": message, "hint": hint, "exit_code": exit_code}}))
