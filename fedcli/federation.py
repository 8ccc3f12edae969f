"""The Python API: a federation in a workspace, its clients, its server and its scores (docs/PYTHON.md)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedcli.errors import UsageError
from fedcli.observer import Observer
from fedcli.workspace.address import find_workspace, workspace_at
from fedcli.workspace.layout import Workspace

if TYPE_CHECKING:
    from fedcli.client.due import ClientResult
    from fedcli.client.runtimes import KeptModel, Runtimes
    from fedcli.operations.baseline import BaselineResult
    from fedcli.operations.bundle import Bundled, Imported
    from fedcli.operations.carry import Carried
    from fedcli.operations.chat import Chat
    from fedcli.operations.export import Exported
    from fedcli.operations.gc import Collection
    from fedcli.operations.keys import KeyRing
    from fedcli.operations.preview import Preview
    from fedcli.operations.privacy import PrivacyReport
    from fedcli.operations.relay import RelayResult
    from fedcli.operations.report import WrittenReport
    from fedcli.operations.run import FederationResult
    from fedcli.operations.slurm_submit import Submission
    from fedcli.operations.status import Status
    from fedcli.parties.join import Joining
    from fedcli.parties.simulate import DataSummary
    from fedcli.scoring.after_rounds import RoundScores
    from fedcli.scoring.request import Scoring
    from fedcli.scoring.table import ScoreTable
    from fedcli.scoring.targets import Targets
    from fedcli.server.aggregate import AggregationResult
    from fedcli.server.verification import Verification
    from fedcli.workspace.federation_state import FederationState
    from fedcli.workspace.history import Round
    from fedcli.workspace.idle import Glance
    from fedcli.workspace.scores import ScoreEntry, ScoreRecord
    from fedcli.workspace.slurm_jobs import JobKind

SILENT = Observer()


class Federation:
    """A federation in a workspace.

    Every method does what the command of its name does, reads what is on disk now, and may be called from several
    processes at once. All of them raise a subclass of `fedcli.errors.FedError`, whose `message` and `hint` tell what is
    wrong and what to do. An `Observer` hears how the work goes on.
    """

    def __init__(self, workspace: Workspace, *, threads: int | None = None, kept: "KeptModel | None" = None) -> None:
        self.workspace = workspace
        self.threads = threads
        self._kept = kept
        self._identity_contents: bytes | None = None
        self._state: FederationState | None = None

    @classmethod
    def create(
        cls,
        path: Path | str = ".",
        *,
        preset: str | None = None,
        settings: Mapping[str, object] | None = None,
        observer: Observer = SILENT,
    ) -> "Federation":
        """Make a workspace in a folder and open its round 0; one that is there is opened.

        `settings` are values by key of fedcli.yaml, such as {"train.steps": 20}. Raises UsageError for an unknown
        preset, ConfigError for a fault in the settings or the rows, WorkspaceError where another experiment lies there.
        """
        from fedcli.server.create import create_workspace

        overrides = [f"{key}={json.dumps(value, default=str)}" for key, value in (settings or {}).items()]
        made = create_workspace(path, preset=preset, overrides=overrides, observer=observer)
        return cls(made.federation.workspace)

    @classmethod
    def open(
        cls, path: Path | str | None = None, *, threads: int | None = None, kept: "KeptModel | None" = None
    ) -> "Federation":
        """Open the workspace in a folder; for None the one that $FEDCLI_WORKSPACE or the current folder names.

        `threads` are the CPU threads of its training; None: $OMP_NUM_THREADS, else all cores. `kept` holds a base that
        another federation of this process has loaded.

        Raises WorkspaceError where there is none, or where it is not initialised, ConfigError for a fault in its
        fedcli.yaml.
        """
        found = cls(find_workspace(path), threads=threads, kept=kept)
        assert found.state
        return found

    def look(self) -> "Glance | None":
        """Return at a glance whether any client may have to train here; None where only `state` can tell."""
        from fedcli.workspace.idle import glance

        seen = glance(self.workspace)
        self._identity_contents = seen.identity if seen else None
        return seen

    @property
    def state(self) -> "FederationState":
        """Its configuration, identity and latest round, as they are on disk now."""
        from fedcli.workspace.federation_state import FederationState

        if self._state is None:
            self._state = FederationState.open(self.workspace, self._identity_contents)
        else:
            self._state.refresh()
        return self._state

    @cached_property
    def runtimes(self) -> "Runtimes":
        """The models that are loaded, which stay so for the next call."""
        from fedcli.client.runtimes import Runtimes

        return Runtimes(self.state, threads=self.threads, kept=self._kept)

    @property
    def path(self) -> Path:
        """The workspace's folder."""
        return self.workspace.root

    @property
    def server(self) -> "Server":
        """The server's work."""
        return Server(self)

    @property
    def slurm(self) -> "Slurm":
        """The federation as jobs of SLURM."""
        return Slurm(self)

    def client(self, client: int, *, home: Path | str | None = None) -> "Client":
        """Return one client; `home` is a joined party's own folder, where it is not the default.

        Raises UsageError for an id that no client has; of a workspace elsewhere its methods do, once they ask it.
        """
        if not self.workspace.store.is_remote:
            self.state.check_clients([client])
        return Client(self, client, _path(home))

    def round(self, number: "int | Literal['latest']" = "latest") -> "Round":
        """Return a round: its manifest, and `adapter()`, named float32 arrays. Raises NotReadyError for a later one."""
        return self.state.round(number)

    def run(self, *, rounds: int | None = None, workers: int = 1, observer: Observer = SILENT) -> "FederationResult":
        """Train and merge until the last round, or for `rounds` rounds, with so many clients at once."""
        from fedcli.operations.run import run_federation

        for name, number in (("rounds", rounds), ("workers", workers)):
            if number is not None and number < 1:
                raise UsageError(f"{name} is {number}", hint="Give 1 or more.")
        return run_federation(
            self.state, runtimes=self.runtimes, rounds=rounds, workers=workers, threads=self.threads, observer=observer
        )

    def train_clients(
        self,
        clients: Sequence[int] | None = None,
        *,
        wait: float = 0.0,
        refresh: bool = False,
        observer: Observer = SILENT,
    ) -> "list[ClientResult]":
        """Do what is due for several clients; for None all that are here and that nobody else trains.

        `refresh` registers a party's changed rows anew before its turn.
        """
        from fedcli.client.due import train_clients

        return train_clients(self.state, clients, self.runtimes, wait=wait, refresh=refresh, observer=observer)

    def train_pooled(self, *, observer: Observer = SILENT) -> "BaselineResult":
        """Train the baseline of all clients' rows together; only a simulation has them."""
        from fedcli.operations.baseline import train_baseline

        return train_baseline(self.state, None, runtimes=self.runtimes, observer=observer)

    def status(self) -> "Status":
        """Return the open round, who has answered it, and how the round before it was merged."""
        from fedcli.operations.status import read_status

        return read_status(self.state)

    def evaluate(
        self, *names: str, request: "Scoring | None" = None, observer: Observer = SILENT
    ) -> "list[ScoreRecord]":
        """Score all models of the workspace on benchmarks, or what a `request` names, and keep the scores.

        What was answered before is not asked again. Raises UsageError where no benchmark is named.
        """
        from fedcli.scoring.request import Scoring, prepare

        if not (names or request):
            raise UsageError("no benchmark is named", hint="`fedcli eval list` shows those that there are.")
        return prepare(self.state, request or Scoring(names), self.runtimes).run(observer)

    def scores(
        self,
        *names: str,
        group: str | None = None,
        against: str = "base",
        details: bool = False,
        others: "Sequence[Federation]" = (),
    ) -> "ScoreTable":
        """Return the scores on benchmarks, or on all of them, side by side, with those of other federations.

        Raises NotReadyError where there are none.
        """
        from fedcli.scoring.table import make_table

        beside = [other.workspace for other in others]
        return make_table(self.workspace, names=names, group=group, against=against, details=details, others=beside)

    def best_rounds(self, metric: str) -> "list[tuple[int, ScoreEntry]]":
        """Return the rounds' scores in BENCHMARK or BENCHMARK.METRIC, the best first."""
        from fedcli.scoring.table import best_rounds

        return best_rounds(self.workspace, metric)

    def chat(
        self,
        models: "Targets | None" = None,
        *,
        compare: bool = False,
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        seed: int = 0,
        has_several_turns: bool = True,
        observer: Observer = SILENT,
    ) -> "Chat":
        """Load a model to talk to, the latest round's by default; with `compare` base, one client alone and a round.

        Raises UsageError or NotReadyError for a model that is not there, ConfigError where the federation's template
        cannot write the system turn, or several turns.
        """
        from fedcli.operations.chat import Answering, open_chat
        from fedcli.scoring.targets import Targets

        return open_chat(
            self.state,
            models or Targets(),
            self.runtimes,
            compare=compare,
            answering=Answering(system, max_new_tokens, temperature, seed),
            has_several_turns=has_several_turns,
            observer=observer,
        )

    def keys(self) -> "KeyRing":
        """Return the public keys of the server and the parties; raise UsageError where signatures are off."""
        from fedcli.operations.keys import read_keys

        return read_keys(self.state)

    def privacy(self, client: int | None = None, *, home: Path | None = None) -> "PrivacyReport":
        """Return what the rounds so far have spent of each client's privacy, or of one client's.

        Of one whose home is here (`home` where it is not at its default) it has what its own ledger says, too.
        """
        from fedcli.operations.privacy import read_privacy

        return read_privacy(self.state, client, home=home)

    def relay(
        self,
        client: int,
        region: "Federation",
        *,
        home: Path | str | None = None,
        server: str | None = None,
        observer: Observer = SILENT,
    ) -> "RelayResult":
        """Do what is due for a region as a client of this federation, once; that nothing is due is a result, no error.

        The first call joins. Then each opens the region's next round from this federation's latest, or sends what the
        region has merged. `server` is the fingerprint that this federation's server must have.
        """
        from fedcli.operations.relay import relay

        return relay(self.state, region.state, client, home=_path(home), server=server, observer=observer)

    def verify(
        self,
        *,
        trust: Path | str | None = None,
        noise_keys: Sequence[Path | str] = (),
        parent: str | None = None,
        observer: Observer = SILENT,
    ) -> "Verification":
        """Check every round and counted update; what is wrong is collected, not raised.

        `trust` is a file of pinned keys, as `fedcli keys show --json` prints them; `noise_keys` are the server's keys
        of the noise that rounds were merged with, or folders of them; `parent` is the address of a region's parent.
        """
        from fedcli.server.verify import verify

        return verify(
            self.workspace,
            trust=_path(trust),
            noise_keys=[*map(Path, noise_keys)],
            parent=parent,
            observer=observer,
        )

    def report(
        self, *, output: Path | str | None = None, tensorboard: Path | str | None = None, observer: Observer = SILENT
    ) -> "WrittenReport":
        """Write a page that shows the federation, and its pictures."""
        from fedcli.operations.report import write_report

        return write_report(self.state, output=_path(output), tensorboard=_path(tensorboard), observer=observer)

    def export(
        self,
        output: Path | str,
        *,
        round: str = "latest",
        best: str | None = None,
        client: int | None = None,
        merge: bool = False,
        dtype: str | None = None,
        max_shard_size: str | None = None,
    ) -> "Exported":
        """Write a round's or a client's own adapter with a model card into a new folder, or merged into the base."""
        from fedcli.operations.export import export

        return export(
            self.state,
            Path(output),
            number=round,
            best=best,
            client=client,
            merge=merge,
            dtype=dtype,
            max_shard_size=max_shard_size,
        )

    def gc(self, *, dry_run: bool = False) -> "Collection | None":
        """Remove the weights of old rounds, as fedcli.yaml's `retention` says; None where it says nothing."""
        from fedcli.operations.gc import collect

        return collect(self.state, dry_run=dry_run)

    def sync(
        self, target: Path | str, *, client: int | None = None, replace: bool = False, observer: Observer = SILENT
    ) -> "Carried":
        """Carry to another place what it lacks of the workspace; an empty one becomes a copy.

        With a `client` only what that party needs and sends. With `replace` what may change is this workspace's
        wherever the two differ.
        """
        from fedcli.operations.sync import sync

        return sync(self.workspace, workspace_at(target), client=client, replace=replace, observer=observer)

    def bundle_round(self, path: Path | str, number: int | str = "latest", *, observer: Observer = SILENT) -> "Bundled":
        """Write what a party needs to train in a round into one file, which the server signs."""
        from fedcli.operations.bundle import bundle_round

        return bundle_round(self.state, self.state.round(number).number, Path(path), observer=observer)

    def import_bundle(self, path: Path | str, *, server: str | None = None, observer: Observer = SILENT) -> "Imported":
        """Take a bundle into the workspace, which need not be there yet; `server`: the fingerprint it must have."""
        from fedcli.operations.bundle import import_bundle

        return import_bundle(Path(path), self.workspace, server=server, observer=observer)

    def preview(
        self,
        *,
        client: int | None = None,
        home: Path | str | None = None,
        by: str | None = None,
        num_rows: int = 2,
        output: Path | str | None = None,
        observer: Observer = SILENT,
    ) -> "Preview":
        """Look at rows as they are trained on, and draw the clients' shares; round 0 need not be open."""
        from fedcli.operations.preview import preview

        return preview(
            self.workspace,
            client=client,
            home=_path(home),
            by=by,
            num_rows=num_rows,
            output=_path(output),
            observer=observer,
        )

    def partition(self, *, replace: bool = False, observer: Observer = SILENT) -> "DataSummary":
        """Split data.source among the simulated clients; round 0 need not be open."""
        from fedcli.parties.simulate import partition_data

        return partition_data(self.workspace, replace=replace, observer=observer)


