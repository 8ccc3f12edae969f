"""The command line: registers the commands, and turns errors into exit codes."""

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from fedcli import __version__
from fedcli.commands.help_pages import PANELS, example_lines, format_examples, format_help, panel_of
from fedcli.commands.output import print_json, tell
from fedcli.errors import UsageError, WorkspaceError, error_document, explain

_PACKAGE = Path(__file__).parent
DOCS = _PACKAGE / "docs" if (_PACKAGE / "docs").is_dir() else _PACKAGE.parent / "docs"
"""The documentation: inside the installed package, or beside it in a source tree."""
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
PIPE_CLOSED = 128 + signal.SIGPIPE

GROUPS = {
    "audit": "What models know of a party's rows, measured at the party.",
    "bundle": "Rounds and updates as signed files, for a stick or SFTP between sites without a network.",
    "client": "What a party does.",
    "data": "Rows: how they look, and how they are split among simulated clients.",
    "eval": "Scores: benchmarks, tables, the best round.",
    "keys": "Who signs: keys and their fingerprints, where parties join.",
    "server": "What the server does.",
    "slurm": "The federation as jobs of SLURM.",
    "study": "Studies: algorithms, data sets and seeds compared, by one command.",
}
COMMANDS = {
    "init": "Make a workspace and open its round 0.",
    "run": "Run the whole federation on this machine: its clients take turns, and the base model stays loaded.",
    "status": "Show the round, the algorithm, who has answered, the last losses, and what to run next.",
    "chat": "Talk to a model of the federation: one prompt, or a session on a terminal; --compare shows several.",
    "report": "Write a page that shows the federation: losses, scores, updates, bytes, time, who took part, and how it "
    "was set.",
    "export": "Hand a round over: its adapter with a model card, or merged into the base model.",
    "privacy": "Show what the rounds so far have spent of each client's privacy, what is assumed, and what is left.",
    "verify": "Check every round and counted update on disk; list what is wrong, and exit with 7 if anything is.",
    "sync": "Carry what one place lacks of a workspace that another has: folders or URLs, one way or both at once.",
    "gc": "Remove the weights of old rounds and their updates, as fedcli.yaml's `retention` says.",
    "doctor": "Check this machine, and whether the workspace's experiment can run on it; exit with 8 where it cannot.",
    "train-alone": "Train one client alone, with the federation's steps and schedule: the baseline that federation "
    "must beat.",
    "train-pooled": "Train on all clients' rows together, with the federation's steps and schedule (in a simulation "
    "only).",
    "audit plant": "Plant canaries, made-up rows with secrets, among a client's rows; nothing in the workspace tells "
    "of them.",
    "audit measure": "Measure what the base, the client's update, the aggregate and its baseline know of its canaries "
    "and rows.",
    "bundle round": "Write what a party needs to train in a round into one signed file.",
    "bundle update": "Write what a party sends into one signed file: its registration, and its update of the open "
    "round.",
    "bundle import": "Take a bundle in: it makes or completes a party's workspace, or brings a party's part to the "
    "server.",
    "client join": "Join as a real party: your rows stay where they are, and the workspace gets a data card that you "
    "see first.",
    "client leave": "Leave for good: sign that you are drawn no more, and not waited for.",
    "client train": "Train a client on the open round and drop its update.",
    "client status": "Show how a client stands in the open round.",
    "data preview": "Show rows as they are trained on, the supervised part highlighted, token lengths and every "
    "client's share.",
    "data partition": "Split data.source among the simulated clients, as data.partition says: data/client-N.jsonl and "
    "a data card.",
    "eval run": "Score models on benchmarks, and keep scores and answers; with no model named, all that the "
    "workspace holds.",
    "eval list": "Show all benchmarks: groups, metrics, size, what each needs, and whether its data is on this "
    "machine.",
    "eval fetch": "Fetch benchmarks' files once into fedcli's cache, each checked by its sha256; scoring does it by "
    "itself.",
    "eval table": "Show scores side by side, and write them to eval/ as markdown, csv and json.",
    "eval best": "Name the best of the rounds that have been scored.",
    "relay": "Take part in a parent federation as a region: its parties merge first, and only their sum travels.",
    "server open": "Open round 0 unless it is open; `fedcli init` does it too.",
    "server aggregate": "Merge the open round's updates and publish the next round.",
    "server run": "Merge every round as soon as it is ready, until the last; clients train elsewhere.",
    "server score": "Make the scores that are due, as eval.every asks; merge nothing.",
    "server enrol": "Enrol a joined party under its keys, once you have compared their fingerprint; from then on its "
    "updates count.",
    "server revoke": "Take a client out: it is drawn no more, not waited for, and its updates are refused.",
    "server discard": "Set aside a client's update of the open round, so that the client may send another.",
    "keys show": "Show the fingerprints of the server's and the parties' keys, to compare by telephone.",
    "keys rotate": "Make new keys, which the old ones sign: the server's, or with --id a party's.",
    "study init": "Write study.yaml, which says what the study compares; nothing is run yet.",
    "study run": "Run every cell of the study: train, train the baselines, and score.",
    "study status": "Show how far each cell is, what failed and why, and how long the rest will take.",
    "study table": "Show the study's scores over seeds with differences and ranks, and write them to tables/ in every "
    "format.",
    "study plot": "Draw scores over rounds with bands over seeds, and scores against bytes and seconds, into tables/.",
    "study report": "Write a page that shows the study: its table, differences, curves over rounds, costs, and cells "
    "that failed.",
    "slurm script": "Write the open round's batch scripts for SLURM, and send nothing.",
    "slurm submit": "Send the open round to SLURM: an array of its clients, and a job that merges and sends the next "
    "round.",
}
"""The first line of each command's docstring: a list of commands imports none of them."""


