"""Where things lie in a workspace, and how one is found."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fedcli.errors import WorkspaceError

if TYPE_CHECKING:
    from fedcli.workspace.store import Store

CONFIG_NAME = "fedcli.yaml"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_NAME = f"adapter/{ADAPTER_FILE}"
ADAPTER_CONFIG_NAME = f"adapter/{ADAPTER_CONFIG_FILE}"
UPDATE_RECORD = "update.json"
MANIFEST = "manifest.json"
PRUNED = "PRUNED.json"
WORKSPACE_ID = "^[a-z0-9-]{1,64}$"
"""What a workspace's id may be: a part of the path of parties' homes, and never a path itself."""


@dataclass(frozen=True)
class Workspace:
    """The paths of one workspace; constructing it touches nothing on disk."""

    root: Path
    given_store: "Store | None" = None
    """Where the protocol's files lie, if not in the directory itself."""

    @cached_property
    def store(self) -> "Store":
        """Where the protocol's files lie: rounds, updates, registrations, scores, and what refers to them."""
        from fedcli.workspace.store import DirectoryStore

        return self.given_store or DirectoryStore(self.root)

    def name(self, path: Path) -> str:
        """Return a path's name in the store."""
        return path.relative_to(self.root).as_posix()

    @property
    def config(self) -> Path:
        """The experiment, fedcli.yaml."""
        return self.root / CONFIG_NAME

    @property
    def identity(self) -> Path:
        """The workspace's id and protocol version."""
        return self.root / "workspace.json"

    @property
    def readme(self) -> Path:
        """What tells a visitor what this folder is."""
        return self.root / "README.md"

    @property
    def server_lock(self) -> Path:
        """The lock that one aggregating process holds."""
        return self.root / "server.lock"

    @property
    def rounds(self) -> Path:
        """The published rounds."""
        return self.root / "rounds"

    @property
    def inbox(self) -> Path:
        """The updates of all clients."""
        return self.root / "inbox"

    @property
    def data(self) -> Path:
        """A simulation's rows."""
        return self.root / "data"

    @property
    def baselines(self) -> Path:
        """Adapters of the baselines."""
        return self.root / "baselines"

    def round(self, number: int) -> Path:
        """The directory of a round."""
        return self.rounds / round_name(number)

    def client_inbox(self, client: int) -> Path:
        """The directory that a client drops its updates in."""
        return self.inbox / str(client)

    def adapter(self, number: int) -> Path:
        """The folder of a round's adapter, in PEFT's layout."""
        return (self.round(number) / ADAPTER_NAME).parent

    def update(self, number: int, client: int) -> Path:
        """The directory of a client's update of a round."""
        return self.client_inbox(client) / update_name(number)

    def has_update(self, number: int, client: int) -> bool:
        """Return whether something lies where a client's update of a round belongs."""
        return self.store.exists(self.name(self.update(number, client)))

    @property
    def clients(self) -> Path:
        """The registry: what joined parties say of their rows."""
        return self.root / "clients"

    def registration(self, client: int) -> Path:
        """A joined party's entry in the registry."""
        return self.clients / f"{client}.json"

    def private(self, client: int) -> "Home":
        """A simulated client's private state."""
        return Home(self.root / "private" / str(client))

    @property
    def pooled_home(self) -> "Home":
        """The private state of the baseline of all clients' rows."""
        return Home(self.root / "private" / "pooled")

    def client_rows(self, client: int) -> Path:
        """A simulated client's rows."""
        return self.data / f"client-{client}.jsonl"

    @property
    def data_card(self) -> Path:
        """What a simulation's split gave to each client."""
        return self.data / "card.json"

    def held_out_rows(self, split: str) -> Path:
        """The demo's held-out rows."""
        return self.data / f"held-out-{split}.jsonl"

    def baseline(self, name: str) -> Path:
        """The directory of a baseline, such as `alone-3`."""
        return self.baselines / name

    @property
    def eval(self) -> Path:
        """The scores of all targets, and the tables made of them."""
        return self.root / "eval"

    @property
    def report(self) -> Path:
        """The page that shows the federation, and its pictures."""
        return self.root / "report"

    def scores(self, target: str, benchmark: str) -> Path:
        """The scores of a target, such as `round-00010` or `base`, on a benchmark; its items lie beside as .jsonl."""
        return self.eval / target / f"{benchmark}.json"

    def answers(self, target: str, benchmark: str) -> Path:
        """All that a target ever answered to a benchmark's questions, by the hash of what was asked."""
        return self.eval / target / f"{benchmark}.answers.jsonl"

    def judgments(self, target: str, benchmark: str) -> Path:
        """All that judges ever said of a target's answers, by the hash of what they were asked."""
        return self.eval / target / f"{benchmark}.judgments.jsonl"

    def eval_lock(self, target: str, benchmark: str) -> Path:
        """The lock that one process scoring a target on a benchmark holds."""
        return self.eval / target / f".{benchmark}.lock"

    @property
    def crontab(self) -> Path:
        """Lines for a party's and a server's cron."""
        return self.root / "cron" / "crontab"

    @property
    def slurm_readme(self) -> Path:
        """What tells a visitor what the records of jobs are, and how to have some."""
        return self.root / "slurm" / "README.md"

    @property
    def slurm_lock(self) -> Path:
        """The lock that one process sending jobs holds."""
        return self.root / "slurm" / "lock"

    def jobs(self, number: int) -> Path:
        """The record of the jobs that were sent for a round."""
        return self.root / "slurm" / update_name(number) / "jobs.json"

    def job_script(self, number: int, kind: str) -> Path:
        """The batch script of a kind of a round's jobs."""
        return self.jobs(number).with_name(f"{kind}.sh")

    def job_logs(self, number: int) -> Path:
        """The folder of what a round's jobs print."""
        return self.root / "logs" / update_name(number)


