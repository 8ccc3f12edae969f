"""Where things lie in a workspace, and how one is found."""

import os
import re
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from fedcli.errors import WorkspaceError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fedcli.workspace.store import Store

CONFIG_NAME = "fedcli.yaml"
IDENTITY_NAME = "workspace.json"
STUDY_NAME = "study.yaml"
"""What tells a study's folder, whose cells are workspaces."""
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_NAME = f"adapter/{ADAPTER_FILE}"
DELTA_NAME = "adapter/delta.safetensors"
"""What a round's adapter adds to the one before, encoded."""
ADAPTER_CONFIG_NAME = f"adapter/{ADAPTER_CONFIG_FILE}"
CLUSTER_NAME = "adapter/cluster-{}.safetensors"
"""The adapter of a cluster behind the first, whose own is ADAPTER_NAME."""
BASE_DELTA_NAME = f"base_delta/{ADAPTER_FILE}"
BASE_DELTA_CONFIG_NAME = f"base_delta/{ADAPTER_CONFIG_FILE}"
UPDATE_RECORD = "update.json"
UPDATE_SIGNATURE = "update.sig"
MASKED_FILE = "masked.safetensors"
SHARES_FILE = "shares.json"
"""Of masked updates; what is shared is there with `double` alone."""
MANIFEST = "manifest.json"
MANIFEST_SIGNATURE = "manifest.sig"
PRUNED = "PRUNED.json"
ATTEMPT = 0
"""Of a round's secure aggregation: names and labels tell attempts apart, and there is one (docs/PROTOCOL.md)."""
WORKSPACE_ID = "^[a-z0-9-]{1,64}$"
"""What a workspace's id may be: a part of the path of parties' homes, and never a path itself."""


def adapter_name(cluster: int) -> str:
    """Return the file of a round that holds the adapter of a cluster; 0 where there are none."""
    return CLUSTER_NAME.format(cluster) if cluster else ADAPTER_NAME


