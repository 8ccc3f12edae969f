"""Clients as those who hold rows: simulated ones, and parties that joined with rows that stay where they are."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedcli.config import Config, DataFormat, SelectConfig, parse_format
from fedcli.data.formats import Choice, guess_format
from fedcli.data.source import Source, find_source
from fedcli.errors import ConfigError, IntegrityError, UsageError, WorkspaceError
from fedcli.workspace.federation_state import Experiment, FederationState
from fedcli.workspace.floors import USUAL_FLOORS, Asked, Floors, check_floors
from fedcli.workspace.history import read_identity
from fedcli.workspace.layout import Home, default_home
from fedcli.workspace.records import Manifest
from fedcli.workspace.registrations import PartyRecord, Registration, is_own, own_homes, read_party, read_registration
from fedcli.workspace.row_files import has_rows, open_rows
from fedcli.workspace.train_records import TrainRecord

if TYPE_CHECKING:
    from fedcli.model.inspection import Inspection


@dataclass(frozen=True)
class Party:
    """A client and what it trains on; `num_rows` is what a joined one registered, None of a simulated one.
    `guess` says that the format of rows that were written by hand was guessed; nobody has been told of those rows yet.

    `base` and `trust_remote_code` are a joined party's own; None: as fedcli.yaml says. `floors` bind it alone. `select`
    is its own choice of rows, and `shares_scores` lets its updates tell how many have which score.
    """

    client: int
    home: Home
    source: Source
    format: DataFormat
    num_rows: int | None = None
    guess: str | None = None
    is_handwritten: bool = False
    base: str | None = None
    trust_remote_code: bool | None = None
    floors: Floors = USUAL_FLOORS
    select: SelectConfig | Literal["off"] | None = None
    shares_scores: bool = False
    allow_code_execution: bool = False
    """Whether a joined party lets code that the model wrote run in a sandbox while it trains."""

    def check_floors(self, manifest: Manifest, train: TrainRecord | None = None, what: str | None = None) -> None:
        """Raise ConfigError where a joined party's floors refuse what a round, or `train`, asks for."""
        if self.num_rows is not None:
            check_floors(self.floors, Asked.by(manifest, self.num_rows, train), self.client, what)

    def check_selected(self, manifest: Manifest, num_rows: int) -> None:
        """Raise ConfigError where a joined party's floors refuse that a round learns from so few rows."""
        if self.num_rows is None:
            return
        try:
            check_floors(self.floors, Asked.by(manifest, num_rows), self.client)
        except ConfigError as error:
            if self.select is not None:
                error.hint = (
                    "Your own --select leaves so few of your rows. Join again with --select off, or with another one, "
                    "or with lower floors."
                )
            raise

    def base_of(self, config: Config) -> str:
        """Return where the party's base model lies."""
        return self.base or config.model.base


def joined_as(experiment: Experiment) -> dict[int, PartyRecord | None]:
    """Return the clients that this user has joined as, with their homes' records; None for a home that is elsewhere."""
    if experiment.identity is None:
        return {}
    return {client: read_party(home) for client, home in own_homes(experiment.identity.id).items()}


def trusts_code(experiment: Experiment, party: Party | None = None) -> bool:
    """Return whether code that comes with the base model may run as this user.

    A joined party decides by itself, whatever it runs; fedcli.yaml decides for its own user alone, who has not joined.
    """
    if party is not None and party.trust_remote_code is not None:
        return party.trust_remote_code
    if joined := joined_as(experiment):
        return all(record is not None and record.trust_remote_code for record in joined.values())
    return experiment.config.model.trust_remote_code and is_own(experiment.workspace)


def allows_code(experiment: Experiment, party: Party | None = None) -> bool:
    """Return whether code that the model wrote may run in a sandbox of this user, in training.

    A joined party decides by itself; in a simulation eval.allow_code_execution decides for its own user alone.
    """
    if party is not None and party.num_rows is not None:
        return party.allow_code_execution
    return experiment.config.eval.allow_code_execution and is_own(experiment.workspace)


