"""Making a workspace from a preset or from a fedcli.yaml of one's own."""

import json
import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fedcli.config import Config, apply_overrides, describe_overrides, parse_config, read_document
from fedcli.config.parsing import YAML_FAULTS
from fedcli.data.source import absolute_path
from fedcli.errors import ConfigError, UsageError, WorkspaceError, did_you_mean
from fedcli.observer import Observer
from fedcli.parties.simulate import DataSummary, plan_split, write_split
from fedcli.server.communication_cost import describe_budget
from fedcli.server.initial_adapter import check_base, prepare_start
from fedcli.server.open_round import open_first_round
from fedcli.workspace.address import workspace_at
from fedcli.workspace.federation_state import Experiment, FederationState, config_text, read_config
from fedcli.workspace.history import is_initialised, read_identity, read_round, sweep_workspace
from fedcli.workspace.layout import CONFIG_NAME, Workspace
from fedcli.workspace.locks import hold
from fedcli.workspace.publish import make_folder
from fedcli.workspace.records import Identity
from fedcli.workspace.registrations import any_registered, mark_as_own, open_to_parties
from fedcli.workspace.row_files import any_rows

if TYPE_CHECKING:
    from fedcli.server.enrol import ServerTrust

DEFAULT_PRESET = "demo"
_PATH_KEYS = ("data.source", "model.base", "adapter.init", "eval.data", "eval.judge_model")


def template_folder() -> Path:
    """Return workspace_template/, inside the installed package or beside it in a source tree."""
    package = Path(__file__).parent.parent
    inside = package / "workspace_template"
    return inside if inside.is_dir() else package.parent / "workspace_template"


def presets() -> dict[str, Path]:
    """Return the shipped presets, name -> file; `defaults` is every key with its default."""
    folder = template_folder()
    return {"defaults": folder / "fedcli.yaml"} | {path.stem: path for path in (folder / "presets").glob("*.yaml")}


