"""The Python API: a federation in a workspace, its clients, its server and its scores (docs/PYTHON.md)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedcli.observer import Observer
from fedcli.workspace.layout import Workspace, find_workspace

if TYPE_CHECKING:
    from fedcli.client.due import ClientResult
    from fedcli.client.runtimes import Runtimes
    from fedcli.operations.baseline import BaselineResult
    from fedcli.operations.doctor import Finding
    from fedcli.operations.export import Exported
    from fedcli.operations.gc import Collection
    from fedcli.operations.preview import Preview
    from fedcli.operations.report import WrittenReport
    from fedcli.operations.run import FederationResult
    from fedcli.operations.slurm_submit import Submission
    from fedcli.operations.status import Status
    from fedcli.parties.join import Joining
    from fedcli.parties.simulate import DataSummary
    from fedcli.scoring.after_rounds import RoundScores
    from fedcli.scoring.request import Scoring
    from fedcli.scoring.table import ScoreTable
    from fedcli.server.aggregate import AggregationResult
    from fedcli.server.create import Creation
    from fedcli.server.verify import Verification
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

    def __init__(self, workspace: Workspace, *, threads: int | None = None) -> None:
        self.workspace = workspace
        self.threads = threads
        self._identity: bytes | None = None

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
        overrides = [f"{key}={json.dumps(value)}" for key, value in (settings or {}).items()]
        return cls(create(path, preset=preset, overrides=overrides, observer=observer).federation.workspace)

    @classmethod
    def open(cls, path: Path | str | None = None, *, threads: int | None = None) -> "Federation":
        """Open the workspace in a folder; for None the one that $FEDCLI_WORKSPACE or the current folder names.

        `threads` are the CPU threads of its training; None: $OMP_NUM_THREADS, else all cores.

        Raises WorkspaceError where there is none, or where it is not initialised, ConfigError for a fault in its
        fedcli.yaml.
        """
        found = cls(find_workspace(None if path is None else Path(path)), threads=threads)
        assert found.state
        return found

    @cached_property
    def _opened(self) -> "FederationState":
        from fedcli.workspace.federation_state import FederationState

        return FederationState.open(self.workspace, self._identity)

    def glance(self) -> "Glance | None":
        """Look whether any client may have something to do here, loading next to nothing; None: not sure."""
        from fedcli.workspace.idle import glance

        seen = glance(self.workspace)
        self._identity = seen.identity if seen is not None else None
        return seen

    @property
    def state(self) -> "FederationState":
        """Its configuration, identity and latest round, as they are on disk now."""
        if "_opened" in self.__dict__:
            self._opened.refresh()
        return self._opened

    @cached_property
    def runtimes(self) -> "Runtimes":
        """The models that are loaded, which stay so for the next call."""
        from fedcli.client.runtimes import Runtimes

        return Runtimes(self.state, threads=self.threads)

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

        Raises UsageError for an id that no client has.
        """
        self.state.check_clients([client])
        return Client(self, client, None if home is None else Path(home))

    def round(self, number: "int | Literal['latest']" = "latest") -> "Round":
        """Return a round: its manifest, and `adapter()`, named float32 arrays. Raises NotReadyError for a later one."""
        return self.state.round(number)

    def run(
        self,
        *,
        rounds: int | None = None,
        workers: int = 1,
        observer: Observer = SILENT,
    ) -> "FederationResult":
        """Train and merge until the last round, or for `rounds` rounds, with so many clients at once."""
        from fedcli.operations.run import run_federation

        return run_federation(
            self.state,
            runtimes=self.runtimes,
            rounds=rounds,
            workers=workers,
            threads=self.threads,
            observer=observer,
        )

    def train_clients(
        self,
        clients: Sequence[int] | None = None,
        *,
        wait: float = 0.0,
        observer: Observer = SILENT,
    ) -> "list[ClientResult]":
        """Do what is due for several clients; for None all that are here and that nobody else trains."""
        from fedcli.client.due import train_clients

        return train_clients(self.state, clients, self.runtimes, wait=wait, observer=observer)

    def train_pooled(self, *, observer: Observer = SILENT) -> "BaselineResult":
        """Train the baseline of all clients' rows together; only a simulation has them."""
        from fedcli.operations.baseline import train_baseline

        return train_baseline(self.state, None, threads=self.threads, observer=observer)

    def status(self) -> "Status":
        """Return the open round, who has answered it, and how the round before it was merged."""
        from fedcli.operations.status import read_status

        return read_status(self.state)

    def evaluate(self, request: "Scoring", *, observer: Observer = SILENT) -> "list[ScoreRecord]":
        """Score models on benchmarks and keep the scores; what was answered before is not asked again."""
        from fedcli.scoring.request import prepare

        return prepare(self.state, request, self.runtimes).run(observer)

    def scores(
        self, *names: str, group: str | None = None, against: str = "base", details: bool = False
    ) -> "ScoreTable":
        """Return the scores on benchmarks, or on all of them, side by side.

        Raises NotReadyError where there are none.
        """
        from fedcli.scoring.table import make_table

        return make_table(self.workspace, names=names, group=group, against=against, details=details)

    def best_rounds(self, metric: str) -> "list[tuple[int, ScoreEntry]]":
        """Return the rounds' scores in BENCHMARK or BENCHMARK.METRIC, the best first."""
        from fedcli.scoring.table import best_rounds

        return best_rounds(self.workspace, metric)

    def verify(self, *, observer: Observer = SILENT) -> "Verification":
        """Check every round and counted update; what is wrong is collected, not raised."""
        from fedcli.server.verify import verify

        return verify(self.workspace, observer=observer)

    def report(
        self, *, output: Path | None = None, tensorboard: Path | None = None, observer: Observer = SILENT
    ) -> "WrittenReport":
        """Write a page that shows the federation, and its pictures."""
        from fedcli.operations.report import write_report

        return write_report(self.state, output=output, tensorboard=tensorboard, observer=observer)

    def export(
        self,
        output: Path,
        *,
        round: str = "latest",
        best: str | None = None,
        merge: bool = False,
        dtype: str | None = None,
        max_shard_size: str | None = None,
    ) -> "Exported":
        """Write a round's adapter with a model card into a new folder, or merged into the base model."""
        from fedcli.operations.export import export

        return export(
            self.state, output, number=round, best=best, merge=merge, dtype=dtype, max_shard_size=max_shard_size
        )

    def gc(self, *, dry_run: bool = False) -> "Collection | None":
        """Remove the weights of old rounds, as fedcli.yaml's `retention` says; None where it says nothing."""
        from fedcli.operations.gc import collect

        return collect(self.state, dry_run=dry_run)

    def preview(
        self,
        *,
        client: int | None = None,
        home: Path | None = None,
        by: str | None = None,
        num_rows: int = 2,
        output: Path | None = None,
        observer: Observer = SILENT,
    ) -> "Preview":
        """Look at rows as they are trained on, and draw the clients' shares; round 0 need not be open."""
        from fedcli.operations.preview import preview

        return preview(
            self.workspace, client=client, home=home, by=by, num_rows=num_rows, output=output, observer=observer
        )

    def partition(self, *, replace: bool = False, observer: Observer = SILENT) -> "DataSummary":
        """Split data.source among the simulated clients; round 0 need not be open."""
        from fedcli.parties.simulate import partition_data

        return partition_data(self.workspace, replace=replace, observer=observer)


