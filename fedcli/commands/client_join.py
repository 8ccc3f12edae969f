"""fedcli client join."""

import json
import shlex
import sys
from typing import Annotated, Literal

from typer import Option

from fedcli.commands.options import ClientOption, HomeOption, JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import StepDisplay, at, print_result


def join(
    client: ClientOption,
    data: Annotated[str, Option(metavar="SOURCE", help="Your rows: a file, a folder, or a hub id. They stay there.")],
    data_format: Annotated[
        str | None,
        Option(
            "--format",
            metavar="FORMAT",
            help="What the rows are: a format's name, or '{columns: {instruction: question, response: answer}}'. "
            "Default: as the hub's data set is known to have, else alpaca (sft) or preference (dpo).",
        ),
    ] = None,
    home: HomeOption = None,
    base: Annotated[
        str | None, Option(metavar="DIR", help="Your copy of the base model. Default: as fedcli.yaml says.")
    ] = None,
    share: Annotated[
        Literal["full", "minimal"], Option(help="minimal: tell the number of rows and nothing else.")
    ] = "full",
    subset: Annotated[str | None, Option(metavar="NAME", help="Of a hub's data set.")] = None,
    split: Annotated[str | None, Option(metavar="NAME", help="Of a hub's data set.")] = None,
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Run code that comes with the base model, on your machine.")
    ] = False,
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask before the data card is written.")] = False,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Join as a real party: your rows stay where they are, and the workspace gets a data card that you see first.

    On a terminal you are asked before it is written; elsewhere, and with --json, you are not. Run again, it replaces
    your card.
    """
    federation = found_federation(workspace)
    asks = not yes and not json_output and sys.stdin.isatty()
    with StepDisplay(json_output, visible=False) as observer:
        joining = federation.client(client, home=home).join(
            data,
            format=data_format,
            subset=subset,
            split=split,
            base=base,
            trust_remote_code=trust_remote_code,
            share=share,
            observer=observer,
        )
    card = joining.card.model_dump(mode="json", exclude_none=True)
    if not json_output:
        print("the workspace learns this of your rows, and nothing else:")
        print(json.dumps(card, indent=1))
    if asks and not _confirmed(f"Write this to {federation.workspace.registration(client)}? [y/N]: "):
        print("nothing was written")
        return
    joining.commit()
    own = "" if home is None else f" --home {shlex.quote(str(home.absolute()))}"
    print_result(
        json_output,
        {"status": "joined", "client": client, "home": str(joining.home.folder), "data": card},
        f"client {client} has joined; its private state lies in {joining.home.folder}",
        hint=f"next: fedcli client train --id {client}{own}{at(workspace)}",
    )


def _confirmed(question: str) -> bool:
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