def describe_preset(path: Path) -> str:
    """Return the first sentence of the comment that a preset begins with."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    text = " ".join(line.removeprefix("#").strip() for line in lines)
    return re.split(r"(?<=[.]) (?=[A-Z])", text)[0].rstrip(".")


@dataclass(frozen=True)
class Creation:
    """What `create_workspace` made or found: whether anything was made, and how the rows were split."""

    federation: FederationState
    is_new: bool
    data: DataSummary | None = None
    has_lost_identity: bool = False
    """Whether rounds stood there without a workspace.json: it is made again, with the id that they have."""
    notes: tuple[str, ...] = ()
    """What is odd about the base model, and no fault."""

    @property
    def has_rows(self) -> bool:
        """Whether a simulated client has rows, or a party has joined."""
        return any_rows(self.federation.workspace) or any_registered(self.federation.workspace)


def create_workspace(
    address: Path | str, *, preset: str | None = None, overrides: Sequence[str] = (), observer: Observer
) -> Creation:
    """Make a workspace in a folder or at a URL, split its rows and open round 0.

    A folder that holds a fedcli.yaml already is initialised from it. Called again after an interruption it goes on, on
    a finished workspace it changes nothing, and a workspace.json that was lost gets the id of round 0. Raises
    UsageError for an unknown preset, ConfigError for a fault in the configuration or the rows, WorkspaceError where
    another experiment lies there.
    """
    workspace = workspace_at(address)
    text = _configuration(workspace, preset, overrides)
    is_file = workspace.store.exists(CONFIG_NAME) or not overrides  # a preset has no fault of its own
    named = workspace.config if is_file else describe_overrides(overrides)
    config = parse_config(read_document(text, workspace.config), named)
    if _is_open(workspace):
        return Creation(FederationState.open(workspace), False)
    _check_privacy(config)
    experiment = Experiment(workspace, config, None)
    base = check_base(experiment)  # before rows are read and torch is loaded: it takes no second
    plan = plan_split(experiment, observer)
    signs = _signs(experiment, has_rows=plan is not None or any_rows(workspace))
    start = prepare_start(experiment)  # all that can be wrong is found before anything is written
    make_folder(workspace.root)
    with hold(workspace.server_lock, "the server's work"):
        if _is_open(workspace):
            return Creation(FederationState.open(workspace), False)
        sweep_workspace(workspace)
        orphan = read_round(workspace, 0)  # of no workspace.json, for otherwise it would be open
        open_to_parties(workspace, multi_user=config.federation.multi_user)
        if plan is not None:
            write_split(experiment, plan, observer=observer)
        workspace.store.put_new(CONFIG_NAME, text.encode())
        for name in ("README.md", "cron/crontab", "slurm/README.md"):
            workspace.store.put_new(name, (template_folder() / name).read_bytes())
        if is_initialised(workspace):
            workspace_id = read_identity(workspace).id
        else:
            workspace_id = uuid.uuid4().hex if orphan is None else orphan.manifest.workspace
        is_simulation = plan is not None or any_rows(workspace)
        is_signed = signs if orphan is None else orphan.manifest.enrolment is not None
        identity = Identity(
            id=workspace_id,
            fixed=config.fixed(),
            simulation=is_simulation,
            signatures="required" if is_signed else None,
        )
        mark_as_own(workspace, workspace_id)
        workspace.store.put(workspace.name(workspace.identity), identity.to_bytes())
        federation = open_first_round(experiment, identity, start, _found_trust(workspace, identity))
        return Creation(
            federation,
            True,
            plan.summary if plan else None,
            has_lost_identity=orphan is not None,
            notes=(
                *(() if base is None else base.notes_for(config.train.max_length)),
                *_rule_notes(config),
                *_budget_notes(federation),
                *_privacy_notes(federation),
            ),
        )


def _privacy_notes(federation: FederationState) -> tuple[str, ...]:
    if federation.head.manifest.privacy is None:
        return ()
    from fedcli.server.privacy_notes import privacy_notes  # other federations need none

    return privacy_notes(federation.config.privacy, federation.head.manifest, federation.config.federation.rounds)


def _check_privacy(config: Config) -> None:
    """Raise ConfigError for an algorithm that cannot be merged with the noise of unit client."""
    if config.privacy.unit == "client":
        from fedcli.server.merge_privately import check_algorithm

        check_algorithm(config.algorithm)


def _rule_notes(config: Config) -> tuple[str, ...]:
    """Return what must be known of a rule that leaves updates out."""
    rule = config.aggregation
    if rule.rule in ("mean", "norm_clip") and not rule.nearest_mixing:
        return ()
    return (
        f"aggregation.rule is {rule.rule}: where clients hold rows of unlike kinds it takes a minority for an attack, "
        "and what only they know is not learnt (docs/ROBUST.md)",
    )


def _budget_notes(federation: FederationState) -> tuple[str, ...]:
    """Return whether the rounds keep within federation.budget; nothing where there is none."""
    found = describe_budget(federation.head.manifest, federation.config.federation)
    if found is None:
        return ()
    is_within, told, cure = found
    return (told if is_within else f"{told}, which is less. {cure}",)


def open_round(workspace: Workspace) -> FederationState:
    """Open round 0 unless it is open, and return the federation."""
    identity, experiment = read_identity(workspace), Experiment.read(workspace)
    with hold(workspace.server_lock, "the server's work"):
        sweep_workspace(workspace)
        open_to_parties(workspace, multi_user=experiment.config.federation.multi_user)
        if _is_open(workspace):
            return FederationState.open(workspace)
        return open_first_round(experiment, identity, prepare_start(experiment), _found_trust(workspace, identity))


def _signs(experiment: Experiment, *, has_rows: bool) -> bool:
    """Return whether updates and rounds of a new workspace must be signed: where parties join, unless they need not."""
    wanted = experiment.config.federation.signatures
    if has_rows and wanted == "required":
        raise ConfigError(
            "federation.signatures: required is for parties that join; the clients of a simulation have no keys",
            hint="Set it to null or off, or data.source to null.",
        )
    if has_rows and (secure := experiment.config.privacy.secure_aggregation) != "off":
        raise ConfigError(
            f"privacy.secure_aggregation: {secure} is for parties that join; the clients of a simulation have no keys",
            hint="Set it to off, or data.source to null.",
        )
    return not has_rows and wanted != "off"


def _found_trust(workspace: Workspace, identity: Identity) -> "ServerTrust | None":
    if identity.signatures is None:
        return None
    from fedcli.server.enrol import found_trust  # a simulation needs no cryptography

    return found_trust(workspace, identity)


def _is_open(workspace: Workspace) -> bool:
    return is_initialised(workspace) and read_round(workspace, 0) is not None


def _configuration(workspace: Workspace, preset: str | None, overrides: Sequence[str]) -> str:
    """Return the text of fedcli.yaml: what stands there, or the preset's with the overrides put in."""
    standing = workspace.store.exists(CONFIG_NAME)
    if standing and preset is None and not overrides:
        read_config(workspace)
        return config_text(workspace)
    name, known = preset or DEFAULT_PRESET, presets()
    if name not in known:
        raise UsageError(f"unknown preset {name!r}", hint=did_you_mean(name, known))
    text = known[name].read_text(encoding="utf-8")
    if overrides:
        document = read_document(text, Path("the preset"))
        apply_overrides(document, [_absolute(override) for override in overrides])
        text = (
            f"# From the preset {name}, with settings of the command line.\n"
            "# docs/CONFIG.md explains every key.\n" + yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        )
    if standing and config_text(workspace) != text:
        raise WorkspaceError(
            f"{workspace.address} already holds another experiment: its {workspace.config.name} differs",
            hint="Name another folder; or edit that file, and run `fedcli init` without --preset and --set.",
        )
    return text


def _absolute(override: str) -> str:
    """Take paths that --set gives from the current folder; those in fedcli.yaml start at the file's own folder."""
    key, separator, text = override.partition("=")
    if key not in _PATH_KEYS or not separator:
        return override
    if Path(os.path.expanduser(text)).exists() and text:  # a name that YAML would read as something else
        return f"{key}={json.dumps(absolute_path(text))}"
    try:
        value = yaml.safe_load(text)
    except YAML_FAULTS:
        return override  # the error is told where the value is read
    if isinstance(value, str):
        value = absolute_path(value)
    elif isinstance(value, list):
        value = [_absolute_entry(entry) for entry in value]
    return f"{key}={json.dumps(value)}"


def _absolute_entry(entry: Any) -> Any:
    if isinstance(entry, dict) and isinstance(entry.get("source"), str):
        return entry | {"source": absolute_path(entry["source"])}
    return absolute_path(entry) if isinstance(entry, str) else entry