def _may_simulate(experiment: Experiment) -> bool:
    """Return whether rows in data/ may be trained: not in a workspace that was made for parties."""
    return experiment.identity is None or experiment.identity.simulation is not False


def find_party(experiment: Experiment, client: int, home: Path | None = None) -> Party:
    """Return a client's party; `home` is a joined one's, where it is not the default.

    Raises ConfigError where a simulated client has no rows or a joined one's home is not here, UsageError for the home
    of a client that has not joined.
    """
    workspace = experiment.workspace
    # a simulation has no parties, whatever lies in clients/
    is_simulation = experiment.identity is not None and experiment.identity.simulation is True
    registration = None if is_simulation else read_registration(workspace, client)
    if registration is not None:
        return _joined(experiment, registration, home)
    if _own_record(experiment, client, home) is not None:
        raise IntegrityError(
            f"client {client} has joined from here, and {workspace.registration(client)} is gone",
            hint="Ask the server's operator. "
            f"Your rows are not trained until `fedcli client join --id {client} --data SOURCE` registers them again.",
        )
    if home is not None:
        raise UsageError(
            f"client {client} has not joined, and so has no home",
            hint=f"Run `fedcli client join --id {client} --data SOURCE --home {home}` first.",
        )
    rows = workspace.client_rows(client)
    if not has_rows(workspace, client) or not _may_simulate(experiment):
        raise ConfigError(
            f"client {client} has no rows: "
            + (f"{rows} is missing" if not rows.is_file() else "it has not joined, and this is no simulation"),
            hint=f"A party joins with `fedcli client join --id {client} --data SOURCE`; for a simulation set "
            "data.source and run `fedcli data partition`, or put its rows there.",
        )
    from fedcli.parties.simulate import read_summary  # it loads numpy, and whoever has nothing to do needs none

    summary = read_summary(workspace)
    source = Source(rows, opener=open_rows)
    if summary is not None and client < len(summary.formats):
        choice, is_handwritten = Choice(parse_format(summary.formats[client])), False  # what they were split as
    else:
        is_handwritten = True
        data, task = experiment.config.data, experiment.config.task
        choice = guess_format("", data.format, task, source.rows(), "data.format")
    own = workspace.private(client)
    return Party(client, own, source, choice.format, guess=choice.guess, is_handwritten=is_handwritten)


def find_own(experiment: Experiment, client: int, home: Path | None = None) -> tuple[Home, Floors] | None:
    """Return a client's home and floors, whatever became of its rows; None where the home is not here.

    Raises ConfigError where a home is given that is not the client's.
    """
    record = _own_record(experiment, client, home)
    if record is not None:
        return find_home(experiment, client, home), record.floors
    if home is not None:
        raise ConfigError(
            f"{home} is not the home of client {client} of this workspace",
            hint="Name the folder that `fedcli client join` was given, or leave --home out.",
        )
    workspace = experiment.workspace
    is_simulation = experiment.identity is not None and experiment.identity.simulation is True
    is_joined = not is_simulation and workspace.has_joined(client)
    if is_joined or not _may_simulate(experiment) or not is_own(workspace):
        return None
    return workspace.private(client), USUAL_FLOORS


def is_here(federation: FederationState, client: int) -> bool:
    """Return whether a client can be trained from here without naming a home.

    A simulated one can in a simulation of this very user, who has not joined it.
    """
    if (record := _own_record(federation, client, None)) is not None:
        return record.region is None
    workspace = federation.workspace
    is_simulated = federation.identity.simulation is True or not workspace.has_joined(client)
    return is_simulated and _may_simulate(federation) and is_own(workspace) and not joined_as(federation)


def can_train(federation: FederationState, client: int) -> bool:
    """Return whether a client has rows that can be trained on from here without naming a home."""
    has_some = has_rows(federation.workspace, client) or _own_record(federation, client, None) is not None
    return has_some and is_here(federation, client)


