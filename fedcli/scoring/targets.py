"""What can be scored: rounds, the base, clients' updates, baselines, adapters and models from elsewhere, endpoints."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedcli.algos import Arrays
from fedcli.errors import FedError, NotReadyError, UsageError, WorkspaceError
from fedcli.model.base import find_base, fingerprint
from fedcli.model.inspection import inspect
from fedcli.printable import without_credentials
from fedcli.scoring.own_adapters import (
    OWN_PARTS,
    OwnAdapter,
    check_has_global,
    own_adapter,
    own_clients,
    own_kind,
    own_weight,
    whole_update,
)
from fedcli.workspace import baselines
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.history import Round, read_round
from fedcli.workspace.inbox import Update, read_update, submitted_rounds
from fedcli.workspace.layout import ADAPTER_FILE, ADAPTER_NAME, Workspace, adapter_name
from fedcli.workspace.parsing import sha256
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.target_name import TargetName

BASE = "base"


@dataclass(frozen=True)
class Targets:
    """Which targets a user named; with none named, all that a workspace holds: base, baselines, the latest round."""

    rounds: Sequence[str] = ()
    """Numbers, or "latest"; with :J behind one a cluster's adapter, else all of a round's."""
    base: bool = False
    clients: Sequence[int] = ()
    alone: Sequence[int] = ()
    pooled: bool = False
    adapters: Sequence[Path] = ()
    models: Sequence[str] = ()
    apis: Sequence[str] = ()
    api_url: str | None = None
    """Of the models behind an endpoint; None: OpenAI's own."""
    all_clients: bool = False
    """All clients' last updates, or where clients train adapters of their own, those that are on this machine."""


@dataclass(frozen=True)
class Target:
    """One model to score. `identity` is what tells its answers from others', beside base, template and number type."""

    name: str
    identity: Mapping[str, Any] = field(default_factory=dict)
    arrays: Callable[[], Arrays] | None = None
    """Reads the values of an adapter of this federation."""
    beside: Callable[[], Mapping[str, Arrays]] = dict
    """Reads those of the adapters beside it, by name."""
    weight: float = 1.0
    """What its product is multiplied by, among theirs."""
    folder: Path | None = None
    """An adapter from elsewhere."""
    model: Path | None = None
    """A full model from elsewhere."""
    api: str | None = None
    """The name of a model behind an endpoint."""


def find_targets(federation: FederationState, asked: Targets) -> list[Target]:
    """Return the targets that a user named, or all that the workspace holds.

    Raises UsageError for one that does not exist, NotReadyError for a round or an update that is not there yet.
    """
    workspace, config, start = federation.workspace, federation.config, federation.start
    federation.check_clients((*asked.clients, *asked.alone))
    everything = replace(asked, api_url=None) == Targets()
    named = [*asked.alone, *([None] if asked.pooled else [])]
    found = [_base(start)] if asked.base or everything else []
    if everything and config.adapter.init is not None:
        found += _rounds(start, is_one=False)
    names = baselines.published_baselines(workspace) if everything else map(baselines.baseline_name, named)
    found += [_baseline(start, name) for name in names]
    found += [_client(federation, client) for client in (*asked.clients, *_all(federation, asked))]
    if everything and federation.head.number and own_kind(federation.head) == OWN_PARTS:
        found += [_client(federation, client) for client in own_clients(federation)]
    else:
        for name in ("latest",) if everything else asked.rounds:
            found += _rounds(federation.round(name), is_one=":" in name)
    found += [_folder(folder) for folder in asked.adapters]
    found += [_model(workspace, model) for model in asked.models]
    found += [_api(name, asked.api_url) for name in asked.apis]
    return list({target.name: target for target in found}.values())


def is_stale(workspace: Workspace, target: str, identity: Mapping[str, Any]) -> bool:
    """Return whether scores are of a baseline that has been removed or trained anew since."""
    if TargetName.parse(target).kind not in ("alone", "pooled"):
        return False
    record = baselines.read_baseline_record(workspace, target)
    return record is None or record.files[ADAPTER_NAME].sha256 != identity.get("adapter")


def _base(start: Round) -> Target:
    tensors = start.manifest.tensors
    return Target(
        BASE, {"adapter": None}, lambda: {name: np.zeros(entry.shape, np.float32) for name, entry in tensors.items()}
    )


def _rounds(found: Round, *, is_one: bool) -> list[Target]:
    """Return a round's adapter; of one with clusters all of them, or the one that is meant."""
    if found.manifest.clusters is not None and not is_one:
        return [_round(found.of_cluster(cluster)) for cluster in range(found.manifest.num_clusters)]
    return [_round(found)]


def _round(found: Round) -> Target:
    check_has_global(found)
    name = TargetName.of_round(found.number)
    if found.manifest.clusters is not None:
        name = TargetName.of_cluster(found.cluster, found.number)
    identity = {"adapter": found.manifest.files[adapter_name(found.cluster)].sha256} | _delta(found)
    return Target(str(name), identity, found.whole_adapter)


def _delta(found: Round) -> dict[str, str]:
    """Return what tells a round's frozen second adapter from others; nothing where there is none."""
    return {} if found.manifest.base_delta is None else {"base_delta": found.manifest.base_delta}


