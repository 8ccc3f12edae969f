"""A client's own control variates (SCAFFOLD's c_k): one candidate an update, of which a counted one becomes current."""

from fedcli.algos import Algorithm, Array, Arrays
from fedcli.errors import IntegrityError
from fedcli.workspace.history import Round, state_file
from fedcli.workspace.layout import Home, update_name
from fedcli.workspace.publish import publish_file, remove_temporaries
from fedcli.workspace.read import read_file
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.tensors import decode, encode


def read_control(home: Home, rounds: list[Round], algorithm: Algorithm, client: int) -> "dict[str, Array]":
    """Return a client's c_k for the last of `rounds`; empty where it is zero.

    It is the candidate of the client's latest counted update, as the manifests tell: of an update that was refused,
    came late or was never dropped the candidate means nothing. Going back, the search ends where c itself began. Raises
    IntegrityError where the candidate is gone or damaged.
    """
    for current in reversed(rounds):
        aggregation = current.manifest.aggregation
        if (
            aggregation is None
            or aggregation.algorithm.get("name") != algorithm.name
            or state_file(algorithm) not in current.manifest.files
        ):
            return {}
        for entry in aggregation.counted:
            if entry.client == client:
                return _read_candidate(home, current, client, entry.update)
    return {}


def save_candidate(home: Home, round_number: int, update: str, arrays: Arrays) -> None:
    """Keep, durably, what c_k will be once the update with this hash of its update.json is counted."""
    publish_file(home.candidate(round_number, update), encode(arrays), mode=0o600)


def remove_old_candidates(home: Home, client: int, rounds: list[Round]) -> None:
    """Remove candidates of rounds that have closed, but for the client's latest counted one.

    Those of the open round stay: another process of this client may have dropped its update with one of them.
    """
    folder = home.controls
    if not folder.is_dir():
        return
    counted = [
        home.candidate(closing.number - 1, entry.update).name
        for closing in rounds
        if closing.manifest.aggregation is not None
        for entry in closing.manifest.aggregation.counted
        if entry.client == client
    ]
    remove_temporaries(folder)
    for path in folder.glob("round-*"):  # a name begins with its round
        if path.name < update_name(rounds[-1].number) and path.name not in counted[-1:]:
            path.unlink(missing_ok=True)


def _read_candidate(home: Home, closing: Round, client: int, update: str) -> "dict[str, Array]":
    path = home.candidate(closing.number - 1, update)
    try:
        contents = read_file(path, limit=2**40)
        return decode(contents, closing.manifest.tensors)
    except (FileNotFoundError, Refusal) as error:
        raise IntegrityError(
            f"client {client}'s control variate is gone or damaged: {path}",
            hint="Restore it from a backup; or let one round be merged with another algorithm "
            "(`server aggregate --partial --algo fedavg`), after which all control variates start afresh.",
        ) from error
