"""Published rounds: finding the head, reading manifests and files with their hashes checked, and who has answered."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fedcli.algos import Algorithm, Array, Arrays
from fedcli.algos.lora import joined
from fedcli.errors import ArrivingError, IntegrityError, NotReadyError, WorkspaceError
from fedcli.workspace.layout import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAME,
    BASE_DELTA_NAME,
    DELTA_NAME,
    MANIFEST,
    MANIFEST_SIGNATURE,
    PRUNED,
    Workspace,
    adapter_name,
    is_round_name,
)
from fedcli.workspace.parsing import CHANGED, RecordT, is_unchanged, parse_object, parse_record, sealed, sha256
from fedcli.workspace.records import FileEntry, Identity, Manifest, PrunedRecord, TensorEntry
from fedcli.workspace.refusal import Refusal

MAX_MANIFEST_BYTES = 2**28
MAX_RECORD_BYTES = 2**24
_WAIT = "Wait until it is copied; where nothing copies it, restore it from a backup: `fedcli verify` lists all."
_RESTORE = "Restore it from a backup; `fedcli verify` lists all that is wrong."


@dataclass(frozen=True)
class Round:
    """A published round."""

    workspace: Workspace
    manifest: Manifest
    sha256: str
    """The hash of manifest.json, which updates name as their base."""
    given_up: frozenset[int] = frozenset()
    """The clients of whose updates nothing more is waited for: what is not whole of them is refused."""
    cluster: int = 0
    """Whose adapter of the round is meant."""

    @property
    def number(self) -> int:
        """The round's number."""
        return self.manifest.round

    @property
    def folder(self) -> Path:
        """The round's directory."""
        return self.workspace.round(self.number)

    @property
    def draw_order(self) -> list[int]:
        """The cohort in the order in which its updates are counted."""
        return self.manifest.selection.order if self.manifest.selection is not None else self.manifest.cohort

    @property
    def num_counted(self) -> int:
        """How many updates of the round count at most."""
        return self.manifest.selection.count if self.manifest.selection is not None else len(self.manifest.cohort)

    @property
    def published(self) -> float:
        """When it was published, in seconds since 1970 by the disk's clock: to show, never to decide by.

        A copy of the workspace may have lost it.
        """
        return self.workspace.store.modified(self.workspace.name(self.folder / MANIFEST))

    def has_update(self, client: int) -> bool:
        """Return whether something lies where the client's update of this round belongs."""
        return self.workspace.has_update(self.number, client)

    def awaited_clients(self) -> list[int]:
        """Return the clients of the cohort that have not left, nor been revoked, in the cohort's order.

        Where a repair of masked updates has been asked for, only those that it asks.
        """
        if self.manifest.enrolment is None:
            return self.manifest.cohort
        from fedcli.workspace.enrolment import read_enrolment  # a simulation has none

        gone, asked = read_enrolment(self.workspace).gone, self._asked()
        return [each for each in self.manifest.cohort if each not in gone and (asked is None or each in asked)]

    def missing_clients(self) -> list[int]:
        """Return the clients that are waited for and have dropped nothing, in the cohort's order.

        Where a repair has been asked for, those that have not answered it.
        """
        awaited = self.awaited_clients()
        if self._asked() is None:
            sent = self.workspace.sent_updates(self.number, awaited)
            return [client for client in awaited if client not in sent]
        store, name = self.workspace.store, self.workspace.name
        names = {client: name(self.workspace.answer(self.number, client)) for client in awaited}
        answered = store.existing([*names.values()])
        return [client for client in awaited if names[client] not in answered]

    def _asked(self) -> set[int] | None:
        """Return whom a repair asks; None where there is none. Who acts on it reads it again, and checks it."""
        path = self.workspace.repair_of(self.number)
        if self.manifest.secure_aggregation is None or not self.workspace.store.exists(self.workspace.name(path)):
            return None
        try:
            counted = parse_object(read_whole(self.workspace, path, MAX_RECORD_BYTES), path.name).get("counted")
        except Refusal as refusal:
            raise IntegrityError(f"{path} is damaged: {refusal.reason}", hint=_RESTORE) from refusal
        return (
            {int(client) for client in counted if client.isdecimal() and len(client) < 20}
            if isinstance(counted, dict)
            else set()
        )

    def adapter(self) -> "dict[str, Array]":
        """Return the round's global adapter, float32; raise IntegrityError where it is damaged."""
        return self.arrays(adapter_name(self.cluster), self.manifest.tensors)

    def of_cluster(self, cluster: int) -> "Round":
        """Return the round with another cluster's adapter."""
        return replace(self, cluster=cluster)

    def base_delta(self) -> "dict[str, Array] | None":
        """Return the frozen second adapter, float32; None where there is none, IntegrityError where it is damaged."""
        tensors = self.manifest.delta_tensors
        if bool(tensors) != (BASE_DELTA_NAME in self.manifest.files):
            problem = (
                "tells the rank of base_delta/, and does not list it" if tensors else "lists base_delta/, not its rank"
            )
            raise IntegrityError(f"{self.folder / MANIFEST} is damaged: it {problem}", hint=_RESTORE)
        return self.arrays(BASE_DELTA_NAME, tensors) if tensors else None

    def beside(self) -> "dict[str, dict[str, Array]]":
        """Return what stands frozen beside the adapter in training, by name."""
        return {} if (delta := self.base_delta()) is None else {"base_delta": delta}

    def whole_adapter(self) -> "dict[str, Array]":
        """Return both adapters as one, of both ranks together and the same scale: what the round computes."""
        return self.with_delta(self.adapter())

    def with_delta(self, adapter: "Arrays") -> "dict[str, Array]":
        """Return an adapter that was trained in the round together with the frozen second one."""
        delta = self.base_delta()
        return {**adapter} if delta is None else joined(adapter, delta)

    def weight(self, algorithm: Algorithm, num_rows: int) -> float:
        """Return what a client with so many rows weighs: where privacy has a unit all weigh the same."""
        return 1.0 if self.manifest.withholds else algorithm.weight(num_rows)

    def state(self, algorithm: Algorithm) -> "dict[str, Array]":
        """Return the server's state that the round before left for an algorithm; empty where it was another's."""
        manifest, merge, name = self.manifest, self.manifest.aggregation, algorithm.state_file
        if merge is None or merge.algorithm.get("name") != algorithm.name or name not in manifest.files:
            return {}
        prefixes, tensors = algorithm.state_prefixes, manifest.tensors
        return self.arrays(name, {prefix + tensor: tensors[tensor] for prefix in prefixes for tensor in tensors})

    def arrays(self, name: str, schema: Mapping[str, TensorEntry]) -> "dict[str, Array]":
        """Return the arrays of one of the round's files; raise IntegrityError where it does not hold them."""
        from fedcli.workspace.tensors import decode

        try:
            return decode(self.read(name), schema)
        except Refusal as refusal:
            path = self.folder / name
            raise IntegrityError(f"{path} is damaged: {refusal.reason}", hint=_RESTORE) from refusal

    def read(self, name: str) -> bytes:
        """Return the contents of one of the round's files; an adapter may be computed from a copy of the one before.

        Raises IntegrityError where its hash is another, WorkspaceError where `gc` has removed it.
        """
        if name == ADAPTER_NAME and DELTA_NAME in self.manifest.files and self.workspace.store.is_remote:
            from fedcli.workspace.adapter_delta import adapter_of_delta

            if (contents := adapter_of_delta(self)) is not None:
                return contents
        if name not in self.manifest.files:
            raise IntegrityError(f"{self.folder / MANIFEST} is damaged: it does not list {name}", hint=_RESTORE)
        try:
            return read_checked(self.workspace, self.folder / name, self.manifest.files[name])
        except IntegrityError:
            if self.is_gone(name):
                raise WorkspaceError(
                    f"round {self.number}'s {name} was removed by `fedcli gc`",
                    hint="Choose a round that is still whole; `retention` in fedcli.yaml says which rounds stay so.",
                ) from None
            raise

    def previous(self) -> "Round | None":
        """Return the round that this one names as its parent; None where there is none, or another one stands."""
        digest = self.manifest.parent
        found = None if digest is None else read_round(self.workspace, self.number - 1, digest=digest)
        return found if found is not None and found.sha256 == digest else None

    def check_unchanged(self) -> None:
        """Raise IntegrityError where manifest.json is not as the server wrote it, as far as it can be told."""
        path = self.folder / MANIFEST
        contents = read_whole(self.workspace, path, MAX_MANIFEST_BYTES)
        problem = None
        if sha256(contents) != self.sha256:
            problem = "it has changed since it was read"
        elif not is_unchanged(parse_object(contents, MANIFEST)):
            problem = CHANGED
        elif not math.isclose(self.manifest.train.learning_rate, self.manifest.scheduled_rate, rel_tol=1e-9):
            problem = (
                f"train.learning_rate is {self.manifest.train.learning_rate:g}, "
                f"its schedule gives {self.manifest.scheduled_rate:g}"
            )
        if problem is not None:
            raise IntegrityError(f"{path} is damaged: {problem}", hint=_RESTORE)

    def has(self, name: str) -> bool:
        """Return whether something lies under a name in its directory."""
        return self.workspace.store.exists(self.workspace.name(self.folder / name))

    def names(self) -> set[str]:
        """Return the names of all files in its directory."""
        return {*self.workspace.store.files(self.workspace.name(self.folder))}

    def is_gone(self, name: str) -> bool:
        """Return whether `gc` has removed one of the round's files."""
        pruned = self.pruned()
        return pruned is not None and name in pruned.files and not self.has(name)

    def pruned(self) -> PrunedRecord | None:
        """Return which of the round's files `gc` has removed, or is removing; None where it has not been here."""
        return read_record(self.workspace, PrunedRecord, self.folder / PRUNED, MAX_MANIFEST_BYTES)


