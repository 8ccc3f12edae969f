"""fedcli keys: who signs."""

from typing import TYPE_CHECKING, Annotated

from typer import Option

from fedcli.commands.options import HomeOption, JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import at, print_result

if TYPE_CHECKING:
    from fedcli.operations.keys import KeyOwner

_STATES = {"leave": "has left", "revoke": "revoked", "joined": "joined, not enrolled"}


def keys_show(workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Show the fingerprints of the server's and the parties' keys, to compare by telephone.

    With --json it prints what `fedcli verify --trust FILE` takes.
    """
    ring = found_federation(workspace).keys()
    lines = [_line("server", ring.server)]
    for client, owner in ring.clients.items():
        lines.append(_line(f"client {client}", owner))
        if client in ring.following:
            lines.append(f"{'':<10} {ring.following[client]}  new, not enrolled yet")
    print_result(json_output, ring, lines)


def _line(who: str, owner: "KeyOwner") -> str:
    state = _STATES.get(owner.state, owner.state)
    return f"{who:<10} {owner.fingerprint}  {state}{', its keys are here' if owner.is_own else ''}"


def keys_rotate(
    client: Annotated[int | None, Option("--id", metavar="N", help="A party's keys. Default: the server's.")] = None,
    home: HomeOption = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Make new keys, which the old ones sign: the server's, or with --id a party's.

    A party goes on signing with its old keys until the server's operator has enrolled the new ones.
    """
    federation = found_federation(workspace)
    if client is None:
        told = federation.server.rotate_keys()
        text, hint = f"the server's keys are new: {told}", ""
    else:
        told = federation.client(client, home=home).rotate_keys()
        text = f"client {client} has new keys: {told}; it signs with the old ones until they are enrolled"
        hint = f"next: the server's operator: fedcli server enrol --id {client}{at(workspace)}"
    print_result(json_output, {"status": "rotated", "client": client, "fingerprint": told}, text, hint)