class _Named(TyperCommand):
    """A command by its name and group, whose module is imported when it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Parse the arguments as the command itself would."""
        assert self.name is not None
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        alone.command(self.name, cls=_Command)(function_of(self.name))
        return typer.main.get_command(alone).make_context(info_name, args, parent, **extra)

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the whole line, which a list of commands wraps."""
        return self.help or ""


class _Command(TyperCommand):
    """A command that looks at no value in which nothing can be wrong."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write its help: panels on a terminal, plain text elsewhere, examples behind both."""
        if not format_help(self, str(self.name), ctx, formatter):
            super().format_help(ctx, formatter)
            format_examples(str(self.name), formatter)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return its parameters, --help too."""
        return _spared(super().get_params(ctx), get_type_hints(self.callback))


class _Group(TyperGroup):
    """The commands of a group, and those groups that are added; it looks at no value in which nothing can be wrong."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        prefix = "" if self.name == "fedcli" else f"{self.name} "
        own = {name.removeprefix(prefix): help for name, help in COMMANDS.items() if name.startswith(prefix)}
        named: dict[str, Any] = {
            word: _Named(prefix + word, help=help, rich_help_panel=panel_of(prefix + word))
            for word, help in own.items()
            if " " not in word
        }
        every = {**named, **self.commands}
        in_panels = [word for words in PANELS.values() for word in words if word in every and not prefix]
        self.commands = {word: every[word] for word in [*in_panels, *every]}

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write its help: panels on a terminal, plain text elsewhere."""
        if not format_help(self, "", ctx, formatter):
            super().format_help(ctx, formatter)

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the whole line, which a list of commands wraps."""
        return self.help or ""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return its parameters, --help too."""
        return _spared(super().get_params(ctx), {})


def _spared(parameters: list[Any], hints: dict[str, Any]) -> list[Any]:
    """Let parameters process a value without pydantic, a tenth of a second, where nothing can be wrong with it."""
    for parameter in parameters:
        if "process_value" not in vars(parameter):
            hint, process = hints.get(parameter.name), parameter.process_value
            parameter.process_value = partial(_process_value, parameter, hint, process)
    return parameters


def _process_value(parameter: Any, hint: object, process: Callable[[Any, Any], Any], ctx: Any, value: Any) -> Any:
    if not parameter.required and ctx.get_parameter_source(parameter.name).name == "DEFAULT":
        return value
    if hint in (Path, Path | None) and isinstance(value, str):
        return Path(value)  # whether it can be read is told where it is, with an exit code of the disk's
    return process(ctx, value)


def function_of(name: str) -> Callable[..., None]:
    """Import a command: `fedcli client join` is the function `client_join` of commands/client.py."""
    words = name.replace("-", " ").split()
    found: Callable[..., None] = getattr(import_module(f"fedcli.commands.{words[0]}"), "_".join(words))
    return found


class EvalGroup(_Group):
    """A group whose command `run` need not be named: `fedcli eval mmlu` is `fedcli eval run mmlu`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `run` in front of a benchmark's name, or of an option that stands before it."""
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="fedcli",
    cls=_Group,
    epilog=f"Every command takes --help, with examples, and --debug: tracebacks for errors. Documentation: {DOCS}",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # rich costs a tenth of a second: it is loaded for help on a terminal alone
)
for _name, _help in GROUPS.items():
    _group = typer.Typer(cls=EvalGroup if _name == "eval" else _Group, help=_help, no_args_is_help=True)
    app.add_typer(_group, name=_name, rich_help_panel=panel_of(_name))


