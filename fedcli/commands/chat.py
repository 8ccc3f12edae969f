"""fedcli chat."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from fedcli.commands.options import JsonOption, ThreadsOption, WorkspaceOption, found_federation
from fedcli.commands.output import StepDisplay, print_hint, print_json, tell, terminal
from fedcli.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from fedcli.operations.chat import Chat, ChatAnswer

LEAST_COLUMN = 32
"""Characters that an answer needs to stand beside others."""


def chat(
    prompt: Annotated[
        str | None, Argument(metavar="PROMPT", help="One prompt; - reads it from stdin. Without one: a session.")
    ] = None,
    rounds: Annotated[
        list[str] | None, Option("--round", metavar="N|latest", help="A round's adapter. Default: the latest.")
    ] = None,
    base: Annotated[bool, Option("--base", help="The base model.")] = False,
    clients: Annotated[
        list[int] | None, Option("--client", metavar="N", help="Client N's own adapter, or its last update.")
    ] = None,
    alone: Annotated[list[int] | None, Option(metavar="N", help="Client N trained alone.")] = None,
    pooled: Annotated[bool, Option("--pooled", help="The baseline of all rows together.")] = False,
    compare: Annotated[
        bool, Option("--compare", help="Base, a client alone and a round side by side, and whatever else is named.")
    ] = False,
    system: Annotated[str | None, Option(metavar="TEXT", help="A system turn, in place of the template's own.")] = None,
    max_new_tokens: Annotated[int, Option(min=1, metavar="N", help="The longest answer.")] = 512,
    temperature: Annotated[float, Option(min=0, max=100, metavar="T", help="Sampling; 0 is greedy.")] = 0.0,
    seed: Annotated[int | None, Option(min=0, metavar="N", help="Of sampled answers. Default: 0.")] = None,
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Talk to a model of the federation: one prompt, or a session on a terminal; --compare shows several.

    The prompt is written by the federation's own template, as in training. Without PROMPT it is read from stdin; on a
    terminal a session begins, in which /clear forgets the conversation and /exit or Ctrl-D ends it.
    """
    from fedcli.scoring.targets import Targets

    if seed is not None and temperature == 0:
        raise UsageError("--seed changes nothing of greedy answers", hint="Leave it out, or give a --temperature.")
    text = _read_prompt(prompt, json_output)
    federation = found_federation(workspace, threads)
    named = Targets(tuple(rounds or ()), base, tuple(clients or ()), alone=tuple(alone or ()), pooled=pooled)
    with StepDisplay(json_output, "loading"):
        opened = federation.chat(
            named,
            compare=compare,
            system=system,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed or 0,
            has_several_turns=text is None,
        )
    if json_output:
        assert text is not None
        answers = opened.ask(text)
        print_json({"prompt": text, "answers": answers, "settings": opened.answering, "notes": opened.notes})
        return
    for note in opened.notes:
        print_hint(f"note: {note}")
    if text is not None:
        _show(opened, text)
        return
    _talk(opened)


def _read_prompt(prompt: str | None, json_output: bool) -> str | None:
    """Return the one prompt that there is, or None for a session; raise UsageError for an empty one."""
    if prompt is None and sys.stdin.isatty():
        if json_output:
            raise UsageError("--json answers one prompt", hint="Give it as an argument, or on stdin.")
        return None
    text = sys.stdin.read().rstrip("\n") if prompt in (None, "-") else str(prompt)
    if not text.strip():
        raise UsageError("the prompt is empty", hint="Give it as an argument, or on stdin.")
    return text


def _talk(opened: "Chat") -> None:
    """Ask what a person types, line by line, until the input ends."""
    import readline  # noqa: F401  # with it input() has a history and keys to edit with

    print_hint(f"{', '.join(opened.targets)}; /clear forgets the conversation, /exit or Ctrl-D ends it")
    while True:
        try:
            text = input(">>> ").strip()
        except EOFError:
            tell()
            return
        if text == "/exit":
            return
        if text == "/clear":
            opened.forget()
        elif text:
            try:
                _show(opened, text)
            except ConfigError as error:  # what this prompt spells; the next one may do
                print_hint(f"{error.message}\n  The prompt is not part of the conversation.")


def _show(opened: "Chat", text: str) -> None:
    """Ask, and show the answers as they come: in columns on a terminal that is wide enough for all."""
    width = _terminal_width()
    if len(opened.targets) > 1 and width >= LEAST_COLUMN * len(opened.targets):
        answers = _in_columns(opened, text)
    else:
        answers = _one_by_one(opened, text)
    for answer in answers:
        if answer.prompt_is_cut:
            print_hint(f"{answer.target}: the conversation is too long for the model; its beginning was left out")
        if not answer.text:
            print_hint(f"{answer.target}: the answer is empty")
        if answer.is_cut:
            print_hint(f"{answer.target}: the answer is cut at {answer.num_tokens} tokens (--max-new-tokens)")


def _terminal_width() -> int:
    """Return the columns of the terminal that stdout is, or 0 where it is none."""
    if not sys.stdout.isatty():
        return 0
    return terminal().width


def _one_by_one(opened: "Chat", text: str) -> "list[ChatAnswer]":
    current = None

    def show(target: str, piece: str) -> None:
        nonlocal current
        if target != current and len(opened.targets) > 1:
            tell(f"{'' if current is None else chr(10) * 2}--- {target} ---")
        current = target
        tell(piece, end="")
        sys.stdout.flush()

    try:
        return opened.ask(text, show)
    finally:
        tell()
        sys.stdout.flush()


def _in_columns(opened: "Chat", text: str) -> "list[ChatAnswer]":
    from rich.live import Live
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    console = terminal(highlight=False)
    told = dict.fromkeys(opened.targets, "")

    def table() -> Any:
        grid = Table(box=None, expand=True, padding=(0, 2, 0, 0))
        for target in told:
            grid.add_column(escape(target), ratio=1, overflow="fold")
        grid.add_row(*(Text(answer) for answer in told.values()))
        return grid

    with Live(get_renderable=table, console=console, refresh_per_second=8, transient=True):

        def show(target: str, piece: str) -> None:
            told[target] += piece

        answers = opened.ask(text, show)
    console.print(table())
    return answers