@dataclass(frozen=True)
class Home:
    """The paths of one client's private state: a simulated one's lies in the workspace, a joined party's never does."""

    folder: Path

    @property
    def party(self) -> Path:
        """Where a joined party's rows and base model lie."""
        return self.folder / "party.json"

    @property
    def lock(self) -> Path:
        """The lock that one process training the client holds."""
        return self.folder / "lock"

    def candidate(self, kind: str, round_number: int, update: str) -> Path:
        """The state that the client will have once its update (the hash of update.json) is counted."""
        return self.folder / kind / f"{update_name(round_number)}-{update}.safetensors"

    def reference(self, key: str) -> Path:
        """A cache of the reference model's log-probabilities."""
        return self.folder / f"reference-{key}.safetensors"

    def tokens(self, key: str) -> Path:
        """A cache of the client's rows as token ids."""
        return self.folder / f"tokens-{key}.safetensors"

    @property
    def baseline_lock(self) -> Path:
        """The lock that one process training the client's baseline holds."""
        return self.folder / "baseline.lock"

    @property
    def baseline_progress(self) -> Path:
        """An unfinished baseline."""
        return self.folder / "baseline.safetensors"


def default_home(workspace_id: str, client: int) -> Home:
    """Return a joined party's home where it names none: below $XDG_DATA_HOME, or ~/.local/share."""
    base = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    if base.startswith("~"):
        raise WorkspaceError(
            "this user has no home directory to keep private state in", hint="Name a folder: --home DIR."
        )
    return Home(Path(base).absolute() / "fedcli" / workspace_id / str(client))


def round_name(number: int) -> str:
    """The name of a round's directory under rounds/."""
    return f"{number:05d}"


def is_round_name(name: str) -> bool:
    """Return whether a directory under rounds/ is named as a round."""
    return name.isascii() and name.isdigit() and name == round_name(int(name))


def update_name(number: int) -> str:
    """The name of an update's directory under inbox/<id>/."""
    return f"round-{number:05d}"


def check_outside(workspace: Workspace, output: Path) -> None:
    """Raise WorkspaceError for a place in a folder that the workspace keeps for itself."""
    kept = (
        *(workspace.rounds, workspace.inbox, workspace.clients, workspace.eval, workspace.data, workspace.baselines),
        *(workspace.root / "private", workspace.slurm_lock.parent),
    )
    for folder in kept:
        if output.resolve().is_relative_to(folder.resolve()):
            raise WorkspaceError(
                f"{output} lies in {folder.name}/ of the workspace, where nothing else belongs",
                hint="Name another folder.",
            )


def find_workspace(given: Path | None, *, start: Path | None = None) -> Workspace:
    """Return the workspace that `given`, $FEDCLI_WORKSPACE or the nearest parent with a fedcli.yaml names."""
    named = given or (Path(value) if (value := os.environ.get("FEDCLI_WORKSPACE")) else None)
    if named is not None:
        if not (named / CONFIG_NAME).is_file():
            raise WorkspaceError(
                f"{named.absolute()} is not a workspace: it holds no {CONFIG_NAME}",
                hint=f"Create one with `fedcli init {named}`.",
            )
        return Workspace(named.absolute())
    here = (start or Path.cwd()).absolute()
    for folder in (here, *here.parents):
        if (folder / CONFIG_NAME).is_file():
            return Workspace(folder)
    raise WorkspaceError(
        f"no workspace here: neither {here} nor a folder above it holds a {CONFIG_NAME}",
        hint="Create one with `fedcli init`, or name one with --workspace DIR.",
    )