def _baseline(start: Round, name: str) -> Target:
    workspace = start.workspace
    record: baselines.BaselineRecord | None = baselines.read_baseline_record(workspace, name)
    if record is None:
        named = TargetName.parse(name)
        option = "" if named.number is None else f" --id {named.number}"
        raise UsageError(f"there is no baseline {name}", hint=f"Train it: `fedcli train-{named.kind}{option}`.")

    def arrays() -> Arrays:
        contents = baselines.read_baseline(workspace, name, start.manifest.tensors)
        assert contents is not None  # it was there a moment ago
        return contents

    return Target(name, {"adapter": record.files[ADAPTER_NAME].sha256}, arrays)


def _all(federation: FederationState, asked: Targets) -> Sequence[int]:
    if not asked.all_clients:
        return ()
    if own_kind(federation.head) is not None:
        return own_clients(federation)
    clients = range(federation.config.federation.clients)
    sent = [client for client in clients if submitted_rounds(federation.workspace, client)]
    return sent or clients


def _client(federation: FederationState, client: int) -> Target:
    """Return a client's own adapter where it trains one, else its last update."""
    if own_kind(federation.head) is None:
        return _update(federation.workspace, client)
    own = own_adapter(federation, client)
    name, digest = TargetName.of_own(client, own.round), own.digest
    del own  # as of updates

    def found() -> OwnAdapter:
        again = own_adapter(federation, client)
        if again.digest != digest:
            raise NotReadyError(
                f"client {client}'s own adapter is no longer what it was when the scoring began",
                hint="Run the command again: what has been answered is not asked again.",
            )
        return again

    def beside() -> Mapping[str, Arrays]:
        return found().beside

    return Target(str(name), {"adapter": digest}, lambda: found().arrays, beside, own_weight(federation))


def _update(workspace: Workspace, client: int) -> Target:
    base, update = _last_update(workspace, client)
    if whole_update(base, update) is None:
        raise UsageError(
            f"client {client}'s update of round {base.number} is no whole model: the client keeps a part to itself",
            hint=f"Score the global adapter: --round {base.number}.",
        )
    digest, found = update.sha256, update.record.files[ADAPTER_FILE].sha256
    del update  # the arrays are read when it is their turn: a hundred clients' do not fit into memory

    def arrays() -> Arrays:
        with suppress(Refusal):
            again = read_update(base, client)
            if again is not None and again.sha256 == digest:
                whole = whole_update(base, again)
                assert whole is not None  # it was a moment ago
                return whole
        raise NotReadyError(
            f"client {client}'s update of round {base.number} is no longer what it was when the scoring began",
            hint="Run the command again: what has been answered is not asked again.",
        )

    return Target(str(TargetName.of_update(client, base.number)), {"adapter": found} | _delta(base), arrays)


def _last_update(workspace: Workspace, client: int) -> tuple[Round, Update]:
    """Return a client's last update that is valid, and the round that it answers."""
    for number in submitted_rounds(workspace, client):
        base = read_round(workspace, number)
        if base is not None and base.manifest.secure_aggregation is not None:
            raise NotReadyError(
                f"client {client}'s update of round {number} is masked: nobody but the client knows it",
                hint="Score rounds: the sum is known.",
            )
        if base is not None and base.manifest.privacy is not None and base.manifest.privacy.is_at_server:
            raise NotReadyError(
                f"client {client}'s update of round {number} has no noise yet: its scores would tell what that hides",
                hint="Score rounds: their noise covers each client (docs/PRIVACY.md).",
            )
        with suppress(Refusal):
            update = read_update(base, client) if base is not None else None
            if base is not None and update is not None:
                return base, update
        if base is not None and base.pruned() is not None:
            raise WorkspaceError(
                f"client {client}'s update of round {number} was removed by `fedcli gc`",
                hint="Score the client after its next round; `retention` in fedcli.yaml says how many stay.",
            )
    raise NotReadyError(
        f"client {client} has sent no valid update yet", hint=f"Let it train: `fedcli client train --id {client}`."
    )


def _folder(folder: Path) -> Target:
    weights = [path for path in (folder / ADAPTER_FILE, folder / "adapter_model.bin") if path.is_file()]
    if not weights or not (folder / "adapter_config.json").is_file():
        raise UsageError(
            f"--adapter {folder} holds no adapter_config.json and {ADAPTER_FILE}",
            hint="Name a folder in PEFT's layout, such as rounds/00010/adapter.",
        )
    digest = sha256(weights[0].read_bytes() + (folder / "adapter_config.json").read_bytes())
    return Target(f"adapter-{_plain(folder.absolute().name)}-{digest[:8]}", {"adapter": digest}, folder=folder)


def _model(workspace: Workspace, model: str) -> Target:
    try:
        folder = find_base(model, revision=None, root=Path.cwd())
    except FedError as error:
        error.hint = "Name a folder in transformers' layout, or a hub id, with --model."
        raise
    inspect(folder).require()
    digest = fingerprint(folder)
    return Target(f"model-{_plain(Path(model).name)}-{digest[:8]}", {"model": digest}, model=folder)


def _api(name: str, url: str | None) -> Target:
    digest = sha256(f"{url} {name}".encode())[:8]
    plain = f"api-{_plain(name)}"
    return Target(
        plain if url is None else f"{plain}-{digest}", {"api": name, "url": url and without_credentials(url)}, api=name
    )


def _plain(name: str) -> str:
    """Return a name that is a file's name everywhere."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name).lstrip(".") or "model"
