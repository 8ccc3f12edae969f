"""What a client keeps from round to round for its algorithm: a candidate with each update; a counted one is current."""

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load

from fedcli.algos import Algorithm, Array, Arrays
from fedcli.errors import IntegrityError
from fedcli.workspace.history import Round
from fedcli.workspace.layout import Home, update_name
from fedcli.workspace.publish import publish_file, remove_temporaries
from fedcli.workspace.read import read_file
from fedcli.workspace.records import sha256
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.tensors import decode, encode, read_metadata

_DIGEST = "sha256"
"""The key, in a candidate's metadata, of the hash that its arrays have without it."""


def read_state(home: Home, rounds: list[Round], algorithm: Algorithm, client: int) -> "dict[str, Array]":
    """Return what a client keeps, for the last of `rounds`; empty before its first counted update.

    It is the candidate of the client's latest counted update, as the manifests tell: of an update that was refused,
    came late or was never dropped the candidate means nothing. Going back, the search ends where another algorithm
    merged. Raises IntegrityError where the candidate is gone or damaged.
    """
    if not algorithm.private_state:
        return {}
    for current in reversed(rounds):
        aggregation = current.manifest.aggregation
        if aggregation is None or aggregation.algorithm.get("name") != algorithm.name:
            return {}
        for entry in aggregation.counted:
            if entry.client == client:
                return _read_candidate(home, algorithm, current, client, entry.update)
    return {}


def save_candidate(home: Home, algorithm: Algorithm, round_number: int, update: str, arrays: Arrays) -> None:
    """Keep, durably, what is current once the update with this hash of its update.json is counted."""
    contents = encode(arrays, {_DIGEST: sha256(encode(arrays))})
    publish_file(home.candidate(algorithm.private_state, round_number, update), contents, mode=0o600)


def remove_old_candidates(home: Home, algorithm: Algorithm, client: int, rounds: list[Round]) -> None:
    """Remove candidates of rounds that have closed, but for the client's latest counted one.

    Those of the open round stay: another process of this client may have dropped its update with one of them.
    """
    counted = [
        home.candidate(algorithm.private_state, closing.number - 1, entry.update)
        for closing in rounds
        if closing.manifest.aggregation is not None
        for entry in closing.manifest.aggregation.counted
        if entry.client == client
    ]
    folder = home.candidate(algorithm.private_state, 0, "").parent
    if not folder.is_dir():
        return
    remove_temporaries(folder)
    for path in folder.glob("round-*"):  # a name begins with its round
        if path.name < update_name(rounds[-1].number) and path not in counted[-1:]:
            path.unlink(missing_ok=True)


def damaged_candidates(home: Home, algorithm: Algorithm) -> Iterator[tuple[Path, str]]:
    """Yield what is damaged of all that a client keeps for an algorithm, and how."""
    if algorithm.private_state:
        for path in sorted(home.candidate(algorithm.private_state, 0, "").parent.glob("round-*")):
            try:
                _checked(path)
            except FileNotFoundError:  # its client goes on meanwhile
                continue
            except (Refusal, SafetensorError) as error:
                yield path, str(error)


def _checked(path: Path) -> "tuple[bytes, dict[str, Array] | None]":
    """Read a candidate: its bytes, and its arrays where it names their hash; raise Refusal where that is another."""
    contents = read_file(path, limit=2**40)
    digest = read_metadata(contents).get(_DIGEST)
    if digest is None:  # written by a version without digests
        return contents, None
    arrays: dict[str, Array] = load(contents)
    if sha256(encode(arrays)) != digest:
        raise Refusal("hash", "its arrays do not have the hash that it names")
    return contents, arrays


def _read_candidate(home: Home, algorithm: Algorithm, closing: Round, client: int, update: str) -> "dict[str, Array]":
    path = home.candidate(algorithm.private_state, closing.number - 1, update)
    try:
        contents, arrays = _checked(path)
        # Clients of a version without digests kept the adapter's names.
        return decode(contents, closing.manifest.tensors) if arrays is None else arrays
    except (FileNotFoundError, Refusal, SafetensorError) as error:
        raise IntegrityError(
            f"client {client}'s private state of {algorithm.name} is gone or damaged: {path}",
            hint="Restore it from a backup; or let one round be merged with another algorithm "
            "(`server aggregate --partial --algo fedavg`), after which all clients' private states start afresh.",
        ) from error