def prunable(manifest: Manifest) -> dict[str, FileEntry]:
    """Return what `gc` may remove of a round: its adapter and the server's state."""
    return {name: entry for name, entry in manifest.files.items() if name != ADAPTER_CONFIG_NAME}


def is_initialised(workspace: Workspace) -> bool:
    """Return whether `init` has given the workspace its identity."""
    return workspace.store.exists(workspace.name(workspace.identity))


def read_identity(workspace: Workspace, contents: bytes | None = None) -> Identity:
    """Read workspace.json, or its `contents` where they are at hand; raise WorkspaceError where there is none yet."""
    if contents is not None:
        return parse_record(Identity, contents, workspace.identity)
    identity = read_record(workspace, Identity, workspace.identity, 2**20)
    if identity is None:
        if not workspace.store.exists(workspace.config.name):
            raise WorkspaceError(
                f"{workspace.address} is not a workspace: it holds no {workspace.config.name}",
                hint=f"Create one with `fedcli init {workspace.address}`.",
            )
        raise WorkspaceError(
            f"{workspace.address} holds a {workspace.config.name} but no {workspace.identity.name}: "
            "it is not initialised yet",
            hint=f"Run `fedcli init {workspace.address}`.",
        )
    return identity


def read_round(workspace: Workspace, number: int, *, digest: str | None = None) -> Round | None:
    """Read a round's manifest, or return None where the round has not been published.

    `digest` is the SHA-256 that it should have: a copy on this machine will do.
    """
    path = workspace.round(number) / MANIFEST
    contents = read_if_there(workspace, path, MAX_MANIFEST_BYTES, digest=digest)
    if contents is None:
        return None
    manifest = parse_record(Manifest, contents, path)
    if manifest.round != number:
        raise IntegrityError(f"{path} says that it is round {manifest.round}", hint=_RESTORE)
    return Round(workspace, manifest, sha256(contents))


