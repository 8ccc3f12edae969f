"""What a client keeps from round to round: a candidate with each update; the one of a counted update is current."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load

from fedcli.algos import Array, Arrays
from fedcli.config import algorithm_from
from fedcli.errors import IntegrityError
from fedcli.workspace.history import Round
from fedcli.workspace.layout import Home, update_name
from fedcli.workspace.merge_records import Aggregation
from fedcli.workspace.parsing import sha256
from fedcli.workspace.publish import publish_file, remove_temporaries
from fedcli.workspace.read import read_file
from fedcli.workspace.records import Manifest
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.tensors import decode, encode, read_metadata
from fedcli.workspace.window import base_of, window_start

RESIDUAL = "residual"
"""The folder in a client's home of what its sparse updates have not sent yet."""
_HINT_SPARSE = (
    "or let one round be opened with another aggregation.encoding, after which all clients' error feedback starts "
    "afresh"
)
OPTIMIZER = "optimizer"
"""The folder of AdamW's moments."""
_DIGEST = "sha256"
"""The key, in a candidate's metadata, of the hash that its arrays have without it."""


@dataclass(frozen=True)
class KeptState:
    """Named arrays that a client keeps from round to round, in a folder of its home; each kind has one."""

    folder: str
    owner: str
    """Whose it is, for messages: "scaffold", "aggregation.share"."""
    goes_on: Callable[[Manifest, Aggregation], bool]
    """Whether a round that was opened so, and merged so, carries it on; behind another it starts afresh."""
    hint: str = ""
    """What else than a backup helps where it is gone."""


OWN_FACTORS = "own-factors"
"""The folder of what clients keep to themselves with aggregation.share: [A], or aggregation.private."""


def own_factors(manifest: Manifest) -> KeptState | None:
    """Return what clients keep to themselves of a round's adapter; None where they send all of it."""
    if not (tensors := manifest.own_tensors):
        return None
    owner = "aggregation.share" if manifest.share == "A" else "aggregation.private"
    return KeptState(
        OWN_FACTORS,
        owner,
        lambda base, _: base.own_tensors == tensors,
        f"or let one round be opened without {owner}, after which all clients' own factors start afresh",
    )


PERSONAL = "personal"
"""The folder of the adapters that clients train for themselves."""
GLOBAL = "global"
"""The name of the frozen global adapter that stands beside FedDPA's local one in a model."""


def _personal(name: str) -> KeptState:
    return KeptState(
        PERSONAL,
        "train.personal",
        lambda base, _: base.train.personal is not None and base.train.personal.name == name,
        "or let one round be opened without train.personal, after which all clients' own adapters start afresh",
    )


def kept_states(manifest: Manifest) -> list[KeptState]:
    """Return what clients keep in a round; raise IntegrityError for an algorithm that this version does not know."""
    algorithm = algorithm_from(manifest.algorithm)
    found = []
    if (own := own_factors(manifest)) is not None:
        found.append(own)
    if (personal := manifest.train.personal) is not None:
        found.append(_personal(personal.name))
    if algorithm.private_state:
        found.append(
            KeptState(
                algorithm.private_state,
                algorithm.name,
                lambda _, merge: merge.algorithm.get("name") == algorithm.name,
                "or let one round be merged with another algorithm (`server aggregate --partial --algo fedavg`), after "
                "which all clients' private states start afresh",
            )
        )
    if manifest.encoding is not None and manifest.encoding.top_k is not None:
        found.append(KeptState(RESIDUAL, "aggregation.encoding", _goes_on_sparsely, _HINT_SPARSE))
    if manifest.train.keep_optimizer:
        found.append(
            KeptState(
                OPTIMIZER,
                "train.keep_optimizer",
                lambda base, _: bool(base.train.keep_optimizer),
                "or let one round be opened with train.keep_optimizer: false, after which all clients' moments start "
                "afresh",
            )
        )
    return found