def _own_record(experiment: Experiment, client: int, home: Path | None) -> PartyRecord | None:
    """Return what a home keeps of a client; None where it has not joined this workspace from there."""
    if experiment.identity is None:
        return None
    record = None
    with suppress(WorkspaceError, PermissionError):  # a user without a home directory has not joined from there
        record = read_party(find_home(experiment, client, home))
    is_own = record is not None and (record.workspace, record.client) == (experiment.identity.id, client)
    return record if is_own else None


def _joined(experiment: Experiment, registration: Registration, home: Path | None) -> Party:
    client = registration.client
    found = find_home(experiment, client, home)
    record = _own_record(experiment, client, home)
    if record is None:
        raise ConfigError(
            f"client {client} is a joined party, and its home is not {found.folder}",
            hint=f"Run this as the user who joined, or name the home: --home DIR. To join anew: "
            f"`fedcli client join --id {client} --data SOURCE`.",
        )
    if record.region is not None or record.format is None:
        where = "a region" if record.region is None else f"the region {record.region.child}"
        raise ConfigError(
            f"client {client} is {where}, whose parties hold the rows: it is not trained here",
            hint=f"Run `fedcli relay --id {client} -w PARENT --from REGION`.",
        )
    num_rows = registration.data.num_rows if record.num_rows is None else record.num_rows
    if num_rows is None:
        raise IntegrityError(
            f"{experiment.workspace.registration(client)} does not tell how many rows client {client} has, nor does "
            f"{found.party}",
            hint=f"Run `fedcli client join --id {client} --data SOURCE` again.",
        )
    try:
        source = find_source(
            record.source,
            Path.cwd(),
            subset=record.subset,
            split=record.split,
            delimiter=record.delimiter,
            encoding=record.encoding,
        )
    except ConfigError as error:
        again = f"`fedcli client join --id {client} --data SOURCE`"
        raise ConfigError(error.message, hint=f"Put it back, or name another source: {again}.") from error
    return Party(
        client=client,
        home=found,
        source=source,
        format=record.format,
        num_rows=num_rows,
        base=record.base,
        trust_remote_code=record.trust_remote_code,
        floors=record.floors,
        select=record.select,
        shares_scores=record.shares_scores,
        allow_code_execution=record.allow_code_execution,
    )


def find_home(experiment: Experiment, client: int, given: Path | None) -> Home:
    """Return a joined party's home: the one given, $FEDCLI_HOME or the default; it never lies in the workspace."""
    named = given or os.environ.get("FEDCLI_HOME")
    identity = experiment.identity or read_identity(experiment.workspace)
    home = Home(Path(named).absolute()) if named else default_home(identity.id, client)
    if home.folder.resolve().is_relative_to(experiment.workspace.root.resolve()):
        raise UsageError(
            f"--home {home.folder} lies in the workspace, where everybody could see it",
            hint="Name a folder outside of it.",
        )
    return home


def find_same_base(federation: FederationState, base: str, *, trust_remote_code: bool) -> "Inspection":
    """Return what the base model is, which must be the one that round 0 was opened with, and have no fault."""
    from fedcli.model.base import files_digest, find_base, fingerprint
    from fedcli.model.inspection import inspect

    expected = federation.head.manifest.model
    folder = find_base(base, revision=expected.revision, root=federation.workspace.root)
    # an earlier version may have opened round 0
    if expected.fingerprint not in (fingerprint(folder), files_digest(folder, of_version=1)):
        raise ConfigError(
            f"model.base: {folder} is not the base model of this federation ({expected.base}): its fingerprint differs",
            hint="Point model.base in fedcli.yaml (a joined party: `client join --base DIR`) to a copy of the very "
            "model that round 0 was opened with.",
        )
    return inspect(folder, trust_remote_code=trust_remote_code).require()