def read_head(workspace: Workspace, identity: Identity, *, known: Round | None = None) -> Round:
    """Return the latest round of the workspace with this identity; `known` is one that it is not before.

    The listing of rounds/ may be old over NFS, so it is a first guess only: the head is where opening the next fails.
    """
    head, number = known, known.number + 1 if known is not None else _last_listed(workspace)
    while (following := read_round(workspace, number)) is not None:
        head, number = following, number + 1
    if head is None and number:
        raise ArrivingError(f"{workspace.round(number)} has no {MANIFEST}", hint=_WAIT)
    head = head or read_start(workspace)
    if head.manifest.workspace != identity.id:
        raise IntegrityError(
            f"{head.folder} belongs to workspace {head.manifest.workspace}, not to {identity.id}", hint=_RESTORE
        )
    return head


def read_start(workspace: Workspace) -> Round:
    """Return round 0; raise NotReadyError where it is not open yet."""
    start = read_round(workspace, 0)
    if start is None:
        raise NotReadyError(f"{workspace.address} has no round yet", hint="Run `fedcli server open`.")
    return start


def read_past(workspace: Workspace, number: int, *, digest: str | None = None) -> Round:
    """Return a round that a later one follows; raise IntegrityError where there is none. `digest`: see `read_round`."""
    past = read_round(workspace, number, digest=digest)
    if past is None:
        raise ArrivingError(f"{workspace.round(number)} is missing though a later round exists", hint=_WAIT)
    return past


