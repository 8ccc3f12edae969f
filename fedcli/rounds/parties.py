"""Clients as those who hold rows: simulated ones, and parties that joined with rows that stay where they are."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedcli.config import Config, DataFormat, parse_format, read_format
from fedcli.data.formats import RowReader, format_name
from fedcli.data.hub import choose_format, choose_split
from fedcli.data.source import Source, absolute_path, find_source
from fedcli.errors import ConfigError, FedError, UsageError, WorkspaceError
from fedcli.model.base import find_base, fingerprint
from fedcli.rounds.settings import check_client, read_running_config
from fedcli.rounds.simulation import read_summary
from fedcli.workspace.history import Round, read_identity, read_start
from fedcli.workspace.layout import Home, Workspace, default_home
from fedcli.workspace.locks import hold
from fedcli.workspace.registry import (
    DataCard,
    PartyRecord,
    Registration,
    make_home,
    read_party,
    read_registration,
    register,
    save_party,
)

Share = Literal["full", "minimal"]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NO_LIMIT = 2**30
"""Tokens: rows are measured whole."""


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
    summary = read_summary(workspace)
    if summary is not None and client < len(summary.formats):
        return parse_format(summary.formats[client])
    return choose_format(None, config.data.format, config.task)


def is_here(workspace: Workspace, client: int) -> bool:
    """Return whether a client can be trained from here without naming a home."""
    registration = read_registration(workspace, client)
    if registration is None:
        return True
    record = read_party(_home(workspace, client, None))
    return record is not None and (record.workspace, record.client) == (registration.workspace, client)


def _joined(workspace: Workspace, registration: Registration, home: Path | None) -> Party:
    client = registration.client
    found = _home(workspace, client, home)
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


def _home(workspace: Workspace, client: int, given: Path | None) -> Home:
    """Return a joined party's home, which never lies in the workspace."""
    named = given or os.environ.get("FEDCLI_HOME")
    home = Home(Path(named).absolute()) if named else default_home(read_identity(workspace).id, client)
    if home.folder.resolve().is_relative_to(workspace.root.resolve()):
        raise UsageError(
            f"--home {home.folder} lies in the workspace, where everybody could see it",
            hint="Name a folder outside of it.",
        )
    return home


def _own_base(workspace: Workspace, config: Config, record: PartyRecord, start: Round) -> Path:
    try:
        return find_same_base(workspace, record.base or config.model.base, start)
    except FedError as error:
        if record.base is None:
            error.hint += " Or name your own copy with --base DIR."
        else:
            error.hint = "Let --base name a copy of the very model that round 0 was opened with."
        raise


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


@dataclass(frozen=True)
class Joining:
    """A party that is ready to join: what the workspace will learn, and what its home will keep."""

    workspace: Workspace
    home: Home
    record: PartyRecord
    card: DataCard

    def commit(self) -> None:
        """Write the home's record, then the registration."""
        client = self.record.client
        make_home(self.home)
        with hold(self.home.lock, f"client {client}"):
            save_party(self.home, self.record)
            register(self.workspace, Registration(workspace=self.record.workspace, client=client, data=self.card))


def prepare_join(
    workspace: Workspace,
    client: int,
    data: str,
    *,
    data_format: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    home: Path | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
    share: Share = "full",
    on_rows: Callable[[int], None] = lambda count: None,
) -> Joining:
    """Read a real party's rows, which stay where they are, and make the card that its registration will show.

    Writes nothing. Raises UsageError for an id or a home that will not do, ConfigError for rows that cannot be used,
    WorkspaceError where another party has this id.
    """
    if not data.strip():
        raise UsageError("--data names nothing", hint="Name your rows: a file, a folder, or a hub id.")
    config = read_running_config(workspace)
    check_client(client, config)
    workspace_id = read_identity(workspace).id
    found = _home(workspace, client, home)
    _check_free(workspace, client, found, workspace_id)
    given = read_format(data_format, config.task) if data_format is not None else None
    record = PartyRecord(
        workspace=workspace_id,
        client=client,
        source=absolute_path(data),
        format=choose_format(data, given, config.task),
        subset=subset,
        split=choose_split(data, split),
        base=None if base is None else absolute_path(base),
        trust_remote_code=trust_remote_code,
    )
    source = find_source(record.source, Path.cwd(), subset=record.subset, split=record.split)
    reader = RowReader(record.format, config.federation.seed)
    if share == "minimal":
        if base is not None:
            _own_base(workspace, config, record, read_start(workspace))
        card = _minimal_card(reader, source, on_rows)
    else:
        card = _full_card(workspace, config, record, reader, source, on_rows)
    return Joining(workspace, found, record, card)


def _check_free(workspace: Workspace, client: int, home: Home, workspace_id: str) -> None:
    """Nobody else may have this id, and the home no other client."""
    if workspace.client_rows(client).exists():
        raise ConfigError(
            f"client {client} is simulated here: {workspace.client_rows(client)} holds its rows",
            hint="Parties join a workspace with data.source: null, made by `fedcli init --set data.source=null`.",
        )
    record = read_party(home)
    is_own = record is not None and (record.workspace, record.client) == (workspace_id, client)
    if record is not None and not is_own:
        raise UsageError(
            f"{home.folder} is the home of client {record.client} of another workspace"
            if record.workspace != workspace_id
            else f"{home.folder} is the home of client {record.client}",
            hint="Name another folder with --home.",
        )
    if read_registration(workspace, client) is not None and not is_own:
        raise WorkspaceError(
            f"client {client} has joined already, from another home than {home.folder}",
            hint="Take another id; if it was you, name that home with --home. The server's operator can remove "
            f"clients/{client}.json to give the id free.",
        )


def _minimal_card(reader: RowReader, source: Source, on_rows: Callable[[int], None]) -> DataCard:
    for count, _ in enumerate(reader.read(source.rows()), 1):
        if count % 1000 == 0:
            on_rows(1000)
    reader.require_rows(source.location)
    return DataCard(num_rows=reader.num_usable)


def _full_card(
    workspace: Workspace,
    config: Config,
    record: PartyRecord,
    reader: RowReader,
    source: Source,
    on_rows: Callable[[int], None],
) -> DataCard:
    import numpy as np

    from fedcli.data.encoding import Encoder, encode_source
    from fedcli.model.base import load_tokenizer

    start = read_start(workspace)
    folder = _own_base(workspace, config, record, start)
    tokenizer = load_tokenizer(folder, trust_remote_code=record.trust_remote_code)
    encoder = Encoder(tokenizer, start.manifest.train.template)
    rows = encode_source(encoder, reader, source, config.task, NO_LIMIT, on_rows)
    quantiles = np.quantile(rows.examples.lengths(), QUANTILES, method="nearest")
    return DataCard(
        num_rows=reader.num_usable,
        format=format_name(record.format),
        left_out=dict(rows.left_out),
        token_quantiles={f"{share:g}": int(value) for share, value in zip(QUANTILES, quantiles, strict=True)},
    )
