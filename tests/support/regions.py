"""Federations above each other, made without a model: parents, regions, and parties that answer by a formula."""

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
from protocol_client import take_part

from fedcli import Federation
from fedcli.operations.relay import RelayResult
from fedcli.server.enrol import found_trust
from fedcli.server.open_round import Start, open_first_round
from fedcli.server.verification import Verification
from fedcli.workspace.federation_state import Experiment, read_config
from fedcli.workspace.history import read_start
from fedcli.workspace.layout import Workspace
from fedcli.workspace.records import Identity
from fedcli.workspace.registrations import DataCard, Registration, open_to_parties, register
from support.federation import configure

PARTIES = ("data.source=null", "federation.rounds=2")


def make(template: Path, folder: Path, *overrides: str, rows: tuple[int, ...] = (), signed: bool = False) -> Path:
    """Make a workspace for parties with the model of a template; its first clients have registered so many rows."""
    shutil.copytree(template, folder, ignore=shutil.ignore_patterns("data", "rounds", "workspace.json"))
    configure(folder, *PARTIES, *(f"federation.clients={len(rows)}" for _ in rows[:1]), *overrides)
    workspace = Workspace(folder)
    start, config = read_start(Workspace(template)), read_config(workspace)
    identity = Identity(
        id=uuid.uuid4().hex, fixed=config.fixed(), simulation=False, signatures="required" if signed else None
    )
    workspace.identity.write_bytes(identity.to_bytes())
    open_to_parties(workspace, multi_user=False)
    files = {name: start.read(name) for name in start.manifest.files}
    given = Start(start.manifest.model, files, start.manifest.tensors)
    open_first_round(Experiment(workspace, config, None), identity, given, found_trust(workspace, identity))
    for client, count in enumerate(rows):
        register(workspace, Registration(workspace=identity.id, client=client, data=DataCard(num_rows=count)))
    return folder


def region(template: Path, folder: Path, *overrides: str, rows: tuple[int, ...], every: int = 1) -> Path:
    """Make a region whose parties have registered so many rows."""
    return make(template, folder, f"federation.relay_every={every}", *overrides, rows=rows)


def relay(parent: Path, child: Path, client: int, **options: object) -> RelayResult:
    """Run `fedcli relay` in this process."""
    return Federation.open(parent).relay(client, Federation.open(child), **options)


def whole(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return a training whose values are whole numbers, of which sums are exact."""
    return lambda array: np.arange(array.size, dtype=np.float32).reshape(array.shape) % 7 + value


def answer(workspace: Path, rows: tuple[int, ...], first: int = 0) -> None:
    """Let parties answer the open round; what each sends depends on its number among all, from `first` on."""
    for client, count in enumerate(rows):
        assert take_part(workspace, client, whole(2.0 ** (first + client)), count)


def merge(workspace: Path, **options: object) -> None:
    """Merge the open round."""
    Federation.open(workspace).server.aggregate(**options)


def verified(workspace: Path, **options: object) -> Verification:
    """Verify a workspace, in which nothing must be wrong."""
    result = Federation.open(workspace).verify(**options)
    assert result.violations == []
    return result
