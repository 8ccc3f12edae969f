"""A workspace as its commands see it: fedcli.yaml, and once it is initialised its identity and latest round."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self, get_args

from fedcli.config import Config, TrainConfig, parse_config, read_document
from fedcli.errors import ConfigError, NotReadyError, UsageError, WorkspaceError
from fedcli.tasks import TASKS
from fedcli.tasks.task import Hyperparameter
from fedcli.workspace.history import Round, is_initialised, read_head, read_identity, read_past, read_round, read_start
from fedcli.workspace.layout import CONFIG_NAME, Workspace
from fedcli.workspace.records import Identity
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.registrations import Registration, any_registered, joined_clients
from fedcli.workspace.train_records import PersonalRecord, Schedule, TrainRecord

MAX_CONFIG_BYTES = 2**20
POLL_SECONDS = 0.5
"""How long to wait between two looks at the disk."""
REMOTE_POLL_SECONDS = 10.0
"""The same for a workspace elsewhere, where each look costs two requests."""


@dataclass
class Experiment:
    """A workspace and its fedcli.yaml; the workspace need not be initialised."""

    workspace: Workspace
    config: Config
    identity: Identity | None
    """What workspace.json says; None where the workspace is not initialised."""

    @classmethod
    def read(cls, workspace: Workspace) -> "Experiment":
        """Read and validate fedcli.yaml; raise ConfigError, or WorkspaceError where it cannot be read.

        Where the workspace is initialised, what `init` fixed must still be the same.
        """
        identity = read_identity(workspace) if is_initialised(workspace) else None
        return Experiment(workspace, _checked_config(workspace, identity), identity)

    def check_clients(self, clients: Iterable[int]) -> None:
        """Raise UsageError for an id that no client has."""
        num_clients = self.config.federation.clients
        for client in clients:
            if not 0 <= client < num_clients:
                raise UsageError(
                    f"there is no client {client}",
                    hint=f"This federation has {num_clients} clients, ids 0 to {num_clients - 1}.",
                )


@dataclass
class FederationState(Experiment):
    """An initialised workspace: fedcli.yaml, workspace.json and the latest manifest, each read once.

    `refresh` brings it up to date.
    """

    identity: Identity
    head: Round
    _config_version: object

    @classmethod
    def open(cls, workspace: Workspace, identity_contents: bytes | None = None) -> Self:
        """Read a workspace; `identity_contents` are those of workspace.json, where it has been read.

        Raises WorkspaceError where it is not initialised, ConfigError for a fault in fedcli.yaml or a change of what
        `init` fixed, NotReadyError where round 0 is not open, IntegrityError where something is damaged.
        """
        identity, version = read_identity(workspace, identity_contents), workspace.store.version(CONFIG_NAME)
        config = _checked_config(workspace, identity)
        return cls(workspace, config, identity, read_head(workspace, identity), version)

    def refresh(self) -> bool:
        """Read fedcli.yaml where it has changed, and the latest round; return whether that is another round."""
        if (version := self.workspace.store.version(CONFIG_NAME)) != self._config_version:
            self.config, self._config_version = _checked_config(self.workspace, self.identity), version
        before = self.head
        self.head = read_head(self.workspace, self.identity, known=before)
        return self.head is not before

    @property
    def poll_seconds(self) -> float:
        """How long to wait between two looks at the workspace."""
        return REMOTE_POLL_SECONDS if self.workspace.store.is_remote else POLL_SECONDS

    @property
    def start(self) -> Round:
        """Round 0."""
        return self.head if self.head.number == 0 else read_start(self.workspace)

    @property
    def is_simulation(self) -> bool:
        """Whether its clients are simulated; where workspace.json does not say, as in early ones, nobody has joined."""
        said = self.identity.simulation
        return not any_registered(self.workspace) if said is None else said

    def joined(self) -> dict[int, Registration]:
        """Return the parties that have joined, by id; a simulation has none, whatever lies in clients/."""
        return {} if self.identity.simulation else joined_clients(self.workspace, self.config.federation.clients)

    def past(self) -> list[Round]:
        """Return all rounds before the latest; raise IntegrityError where one is missing.

        Each names the hash of the one before, so that of a workspace elsewhere copies on this machine will do.
        """
        found, following = [], self.head
        while following.number:
            following = read_past(self.workspace, following.number - 1, digest=following.manifest.parent)
            found.append(following)
        return found[::-1]

    def round(self, name: int | str) -> Round:
        """Return a round by its number, or "latest"; with `:J` behind it cluster J's adapter is meant, or group J's.

        Raises UsageError for what is neither, and for a cluster that there is not, NotReadyError for a round that is
        not there yet.
        """
        text, _, cluster = str(name).partition(":")
        found = self.head if text == "latest" else self._numbered(text)
        if not cluster:
            return found
        groups = () if (clusters := found.manifest.clusters) is None else clusters.names or ()
        if cluster in groups:
            return found.of_cluster(groups.index(cluster))
        if not (cluster.isascii() and cluster.isdigit() and int(cluster[:20]) < found.manifest.num_clusters):
            named = f", or by their names: {', '.join(groups)}" if groups else ""
            raise UsageError(
                f"--round {str(name)[:80]}: round {found.number} has {found.manifest.num_clusters} adapters",
                hint=f"They are counted from 0{named}. Name one as in --round latest:{groups[-1] if groups else 1}.",
            )
        return found.of_cluster(int(cluster))

    def _numbered(self, text: str) -> Round:
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise UsageError(f"--round {text[:80]}: no such round", hint="Give a round's number, or latest.")
        found = self.head if int(text) == self.head.number else read_round(self.workspace, int(text))
        if found is None:
            raise NotReadyError(
                f"there is no round {text} yet: the latest is {self.head.number}",
                hint="`fedcli status` shows how far it is.",
            )
        return found


def read_config(workspace: Workspace) -> Config:
    """Read and validate fedcli.yaml; raise ConfigError, or WorkspaceError where it cannot be read."""
    return parse_config(read_document(config_text(workspace), workspace.config), workspace.config)


def config_text(workspace: Workspace) -> str:
    """Return the text of fedcli.yaml; raise WorkspaceError where it cannot be read."""
    try:
        return workspace.store.read(CONFIG_NAME, MAX_CONFIG_BYTES).decode()
    except (OSError, UnicodeDecodeError, Refusal) as error:
        raise WorkspaceError(
            f"cannot read {workspace.config}: {error}", hint="Mend the file or its permissions."
        ) from error


def train_record(config: Config, number: int, rounds: int, *, date: str | None = None) -> TrainRecord:
    """Return what a client must obey in a round, as fedcli.yaml has it now; `date` is the federation's."""
    train = config.train
    shared = (TrainConfig.model_fields.keys() & TrainRecord.model_fields.keys()) - {*get_args(Hyperparameter)}
    schedule = Schedule(learning_rate=train.learning_rate, learning_rate_min=train.learning_rate_min, rounds=rounds)
    own = {
        "steps": train.most_steps,
        "minutes": train.minutes,
        "epochs": train.epochs,
        "keep_optimizer": True if train.keep_optimizer else None,
        "learning_rate": train.learning_rate_of(number, rounds),
        "schedule": schedule,
        "template": config.data.template,
        "date": date,
        "personal": _personal_record(train),
        "select": config.data.select,
        "seed": config.federation.seed,
    }
    hyperparameters: dict[str, Any] = dict(TASKS[config.task].hyperparameters_of(train).items())
    return TrainRecord(**{name: getattr(train, name) for name in shared} | own | hyperparameters)