def _path(path: Path | str | None) -> Path | None:
    return None if path is None else Path(path)


@dataclass(frozen=True)
class Client:
    """One client of a federation; `home` is a joined party's own folder, None for the default."""

    federation: Federation
    id: int
    home: Path | None

    @property
    def _state(self) -> "FederationState":
        state = self.federation.state
        state.check_clients([self.id])
        return state

    def join(
        self,
        data: Path | str,
        *,
        format: str | None = None,
        subset: str | None = None,
        split: str | None = None,
        delimiter: str | None = None,
        encoding: str | None = None,
        base: str | None = None,
        trust_remote_code: bool = False,
        allow_code_execution: bool = False,
        share: Literal["full", "minimal"] | None = None,
        server: str | None = None,
        floors: Sequence[str] = (),
        select: str | None = None,
        shares_scores: bool | None = None,
        observer: Observer = SILENT,
    ) -> "Joining":
        """Read a party's rows, which stay where they are; `commit()` of what is returned writes the registration.

        `server` is the fingerprint that the server must have; None: the one that it has now, or had before. `floors`
        are the least that a round must ask for, such as "rows=32"; `select` is off, or which rows are trained on
        whatever a round asks; with `shares_scores` updates tell how many rows have which score (docs/DATA.md).
        """
        from fedcli.parties.join import JoinChoices, prepare_join

        choices = JoinChoices(
            str(data),
            format=format,
            subset=subset,
            split=split,
            delimiter=delimiter,
            encoding=encoding,
            base=base,
            trust_remote_code=trust_remote_code,
            allow_code_execution=allow_code_execution,
            share=share,
            server=server,
            floors=floors,
            select=select,
            shares_scores=shares_scores,
        )
        return prepare_join(self._state, self.id, choices, home=self.home, observer=observer)

    def status(self) -> "ClientResult":
        """Return how the client stands in the open round."""
        from fedcli.client.due import client_status

        return client_status(self._state, self.id)

    def train(self, *, wait: float = 0.0, observer: Observer = SILENT) -> "ClientResult":
        """Train on the open round and drop the update; that nothing is due is a result, no error."""
        from fedcli.client.due import remember_status, remembered_status, train_client

        if not wait and (idle := remembered_status(self.federation.workspace, self.id)) is not None:
            return idle
        state, runtimes = self._state, self.federation.runtimes
        result = train_client(state, self.id, runtimes, home=self.home, wait=wait, observer=observer)
        if not result.has_worked:
            remember_status(state, result)
        return result

    def refresh(self, *, observer: Observer = SILENT) -> tuple[int, int] | None:
        """Register the party's rows anew where their number or card has changed; return how many there were and are."""
        from fedcli.client.due import refresh_rows

        return refresh_rows(self._state, self.id, self.home, observer=observer)

    def leave(self) -> bool:
        """Sign that the party leaves, which the server obeys when it next merges; return False where it is out."""
        from fedcli.parties.membership import leave

        return leave(self._state, self.id, self.home)

    def rotate_keys(self) -> str:
        """Make and register new keys of the party, signed by the old ones; return their fingerprint."""
        from fedcli.parties.membership import rotate

        return rotate(self._state, self.id, self.home)

    def bundle(self, path: Path | str, *, observer: Observer = SILENT) -> "Bundled":
        """Write what the party sends into one file, which it signs: registration, countersignatures, update."""
        from fedcli.operations.bundle import bundle_update

        return bundle_update(self.federation.state, self.id, Path(path), home=self.home, observer=observer)

    def train_alone(self, *, observer: Observer = SILENT) -> "BaselineResult":
        """Train the baseline of this client alone."""
        from fedcli.operations.baseline import train_baseline

        state, runtimes = self._state, self.federation.runtimes
        return train_baseline(state, self.id, home=self.home, runtimes=runtimes, observer=observer)


