"""Clients as those who hold rows: simulated ones, and parties that joined with rows that stay where they are."""

import os
from dataclasses import dataclass
from pathlib import Path

from fedcli.config import Config, DataFormat, parse_format
from fedcli.data.hub import choose_format
from fedcli.data.source import Source, find_source
from fedcli.errors import ConfigError, UsageError
from fedcli.model.base import find_base, fingerprint
from fedcli.workspace.history import Round, read_identity
from fedcli.workspace.layout import Home, Workspace, default_home
from fedcli.workspace.registry import Registration, read_party, read_registration


@dataclass(frozen=True)
class Party:
    """A client and what it trains on; `num_rows` is what a joined one registered, None of a simulated one.

    `base` and `trust_remote_code` are a joined party's own; None: as fedcli.yaml says.
    """

    client: int
    home: Home
    source: Source
    format: DataFormat
    num_rows: int | None = None
    base: str | None = None
    trust_remote_code: bool | None = None

    def base_of(self, config: Config) -> str:
        """Return where the party's base model lies."""
        return self.base or config.model.base

    def trusts_code(self, config: Config) -> bool:
        """Return whether code that comes with the model may run."""
        return config.model.trust_remote_code if self.trust_remote_code is None else self.trust_remote_code


def find_party(workspace: Workspace, config: Config, client: int, home: Path | None = None) -> Party:
    """Return a client's party; `home` is a joined one's, where it is not the default.

    Raises ConfigError where a simulated client has no rows or a joined one's home is not here, UsageError for the home
    of a client that has not joined.
    """
    registration = read_registration(workspace, client)
    if registration is not None:
        return _joined(workspace, registration, home)
    if home is not None:
        raise UsageError(
            f"client {client} has not joined, and so has no home",
            hint=f"Run `fedcli client join --id {client} --data SOURCE --home {home}` first.",
        )
    rows = workspace.client_rows(client)
    if not rows.is_file():
        raise ConfigError(
            f"client {client} has no rows: {rows} is missing",
            hint=f"A party joins with `fedcli client join --id {client} --data SOURCE`; for a simulation set "
            "data.source and run `fedcli data partition`, or put its rows there.",
        )
    return Party(client, workspace.private(client), Source(rows), _simulated_format(workspace, config, client))


def _simulated_format(workspace: Workspace, config: Config, client: int) -> DataFormat:
    """Return the format of a simulated client's rows: what they were split as; fedcli.yaml's, if written by hand."""
    from fedcli.rounds.simulation import read_summary  # it loads numpy, and whoever has nothing to do needs none

    summary = read_summary(workspace)
    if summary is not None and client < len(summary.formats):
        return parse_format(summary.formats[client])
    return choose_format(None, config.data.format, config.task)


def is_here(workspace: Workspace, client: int) -> bool:
    """Return whether a client can be trained from here without naming a home."""
    registration = read_registration(workspace, client)
    if registration is None:
        return True
    record = read_party(find_home(workspace, client, None))
    return record is not None and (record.workspace, record.client) == (registration.workspace, client)


def can_train(workspace: Workspace, client: int) -> bool:
    """Return whether a client has rows that can be trained on from here without naming a home."""
    has_rows = workspace.registration(client).exists() or workspace.client_rows(client).exists()
    return has_rows and is_here(workspace, client)


def _joined(workspace: Workspace, registration: Registration, home: Path | None) -> Party:
    client = registration.client
    found = find_home(workspace, client, home)
    record = read_party(found)
    if record is None or (record.workspace, record.client) != (registration.workspace, client):
        raise ConfigError(
            f"client {client} is a joined party, and its home is not {found.folder}",
            hint=f"Run this as the user who joined, or name the home: --home DIR. To join anew: "
            f"`fedcli client join --id {client} --data SOURCE`.",
        )
    try:
        source = find_source(record.source, Path.cwd(), subset=record.subset, split=record.split)
    except ConfigError as error:
        again = f"`fedcli client join --id {client} --data SOURCE`"
        raise ConfigError(error.message, hint=f"Put it back, or name another source: {again}.") from error
    return Party(
        client=client,
        home=found,
        source=source,
        format=record.format,
        num_rows=registration.data.num_rows,
        base=record.base,
        trust_remote_code=record.trust_remote_code,
    )


def find_home(workspace: Workspace, client: int, given: Path | None) -> Home:
    """Return a joined party's home: the one given, $FEDCLI_HOME or the default; it never lies in the workspace."""
    named = given or os.environ.get("FEDCLI_HOME")
    home = Home(Path(named).absolute()) if named else default_home(read_identity(workspace).id, client)
    if home.folder.resolve().is_relative_to(workspace.root.resolve()):
        raise UsageError(
            f"--home {home.folder} lies in the workspace, where everybody could see it",
            hint="Name a folder outside of it.",
        )
    return home


def find_same_base(workspace: Workspace, base: str, any_round: Round) -> Path:
    """Return the folder of the base model, which must be the one that round 0 was opened with."""
    expected = any_round.manifest.model
    folder = find_base(base, revision=expected.revision, root=workspace.root)
    if fingerprint(folder) != expected.fingerprint:
        raise ConfigError(
            f"model.base: {folder} is not the base model of this federation ({expected.base}): its fingerprint differs",
            hint="Point model.base in fedcli.yaml (a joined party: `client join --base DIR`) to a copy of the very "
            "model that round 0 was opened with.",
        )
    return folder