def _personal_record(train: TrainConfig) -> PersonalRecord | None:
    if (found := train.personal) is None:
        return None
    if found.name == "ditto":
        return PersonalRecord(name=found.name, pull=found.pull)
    return PersonalRecord(name=found.name, weight=found.weight)


def _checked_config(workspace: Workspace, identity: Identity | None) -> Config:
    """Read fedcli.yaml, in which what `init` fixed must still be the same."""
    config = read_config(workspace)
    if identity is not None and (changed := _differences("", identity.fixed, config.fixed())):
        raise ConfigError(
            f"{workspace.config} changes what was fixed by `fedcli init`:\n  " + "\n  ".join(changed),
            hint="Set these keys back, or start another workspace with `fedcli init DIR`.",
        )
    wanted, fixed = config.federation.signatures, "off" if identity is None else identity.signatures or "off"
    if identity is not None and wanted not in (None, fixed):
        raise ConfigError(
            f"{workspace.config} sets federation.signatures to {wanted}: `fedcli init` fixed them as {fixed}",
            hint="Set it back to null, or start another workspace with `fedcli init DIR`.",
        )
    return config


def _differences(prefix: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    lines = []
    for key in sorted(before):  # a key that a later version adds has changed nothing
        old, new = before.get(key), now.get(key)
        if f"{prefix}{key}" == "adapter.target_modules" and new is None:
            continue  # it leaves them to round 0, which has them; earlier versions had names of layers as the default
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences(f"{prefix}{key}.", old, new)
        elif old != new:
            lines.append(f"{prefix}{key}: was {old!r}, is now {new!r}")
    return lines