def _print_version(wanted: bool) -> None:
    if wanted:
        tell(f"fedcli {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Federated fine-tuning of language models over files that all share: no daemon, no port, no broker."""


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
        tell(f"fedcli: error: cannot print the result: {error.strerror}\n  The work itself is done.", is_error=True)
        return WorkspaceError.exit_code
    return code


def _run(arguments: list[str]) -> int:
    debug, as_json = "--debug" in arguments, "--json" in arguments
    if debug:  # the errors of clients without which the work goes on
        import logging

        logging.basicConfig()
        logging.getLogger("fedcli.client").setLevel(logging.DEBUG)
    try:
        app(args=[argument for argument in arguments if argument != "--debug"], prog_name="fedcli")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
        if code == 1:  # Typer's answer to a closed pipe, and to nothing else here
            return PIPE_CLOSED
        if code in (INTERRUPTED, TERMINATED):
            is_chat = arguments[:1] == ["chat"]  # which keeps nothing that it could go on with
            told = "stopped" if is_chat else "stopped; nothing is lost: run the same command again to go on"
            tell(told, is_error=True)
        fault: Any = stop.__context__  # what Typer has said on stderr
        context = getattr(fault, "ctx", None)
        examples = example_lines(context.command_path.removeprefix("fedcli ")) if context else []
        if code == UsageError.exit_code and examples:
            tell("\n".join(["Examples:", *(f"  {line}" for line in examples)]), is_error=True)
        if code != 0 and as_json:
            message, hint = "the command line is not valid", "See `fedcli --help`."
            if code in (INTERRUPTED, TERMINATED):
                message = "stopped"
            elif hasattr(fault, "format_message"):
                message = " ".join(fault.format_message().split())
                hint = f"See `{context.command_path} --help`." if context else hint
            _print_error(message, hint, code)
        return code
    except Exception as error:  # whatever it is, the user gets one line and an exit code
        raised, failure = error, explain(error)
        failure.hint = re.sub(
            r"\bdocs(?=/[A-Z]+\.md)", lambda _: str(DOCS), failure.hint
        )  # where this installation has it
    else:
        return 0
    if debug:
        import traceback

        tell("".join(traceback.format_exception(raised)), is_error=True, end="")
    if as_json and not failure.is_reported:
        print_json(error_document(failure))
    tell(f"fedcli: error: {failure.message}\n  {failure.hint}", is_error=True)
    return failure.exit_code


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(TERMINATED)


def _print_error(message: str, hint: str, exit_code: int) -> None:
    print_json({"error": {"message": message, "hint": hint, "exit_code": exit_code}})
