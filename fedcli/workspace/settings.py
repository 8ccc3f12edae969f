"""Reading fedcli.yaml of a workspace, and what of it may still change."""

from typing import Any

from fedcli.config import Config, parse_config, read_document
from fedcli.errors import ConfigError, UsageError
from fedcli.workspace.history import read_identity
from fedcli.workspace.layout import Workspace
from fedcli.workspace.read import read_text

POLL_SECONDS = 0.5
"""How long to wait between two looks at the disk."""


def read_config(workspace: Workspace) -> Config:
    """Read and validate fedcli.yaml; raise ConfigError, or WorkspaceError where it cannot be read."""
    return parse_config(read_document(read_text(workspace.config), workspace.config), workspace.config)


def read_running_config(workspace: Workspace) -> Config:
    """Read fedcli.yaml of a workspace that has been initialised; what `init` fixed must still be the same."""
    identity = read_identity(workspace)
    config = read_config(workspace)
    changed = _differences("", identity.fixed, config.fixed())
    if changed:
        raise ConfigError(
            f"{workspace.config} changes what was fixed by `fedcli init`:\n  " + "\n  ".join(changed),
            hint="Set these keys back, or start another workspace with `fedcli init DIR`.",
        )
    return config


def check_client(client: int, config: Config) -> None:
    """Raise UsageError for an id that no client has."""
    if not 0 <= client < config.federation.clients:
        raise UsageError(
            f"there is no client {client}",
            hint=f"This federation has {config.federation.clients} clients, ids 0 to {config.federation.clients - 1}.",
        )


def _differences(prefix: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    lines = []
    for key in sorted(before):  # a key that a later version adds has changed nothing
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences(f"{prefix}{key}.", old, new)
        elif old != new:
            lines.append(f"{prefix}{key}: was {old!r}, is now {new!r}")
    return lines