class Workspace:
    """The paths of one workspace; constructing it touches nothing on disk."""

    def __init__(self, root: Path, store: "Store | None" = None, address: str | None = None) -> None:
        self.root = root
        self.address = address or str(root)
        """What names it to users: its folder, or the URL of one elsewhere, of which `root` is this machine's part."""
        self._given_store = store
        self.config = root / CONFIG_NAME
        self.identity = root / IDENTITY_NAME
        self.server_lock = root / "server.lock"
        self.rounds = root / "rounds"
        self.inbox = root / "inbox"
        self.clients = root / "clients"  # what joined parties say of their rows
        self.enrolment = root / "enrolment"  # who takes part, under which keys
        self.attempts = root / "attempts"  # who takes part in a round of secure aggregation, under which keys
        self.repair = root / "repair"  # whose sum of a round may be revealed
        self.data = root / "data"  # a simulation's rows
        self.data_card = self.data / "card.json"  # what a split gave to each client
        self.baselines = root / "baselines"
        self.eval = root / "eval"  # the scores of all targets, and the tables made of them
        self.report = root / "report"
        self.pooled_home = Home(root / "private" / "pooled")  # of the baseline of all clients' rows
        self.slurm_lock = root / "slurm" / "lock"  # held by the process that sends jobs

    @cached_property
    def store(self) -> "Store":
        """Where the protocol's files lie: rounds, updates, registrations, scores, and what refers to them."""
        from fedcli.workspace.store import DirectoryStore

        return self._given_store or DirectoryStore(self.root)

    @property
    def title(self) -> str:
        """The last part of its address."""
        return self.address.rstrip("/").rpartition("/")[2] or self.address

    def uncached(self) -> "Workspace":
        """Return the same workspace, of which nothing is read from a copy on this machine."""
        return Workspace(self.root, self.store.uncached(), self.address)

    def name(self, path: Path) -> str:
        """Return a path's name in the store."""
        return path.relative_to(self.root).as_posix()

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
        """Return whether something lies where a client's update belongs that the server did not discard."""
        return self.store.exists(self.name(self.update(number, client))) and not self.is_discarded(number, client)

    def sent_updates(self, number: int, clients: "Iterable[int]") -> set[int]:
        """Return those of some clients for which `has_update` holds."""
        names = {client: self.name(self.update(number, client)) for client in clients}
        found = self.store.existing([*names.values()])
        return {client for client, name in names.items() if name in found and not self.is_discarded(number, client)}

    def discarded(self, number: int, client: int) -> Path:
        """The server's note that it discarded an update that lies in the inbox of another user."""
        return self.root / "discarded" / str(client) / f"{update_name(number)}.json"

    def is_discarded(self, number: int, client: int) -> bool:
        """Return whether the server discarded what lies where a client's update belongs; not what came there later."""
        if self.store.is_remote:  # where nobody owns anything, it sets it aside
            return False
        note = self.name(self.discarded(number, client))
        if not self.store.exists(note):
            return False
        import json

        from fedcli.workspace.refusal import Refusal

        try:
            noted = json.loads(self.store.read(note, 4096))["modified"]
            return bool(noted == self.store.modified(self.name(self.update(number, client))))
        except (OSError, ValueError, KeyError, TypeError, Refusal):
            return False

    def has_round(self, number: int) -> bool:
        """Return whether a round is open, or was."""
        return self.store.exists(self.name(self.round(number) / MANIFEST))

    def registration(self, client: int) -> Path:
        """A joined party's entry in the registry."""
        return self.clients / f"{client}.json"

    def has_joined(self, client: int) -> bool:
        """Return whether a party has joined as a client."""
        return self.store.exists(self.name(self.registration(client)))

    def registration_signature(self, client: int) -> Path:
        """The signatures of a joined party's entry in the registry."""
        return self.clients / f"{client}.sig"

    def leaving(self, client: int) -> Path:
        """A party's signed word that it leaves."""
        return self.clients / f"{client}.leave"

    def acknowledgement(self, client: int, number: int) -> Path:
        """A party's countersignature of a round that it trained on."""
        return self.clients / f"{client}.acks" / f"{update_name(number)}.sig"

    def attempt(self, number: int) -> Path:
        """The record of who takes part in a round of secure aggregation; its signature has the suffix .sig."""
        return self.attempts / f"{attempt_name(number)}.json"

    def repair_of(self, number: int) -> Path:
        """The record of whose updates of a round are summed; its signature has the suffix .sig."""
        return self.repair / f"{attempt_name(number)}.json"

    def repair_shares(self, number: int, digest: str) -> Path:
        """The sealed shares of a repair, for the clients that open them: the repair names their hash."""
        return self.repair / f"{attempt_name(number)}-shares-{digest}.json"

    def answer(self, number: int, client: int) -> Path:
        """The directory of a client's answer to a repair."""
        return self.client_inbox(client) / f"repair-{attempt_name(number).removeprefix('round-')}"

    def private(self, client: int) -> "Home":
        """A simulated client's private state."""
        return Home(self.root / "private" / str(client))

    def client_rows(self, client: int) -> Path:
        """A simulated client's rows."""
        return self.data / f"client-{client}.jsonl"

    def held_out_rows(self, split: str) -> Path:
        """The demo's held-out rows."""
        return self.data / f"held-out-{split}.jsonl"

    def baseline(self, name: str) -> Path:
        """The directory of a baseline, such as `alone-3`."""
        return self.baselines / name

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

    def jobs(self, number: int) -> Path:
        """The record of the jobs that were sent for a round."""
        return self.root / "slurm" / update_name(number) / "jobs.json"

    def job_logs(self, number: int) -> Path:
        """The folder of what a round's jobs print."""
        return self.root / "logs" / update_name(number)