class Client:
    """One client of a federation."""

    def __init__(self, federation: Federation, client: int, home: Path | None) -> None:
        self._federation = federation
        self.id = client
        self._home = home

    def join(
        self,
        data: str,
        *,
        format: str | None = None,
        subset: str | None = None,
        split: str | None = None,
        base: str | None = None,
        trust_remote_code: bool = False,
        share: Literal["full", "minimal"] = "full",
        observer: Observer = SILENT,
    ) -> "Joining":
        """Read a party's rows, which stay where they are; `commit()` of what is returned writes the registration."""
        from fedcli.parties.join import prepare_join

        return prepare_join(
            self._federation.state,
            self.id,
            data,
            data_format=format,
            subset=subset,
            split=split,
            home=self._home,
            base=base,
            trust_remote_code=trust_remote_code,
            share=share,
            observer=observer,
        )

    def status(self) -> "ClientResult":
        """Return how the client stands in the open round."""
        from fedcli.client.due import client_status

        return client_status(self._federation.state, self.id)

    def train(self, *, wait: float = 0.0, observer: Observer = SILENT) -> "ClientResult":
        """Train on the open round and drop the update; that nothing is due is a result, no error."""
        from fedcli.client.due import train_client

        federation = self._federation
        return train_client(
            federation.state, self.id, federation.runtimes, home=self._home, wait=wait, observer=observer
        )

    def train_alone(self, *, observer: Observer = SILENT) -> "BaselineResult":
        """Train the baseline of this client alone."""
        from fedcli.operations.baseline import train_baseline

        federation = self._federation
        return train_baseline(federation.state, self.id, home=self._home, threads=federation.threads, observer=observer)