def _goes_on_sparsely(base: Manifest, _: Aggregation) -> bool:
    """Return whether a round's updates were sparse: whoever sent one has told the rest later, or not yet."""
    return base.encoding is not None and base.encoding.top_k is not None


def read_states(home: Home, rounds: Sequence[Round], client: int) -> "dict[str, dict[str, Array]]":
    """Return what a client keeps, for the last of `rounds`, by folder; empty before its first counted update.

    Raises IntegrityError where it is gone or damaged.
    """
    return {state.folder: read_state(home, rounds, state, client) for state in kept_states(rounds[-1].manifest)}


def read_state(home: Home, rounds: Sequence[Round], state: KeptState, client: int) -> "dict[str, Array]":
    """Return one state of a client, for the last of `rounds`; empty before its first counted update.

    It is the candidate of the client's latest counted update, as the manifests tell: of an update that was refused,
    came late or was never dropped the candidate means nothing. Raises IntegrityError where the candidate is gone or
    damaged.
    """
    for base, closing in zip(rounds[-2::-1], rounds[:0:-1], strict=True):
        aggregation = closing.manifest.aggregation
        if aggregation is None or not state.goes_on(base.manifest, aggregation):
            return {}
        own = [(base_of(closing, entry), entry.update) for entry in aggregation.counted if entry.client == client]
        if own:
            number, update = max(own)
            made_in = next((each for each in rounds if each.number == number), None)
            if made_in is None:
                raise IntegrityError(
                    f"{closing.folder} counts client {client}'s update of round {number}, and there is none",
                    hint="`fedcli verify` lists all that is wrong.",
                )
            if not state.goes_on(made_in.manifest, aggregation):
                return {}
            return _read_candidate(home, state, made_in, client, update)
    return {}


def save_candidates(home: Home, round_number: int, update: str, kept: Mapping[str, Arrays]) -> None:
    """Keep, durably, what is current once the update with this hash of its update.json is counted, by folder."""
    for folder, arrays in kept.items():
        contents = encode(arrays, {_DIGEST: sha256(encode(arrays))})
        publish_file(home.candidate(folder, round_number, update), contents, mode=0o600)


def remove_old_candidates(home: Home, client: int, rounds: Sequence[Round]) -> None:
    """Remove candidates of rounds that have closed, but for the client's latest counted ones.

    Those of the open round stay: another process of this client may have dropped its update with one of them. So do
    those of earlier rounds whose updates may still count.
    """
    first = update_name(window_start(rounds[-1]))
    for state in kept_states(rounds[-1].manifest):
        counted = [
            home.candidate(state.folder, base_of(closing, entry), entry.update)
            for closing in rounds
            if closing.manifest.aggregation is not None
            for entry in closing.manifest.aggregation.counted
            if entry.client == client
        ]
        folder = home.candidate(state.folder, 0, "").parent
        if not folder.is_dir():
            continue
        remove_temporaries(folder)
        for path in folder.glob("round-*"):  # a name begins with its round
            if path.name < first and path not in counted[-1:]:
                path.unlink(missing_ok=True)


def damaged_candidates(home: Home, state: KeptState) -> Iterator[tuple[Path, str]]:
    """Yield what is damaged of all that a client keeps of a state, and how."""
    for path in sorted(home.candidate(state.folder, 0, "").parent.glob("round-*")):
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


def _read_candidate(home: Home, state: KeptState, base: Round, client: int, update: str) -> "dict[str, Array]":
    path = home.candidate(state.folder, base.number, update)
    try:
        contents, arrays = _checked(path)
        # Clients of a version without digests kept the adapter's names.
        return decode(contents, base.manifest.tensors) if arrays is None else arrays
    except (FileNotFoundError, Refusal, SafetensorError) as error:
        raise IntegrityError(
            f"client {client}'s private state of {state.owner} is gone or damaged: {path}",
            hint=f"Restore it from a backup{state.hint and '; '}{state.hint}.",
        ) from error
