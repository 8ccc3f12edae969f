"""Making a workspace from a preset or from a fedcli.yaml of one's own."""

import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import yaml

from fedcli.config import Config, ShardsBy, apply_overrides, parse_config, read_document
from fedcli.data.demo import demo_preferences, demo_rows
from fedcli.data.partition import partition
from fedcli.data.rows import Row, alpaca_example, preference, read_rows, write_rows
from fedcli.errors import ConfigError, UsageError, WorkspaceError, did_you_mean
from fedcli.model.base import BUILTIN_PREFIX
from fedcli.rounds.opening import open_first_round
from fedcli.rounds.settings import read_config, read_running_config
from fedcli.rounds.start import prepare_start
from fedcli.workspace.history import Round, read_head, read_identity, read_round
from fedcli.workspace.layout import Workspace
from fedcli.workspace.locks import hold
from fedcli.workspace.publish import make_folder, publish_file, remove_temporaries
from fedcli.workspace.read import read_text
from fedcli.workspace.records import Identity

DEMO_SOURCE = "builtin:demo"
DEFAULT_PRESET = "demo"
MIN_DEMO_CLIENTS, MAX_DEMO_CLIENTS = 2, 64
_PATH_KEYS = ("data.source", "model.base", "adapter.init")


def template_folder() -> Path:
    """Return workspace_template/, inside the installed package or beside it in a source tree."""
    package = Path(__file__).parent.parent
    inside = package / "workspace_template"
    return inside if inside.is_dir() else package.parent / "workspace_template"


def presets() -> dict[str, Path]:
    """Return the shipped presets, name -> file; `defaults` is every key with its default."""
    folder = template_folder()
    return {"defaults": folder / "fedcli.yaml"} | {path.stem: path for path in (folder / "presets").glob("*.yaml")}


def create_workspace(root: Path, *, preset: str | None = None, overrides: Sequence[str] = ()) -> tuple[Round, bool]:
    """Make a workspace in a folder and open round 0; return the latest round, and whether anything was made.

    A folder that holds a fedcli.yaml already is initialised from it. Called again after an interruption it goes on,
    and on a finished workspace it changes nothing. Raises UsageError for an unknown preset, ConfigError for a fault in
    the configuration or the rows, WorkspaceError where another experiment lies there.
    """
    workspace = Workspace(root.absolute())
    text = _configuration(workspace, preset, overrides)
    config = parse_config(read_document(text, workspace.config), workspace.config)
    if _is_open(workspace):
        read_running_config(workspace)
        return read_head(workspace), False
    files = _data_files(workspace, config)
    start = prepare_start(config, workspace.root)  # all that can be wrong is found before anything is written
    make_folder(workspace.root)
    with hold(workspace.server_lock, "the server's work"):
        if _is_open(workspace):
            return read_head(workspace), False
        remove_temporaries(workspace.root)
        remove_temporaries(workspace.rounds)
        make_folder(workspace.inbox)
        for path, contents in files.items():
            publish_file(path, contents)
        if not workspace.config.exists():
            publish_file(workspace.config, text.encode())
        if not workspace.readme.exists():
            publish_file(workspace.readme, (template_folder() / "README.md").read_bytes())
        workspace_id = read_identity(workspace).id if workspace.identity.exists() else uuid.uuid4().hex
        publish_file(workspace.identity, Identity(id=workspace_id, fixed=config.fixed()).to_bytes())
        return open_first_round(workspace, config, start), True


def open_round(workspace: Workspace) -> Round:
    """Open round 0 unless it is open, and return the latest round."""
    config = read_running_config(workspace)
    with hold(workspace.server_lock, "the server's work"):
        if _is_open(workspace):
            return read_head(workspace)
        return open_first_round(workspace, config, prepare_start(config, workspace.root))


def _is_open(workspace: Workspace) -> bool:
    return workspace.identity.exists() and read_round(workspace, 0) is not None


def _configuration(workspace: Workspace, preset: str | None, overrides: Sequence[str]) -> str:
    """Return the text of fedcli.yaml: what stands there, or the preset's with the overrides put in."""
    standing = workspace.config.exists()
    if standing and preset is None and not overrides:
        read_config(workspace)
        return read_text(workspace.config)
    text = _preset_text(preset or DEFAULT_PRESET)
    if overrides:
        document = read_document(text, Path("the preset"))
        apply_overrides(document, [_absolute(override) for override in overrides])
        text = (
            f"# From the preset {preset or DEFAULT_PRESET}, with settings of the command line.\n"
            "# docs/CONFIG.md explains every key.\n" + yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        )
    if standing and read_text(workspace.config) != text:
        raise WorkspaceError(
            f"{workspace.root} already holds another experiment: its {workspace.config.name} differs",
            hint="Name another folder; or edit that file, and run `fedcli init` without --preset and --set.",
        )
    return text


def _preset_text(name: str) -> str:
    known = presets()
    if name not in known:
        raise UsageError(f"unknown preset {name!r}", hint=did_you_mean(name, known))
    return known[name].read_text(encoding="utf-8")


def _absolute(override: str) -> str:
    """Take a path that --set gives from the current folder; those in fedcli.yaml start at the file's own folder."""
    key, _, value = override.partition("=")
    if key in _PATH_KEYS and value and (path := Path(os.path.expanduser(value))).exists():
        return f"{key}={path.absolute()}"
    return override


def _data_files(workspace: Workspace, config: Config) -> dict[Path, bytes]:
    """Return a simulation's data files: every client's rows, and the demo's held-out rows."""
    source = config.data.source
    if source is None:
        return {}
    held_out: dict[Path, bytes] = {}
    if source.startswith(BUILTIN_PREFIX):
        rows, held_out = _demo_files(workspace, config)
    else:
        rows = read_rows(workspace.root / os.path.expanduser(source))
    for row in rows:
        preference(row) if config.task == "dpo" else alpaca_example(row)
    choice = config.data.partition
    shares = partition(
        rows,
        config.federation.clients,
        config.federation.seed,
        shards_by=choice.shards_by if isinstance(choice, ShardsBy) else None,
        max_rows=config.data.max_rows,
    )
    files = {
        workspace.client_rows(client): write_rows([row.fields for row in share]) for client, share in enumerate(shares)
    }
    files |= held_out
    for path, contents in files.items():
        if path.exists() and path.read_bytes() != contents:
            raise WorkspaceError(
                f"{path} is there already, and is not what data.source gives",
                hint="Move it away; or keep it, and set data.source to null in fedcli.yaml or with --set.",
            )
    return files


def _demo_files(workspace: Workspace, config: Config) -> tuple[list[Row], dict[Path, bytes]]:
    """Return the built-in rows, and the files of the held-out ones."""
    if config.data.source != DEMO_SOURCE:
        raise ConfigError(f"data.source: unknown built-in rows {config.data.source!r}", hint=f"Known: {DEMO_SOURCE}.")
    if not MIN_DEMO_CLIENTS <= config.federation.clients <= MAX_DEMO_CLIENTS:
        raise ConfigError(
            f"federation.clients: the built-in rows are for {MIN_DEMO_CLIENTS} to {MAX_DEMO_CLIENTS} clients, "
            f"not {config.federation.clients}",
            hint="Use a number in that range, or rows of your own.",
        )
    splits = (demo_preferences if config.task == "dpo" else demo_rows)(config.federation.seed)
    rows = [Row(fields, f"{DEMO_SOURCE}, row {number}") for number, fields in enumerate(splits["train"], 1)]
    held_out = {workspace.held_out_rows(split): write_rows(list(splits[split])) for split in ("tuning", "test")}
    return rows, held_out