def listed_rounds(workspace: Workspace) -> list[int]:
    """Return the numbers that a listing of rounds/ shows, which may be out of date on a network file system."""
    return sorted(int(name) for name in workspace.store.names("rounds") if is_round_name(name))


def sweep_workspace(workspace: Workspace) -> None:
    """Remove what a killed `init` left half-written."""
    workspace.store.sweep("")
    workspace.store.sweep("rounds")


def publish_round(
    workspace: Workspace,
    manifest: Manifest,
    files: Mapping[str, bytes],
    sign: Callable[[bytes], bytes] | None = None,
) -> bool:
    """Publish a round, `sign` giving manifest.sig of its manifest.json; return False where another server was first.

    Then that one's round stands.
    """
    folder, record = workspace.name(workspace.round(manifest.round)), sealed(manifest)
    signature = [] if sign is None else [(MANIFEST_SIGNATURE, sign(record))]
    return workspace.store.publish(folder, [*files.items(), *signature], (MANIFEST, record))


def is_hidden(workspace: Workspace, client: int) -> bool:
    """Return whether a client's inbox is closed to this user: only the server and its own user see into it."""
    return workspace.store.is_hidden(workspace.name(workspace.client_inbox(client)))


def _last_listed(workspace: Workspace) -> int:
    """Return the last round that a listing shows, 0 for none; an empty folder is no round: the next one replaces it."""
    listed = listed_rounds(workspace)
    if workspace.store.is_remote:  # where there are no empty folders
        return max(listed, default=0)
    listed.reverse()
    return next((number for number in listed if workspace.store.names(workspace.name(workspace.round(number)))), 0)


def read_record(
    workspace: Workspace, kind: type[RecordT], path: Path, limit: int = MAX_RECORD_BYTES, *, hint: str | None = None
) -> RecordT | None:
    """Read a record that the server wrote; None where it is missing, IntegrityError (with `hint`) where damaged."""
    try:
        contents = read_if_there(workspace, path, limit)
        return None if contents is None else parse_record(kind, contents, path)
    except IntegrityError as error:
        error.hint = hint or error.hint
        raise


def read_checked(workspace: Workspace, path: Path, entry: FileEntry) -> bytes:
    """Read a file that the server wrote; raise IntegrityError where it is not the one that its record lists."""
    contents = read_whole(workspace, path, entry.bytes, digest=entry.sha256)
    if len(contents) != entry.bytes or sha256(contents) != entry.sha256:
        raise IntegrityError(f"{path} is not what its record says: the hash differs", hint=_RESTORE)
    return contents


def read_whole(workspace: Workspace, path: Path, limit: int, *, digest: str | None = None) -> bytes:
    """Read a file that the server wrote; raise IntegrityError where it is missing, odd or larger than `limit` bytes.

    `digest` is the SHA-256 that it should have: a copy on this machine will do.
    """
    contents = read_if_there(workspace, path, limit, digest=digest)
    if contents is None:
        raise IntegrityError(f"{path} is missing", hint=_RESTORE)
    return contents


def read_if_there(workspace: Workspace, path: Path, limit: int, *, digest: str | None = None) -> bytes | None:
    """Read a file that the server wrote; None where it is missing, IntegrityError as from `read_whole`."""
    store, name = workspace.store, workspace.name(path)
    try:
        return store.read(name, limit) if digest is None else store.read_kept(name, limit, digest)
    except FileNotFoundError:
        return None
    except Refusal as refusal:
        raise IntegrityError(f"{path} is damaged: {refusal.reason}", hint=_RESTORE) from refusal