@dataclass(frozen=True)
class Server:
    """The server of a federation."""

    federation: Federation

    def open(self) -> "Round":
        """Open round 0 unless it is open, and return the latest round."""
        from fedcli.server.create import open_round

        return open_round(self.federation.workspace).head

    def aggregate(
        self,
        *,
        algorithm: str | None = None,
        partial: bool = False,
        abandon: bool = False,
        refuse_arriving: bool = False,
        dry_run: bool = False,
        wait: float = 0.0,
        observer: Observer = SILENT,
    ) -> "AggregationResult":
        """Merge the open round's updates and publish the next round; raise NotReadyError while too few are there.

        `abandon` ends a round of secure aggregation without its updates; `refuse_arriving` refuses updates that are not
        all there. What eval.every asks for is noted, and `score`
        makes the scores.
        """
        from fedcli.server.aggregate import aggregate

        if not dry_run:
            self.note_scores()  # an earlier call may have been interrupted before it did
        result = aggregate(
            self.federation.state,
            algorithm=algorithm,
            partial=partial,
            abandon=abandon,
            refuse_arriving=refuse_arriving,
            dry_run=dry_run,
            wait=wait,
            observer=observer,
        )
        if result.published:
            self.note_scores()
        return result

    def run(self, *, observer: Observer = SILENT) -> "Round":
        """Merge every round as soon as it is ready, until the last, and return that; clients train elsewhere."""
        from fedcli.server.aggregate import aggregate_all

        self.note_scores()
        return aggregate_all(self.federation.state, on_round=self.note_scores, observer=observer)

    def note_scores(self) -> None:
        """Note what the latest round is to be scored on, as fedcli.yaml's eval.every asks; `score` makes the scores."""
        from fedcli.scoring.after_rounds import note_due

        note_due(self.federation.state)

    def score(self) -> "Iterator[RoundScores]":
        """Make the scores that are due, and yield each round's; what fails is kept, and left to a person."""
        from fedcli.scoring.after_rounds import score_due

        return score_due(self.federation.state, self.federation.runtimes, SILENT)

    def enrol(self, client: int, fingerprint: str | None = None) -> tuple[str, bool]:
        """Enrol a joined party under its keys; return their fingerprint, and whether it was not enrolled before.

        New keys that the old ones signed need no `fingerprint`. Raises UsageError where one is needed, IntegrityError
        where it is another.
        """
        from fedcli.server.enrol import enrol

        return enrol(self.federation.state, client, fingerprint)

    def revoke(self, client: int) -> bool:
        """Take a client out: drawn no more, not waited for, its updates refused; return False where it is out."""
        from fedcli.server.enrol import revoke

        return revoke(self.federation.state, client)

    def rotate_keys(self) -> str:
        """Give the server new keys, signed by the old ones; return their fingerprint."""
        from fedcli.server.enrol import rotate

        return rotate(self.federation.state)

    def discard(self, client: int) -> bool:
        """Set a client's update of the open round aside, so that it may send another; return whether there was one."""
        from fedcli.server.aggregate import discard

        return discard(self.federation.state, client)


@dataclass(frozen=True)
class Slurm:
    """A federation as jobs of SLURM."""

    federation: Federation

    def submit(self, *, dry_run: bool = False) -> "Submission":
        """Send the jobs that the open round needs and the queue does not hold."""
        from fedcli.operations.slurm_submit import submit

        return submit(self.federation.state, dry_run=dry_run)

    def write_scripts(self) -> "dict[JobKind, Path]":
        """Write the batch scripts of the open round, and send nothing."""
        from fedcli.operations.slurm_submit import write_scripts

        return write_scripts(self.federation.state)