class Home:
    """The paths of one client's private state: a simulated one's lies in the workspace, a joined party's never does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.party = folder / "party.json"  # where a joined party's rows and base model lie
        self.keys = folder / "keys.pem"  # its own, to sign and to seal with
        self.next_keys = folder / "keys-next.pem"  # that take their place once the enrolment names them
        self.history = folder / "history.jsonl"  # what it did, and what came of it
        self.steps = folder / "steps.jsonl"  # every private step that was made, whatever came of its update
        self.noise = folder / "noise"  # the server's: keys of the noise that rounds were merged with
        self.lock = folder / "lock"  # held by the process that trains the client
        self.baseline_lock = folder / "baseline.lock"
        self.baseline_progress = folder / "baseline.safetensors"
        self.canaries = folder / "canaries.json"  # what its audit has planted among its rows
        self.audits = folder / "audits"  # what its audits have measured

    def candidate(self, kind: str, round_number: int, update: str) -> Path:
        """The state that the client will have once its update (the hash of update.json) is counted."""
        return self.folder / kind / f"{update_name(round_number)}-{update}.safetensors"

    def masked(self, round_number: int) -> Path:
        """What the client did in a round of secure aggregation, and must not do again."""
        return self.folder / "secure" / f"{update_name(round_number)}.json"

    def values(self, round_number: int) -> Path:
        """The numbers that the client masks in a round of secure aggregation."""
        return self.masked(round_number).with_suffix(".numbers")

    def reference(self, key: str) -> Path:
        """A cache of the reference model's log-probabilities."""
        return self.folder / f"reference-{key}.safetensors"

    def losses(self, key: str) -> Path:
        """A cache of the losses that rows are scored by."""
        return self.folder / f"losses-{key}.safetensors"

    def tokens(self, key: str) -> Path:
        """A cache of the client's rows as token ids."""
        return self.folder / f"tokens-{key}.safetensors"


def default_home(workspace_id: str, client: int) -> Home:
    """Return a joined party's home where it names none: below $XDG_DATA_HOME, or ~/.local/share."""
    return Home(private_folder(workspace_id) / str(client))


def server_home(workspace_id: str) -> Home:
    """Return where the server keeps its keys and its history: $FEDCLI_SERVER_HOME, else beside the parties' homes."""
    named = os.environ.get("FEDCLI_SERVER_HOME")
    return Home(Path(named).absolute() if named else private_folder(workspace_id) / "server")


def remote_folder(address: str) -> Path:
    """Return where this machine keeps its part of a workspace elsewhere: locks, scores, a simulation's rows."""
    name = "-".join(re.findall(r"[A-Za-z0-9._]+", address))[-60:]
    return private_folder("remote") / f"{name}-{sha256(address.encode()).hexdigest()[:12]}"


def private_folder(workspace_id: str) -> Path:
    """Return the folder of this user\'s private state of a workspace; it need not exist."""
    base = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    if base.startswith("~"):
        raise WorkspaceError(
            "this user has no home directory to keep private state in",
            hint="Name a folder: --home DIR, or $FEDCLI_SERVER_HOME for the server.",
        )
    return Path(base).absolute() / "fedcli" / workspace_id


def round_name(number: int) -> str:
    """The name of a round's directory under rounds/."""
    return f"{number:05d}"


def is_round_name(name: str) -> bool:
    """Return whether a directory under rounds/ is named as a round."""
    return name.isascii() and name.isdigit() and name == round_name(int(name))


def update_name(number: int) -> str:
    """The name of an update's directory under inbox/<id>/."""
    return f"round-{number:05d}"


def attempt_name(number: int) -> str:
    """The name of what belongs to a round's only attempt at secure aggregation."""
    return f"{update_name(number)}-{ATTEMPT}"


def check_outside(workspace: Workspace, output: Path) -> None:
    """Raise WorkspaceError for a place in a folder that the workspace keeps for itself."""
    own = ("rounds", "inbox", "discarded", "clients", "enrolment", "attempts", "repair")
    for name in (*own, "eval", "data", "baselines", "private", "slurm"):
        if output.resolve().is_relative_to((workspace.root / name).resolve()):
            problem = f"{output} lies in {name}/ of the workspace, where nothing else belongs"
            raise WorkspaceError(problem, hint="Name another folder.")
