"""Whether a registration is its party's own, and which of two is the newer."""

from fedcli.trust.keys import digest_of, is_signed
from fedcli.workspace.parsing import parse_object, sha256
from fedcli.workspace.records import PublicKeys
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.registrations import Registration


def own_fault(workspace: str, client: int, contents: bytes, signature: bytes) -> str:
    """Return what is wrong with a registration and its signatures; nothing where it is whole and signed by its keys."""
    registration = _parse(contents)
    if registration is None:
        return "it is not whole, or no registration"
    if (registration.workspace, registration.client) != (workspace, client):
        return f"it is of client {registration.client} of workspace {registration.workspace[:64]}"
    lines = signature.split()
    if not lines:
        return "its signature is missing"
    if registration.keys is None or not is_signed(registration.keys, lines[0], "client", workspace, sha256(contents)):
        return "it is not signed by the keys that it names"
    return ""


def follows(workspace: str, before: bytes, contents: bytes, signature: bytes) -> bool | None:
    """Return True where a registration has new keys that those of the other have signed; None where it does not say."""
    old, new = _parse(before), _parse(contents)
    lines = signature.split()
    if old is None or new is None or old.keys is None or new.keys is None or old.keys == new.keys or len(lines) < 2:
        return None
    return is_signed(old.keys, lines[1], "keys", workspace, digest_of(new.keys)) or None


def keys_of(contents: bytes) -> PublicKeys | None:
    """Return the keys that a registration names; None where it names none, or is none."""
    registration = _parse(contents)
    return None if registration is None else registration.keys


def _parse(contents: bytes) -> Registration | None:
    try:
        return Registration.model_validate(parse_object(contents, "the registration"))
    except (Refusal, ValueError):
        return None