class Server:
    """The server of a federation."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation

    def open(self) -> "Round":
        """Open round 0 unless it is open, and return the latest round."""
        from fedcli.server.create import open_round

        return open_round(self._federation.workspace).head

    def aggregate(
        self,
        *,
        algorithm: str | None = None,
        partial: bool = False,
        dry_run: bool = False,
        wait: float = 0.0,
        observer: Observer = SILENT,
    ) -> "AggregationResult":
        """Merge the open round's updates and publish the next round; raise NotReadyError while too few are there."""
        from fedcli.server.aggregate import aggregate

        return aggregate(
            self._federation.state,
            algorithm=algorithm,
            partial=partial,
            dry_run=dry_run,
            wait=wait,
            observer=observer,
        )

    def run(self, *, observer: Observer = SILENT) -> "Round":
        """Merge every round as soon as it is ready, until the last, and return that; clients train elsewhere."""
        from fedcli.server.aggregate import aggregate_all

        self.note_scores()
        return aggregate_all(self._federation.state, on_round=self.note_scores, observer=observer)

    def note_scores(self) -> None:
        """Note what the latest round is to be scored on, as fedcli.yaml's eval.every asks; `score` makes the scores."""
        from fedcli.scoring.after_rounds import note_due

        note_due(self._federation.state)

    def score(self) -> "Iterator[RoundScores]":
        """Make the scores that are due, and yield each round's; what fails is kept, and left to a person."""
        from fedcli.scoring.after_rounds import score_due

        return score_due(self._federation.state, self._federation.runtimes)

    def discard(self, client: int) -> bool:
        """Set a client's update of the open round aside, so that it may send another; return whether there was one."""
        from fedcli.server.aggregate import discard

        return discard(self._federation.state, client)


class Slurm:
    """A federation as jobs of SLURM."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation

    def submit(self, *, dry_run: bool = False) -> "Submission":
        """Send the jobs that the open round needs and the queue does not hold."""
        from fedcli.operations.slurm_submit import submit

        return submit(self._federation.state, dry_run=dry_run)

    def write_scripts(self) -> "dict[JobKind, Path]":
        """Write the batch scripts of the open round, and send nothing."""
        from fedcli.operations.slurm_submit import write_scripts

        return write_scripts(self._federation.state)


def create(
    path: Path | str = ".",
    *,
    preset: str | None = None,
    overrides: Sequence[str] = (),
    observer: Observer = SILENT,
) -> "Creation":
    """Make a workspace as `fedcli init` does; `overrides` are key.path=value, values in YAML."""
    from fedcli.server.create import create_workspace

    return create_workspace(Path(path), preset=preset, overrides=overrides, observer=observer)


def doctor(workspace: Workspace | None, *, observer: Observer = SILENT) -> "list[Finding]":
    """Check this machine, and whether a workspace's experiment can run on it."""
    from fedcli.operations.doctor import examine

    return examine(workspace, observer=observer)
