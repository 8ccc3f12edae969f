"""Joining: a real party reads its rows, which stay where they are, and shows a card of them."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from fedcli.config import SourceEntry, describe_select, read_format, read_select
from fedcli.config.select import selection_fault
from fedcli.data.formats import RowReader, choose_split, format_name, guess_format
from fedcli.data.row_report import describe_rows
from fedcli.data.source import Source, absolute_path, find_source
from fedcli.errors import ConfigError, FedError, UsageError, WorkspaceError
from fedcli.observer import Observer
from fedcli.parties.party import find_home, find_same_base
from fedcli.tasks import TASKS
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.floors import USUAL_FLOORS, Asked, describe_floors, faults, parse_floors
from fedcli.workspace.layout import Home, Workspace, default_home
from fedcli.workspace.locks import hold
from fedcli.workspace.publish import PRIVATE_FOLDER_MODE, make_folder
from fedcli.workspace.registrations import (
    DataCard,
    PartyRecord,
    Registration,
    make_home,
    read_party,
    read_registration,
    register,
    save_party,
)
from fedcli.workspace.row_files import has_rows

if TYPE_CHECKING:
    from fedcli.data.encoded import EncodedRows

Share = Literal["full", "minimal"]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NO_LIMIT = 2**30
"""Tokens: rows are measured whole."""


@dataclass(frozen=True)
class Joining:
    """A party that is ready to join: what the workspace will learn, and what its home will keep."""

    workspace: Workspace
    home: Home
    record: PartyRecord
    card: DataCard
    remarks: tuple[str, ...]
    """What only the party is told of its rows: what was guessed, left out and not used, and where."""

    kept: tuple[str, ...] = ()
    """Options that it chose when it joined before, and that hold again."""
    federation: FederationState | None = None

    def commit(self) -> str | None:
        """Write the home's record, then the registration; return the fingerprint of its keys, where it has any."""
        client = self.record.client
        make_home(self.home)
        with suppress(WorkspaceError):  # so that every command of this user knows it, whatever lies in the workspace
            mark = default_home(self.record.workspace, client).folder
            if not mark.resolve().is_relative_to(self.workspace.root.resolve()):
                make_folder(mark, PRIVATE_FOLDER_MODE)
        with hold(self.home.lock, f"client {client}"):
            save_party(self.home, self.record)
            registration = Registration(workspace=self.record.workspace, client=client, data=self.card)
            if self.record.server is None or self.federation is None:
                register(self.workspace, registration)
                return None
            from fedcli.parties.membership import register_signed
            from fedcli.trust.keys import fingerprint

            return fingerprint(register_signed(self.federation, self.home, registration))


@dataclass(frozen=True)
class JoinChoices:
    """What a party says when it joins. None, and no floors: what it said when it joined before, else the default.

    `subset`, `split`, `delimiter`, `encoding` and `format` hold again for the same rows alone. `server` is the
    fingerprint that the server must have, `floors` are KEY=VALUE, `select` is off, or a section in YAML.
    """

    data: str
    format: str | None = None
    subset: str | None = None
    split: str | None = None
    delimiter: str | None = None
    encoding: str | None = None
    base: str | None = None
    trust_remote_code: bool = False
    allow_code_execution: bool = False
    share: Share | None = None
    server: str | None = None
    floors: Sequence[str] = ()
    select: str | None = None
    shares_scores: bool | None = None


def prepare_join(
    federation: FederationState, client: int, choices: JoinChoices, *, home: Path | None = None, observer: Observer
) -> Joining:
    """Read a real party's rows, which stay where they are, and make the card that its registration will show.

    Writes nothing. Raises UsageError for an id or a home that will not do, ConfigError for rows that cannot be used, or
    not selected so, WorkspaceError where another party has this id.
    """
    if not choices.data.strip():
        raise UsageError("--data names nothing", hint="Name your rows: a file, a folder, or a hub id.")
    federation.check_clients([client])
    workspace, config, manifest = federation.workspace, federation.config, federation.head.manifest
    if federation.identity.simulation:
        raise ConfigError(
            f"{workspace.address} is a simulation, which no party joins",
            hint="Parties join a workspace with data.source: null, made by `fedcli init --set data.source=null`.",
        )
    found = find_home(federation, client, home)
    check_free(workspace, client, found, federation.identity.id)
    before = read_party(found)
    if before is not None and before.region is not None:
        raise UsageError(
            f"client {client} is the region {before.region.child}, whose parties hold the rows",
            hint="Take another id: a region joins by `fedcli relay` alone.",
        )
    record, kept = _record_choices(federation, client, choices, before)
    if record.select is not None and record.select != "off":
        unit = None if manifest.privacy is None else manifest.privacy.unit
        if odd := selection_fault(record.select, TASKS[config.task], unit, "--select"):
            raise ConfigError(odd, hint="Leave --select out, or join with --select off.")
    pin = None
    if federation.identity.signatures is not None:
        from fedcli.parties.membership import pin_server

        pin = pin_server(federation, choices.server, None if before is None else before.server)
    ways = {"delimiter": record.delimiter, "encoding": record.encoding}
    source = find_source(record.source, Path.cwd(), subset=record.subset, split=record.split, **ways)
    choice = guess_format(choices.data, record.format, config.task, source.rows(), "--format")
    record = record.model_copy(update={"format": choice.format, "server": pin})
    reader = RowReader(choice.format, config.federation.seed)
    told: RowReader | EncodedRows = reader
    if record.share == "minimal":
        if record.base is not None:
            _own_base(federation, record)
        card = _minimal_card(reader, source, observer)
    else:
        card, told = _full_card(federation, record, reader, source, observer)
    if manifest.privacy is not None and manifest.privacy.group_by is not None:
        del told.unused[manifest.privacy.group_by]  # a Counter; it tells whose row this is
    guess = () if choice.guess is None else (choice.guess,)
    refused = [
        f"with your floors you do not train round {federation.head.number}: it {fault} (--floor {allow} would allow it)"
        for fault, allow in faults(record.floors, Asked.by(manifest, card.num_rows or 0))
    ]
    remarks = (*guess, *source.remarks(), *describe_rows(told), *refused)
    if manifest.withholds:
        record = record.model_copy(update={"num_rows": card.num_rows})
        card = DataCard(format=card.format)
    return Joining(workspace, found, record, card, remarks, kept, federation)


def _record_choices(
    federation: FederationState, client: int, choices: JoinChoices, before: PartyRecord | None
) -> tuple[PartyRecord, tuple[str, ...]]:
    """Return what a party chose, now or before, and the options that hold as before.

    The record's format is None where none is named, and its server is not set.
    """
    location = absolute_path(choices.data)
    usual = PartyRecord(
        workspace=federation.identity.id,
        client=client,
        source=location,
        format=None,
        subset=None,
        split=None,
        base=None,
        trust_remote_code=choices.trust_remote_code,
        allow_code_execution=choices.allow_code_execution,
    )
    earlier = usual if before is None else before
    rows = earlier if earlier.source == location else usual
    usual_split = choose_split(choices.data, None)
    kept: list[str] = []

    def keep(option: str, given: str | None, chosen: str | None) -> Any:
        if given is not None or chosen is None:
            return given
        kept.append(f"{option} {chosen}")
        return chosen

    named = None if choices.format is None else read_format(choices.format, federation.config.task)
    floors = parse_floors(choices.floors, earlier.floors)
    if not choices.floors and earlier.floors != USUAL_FLOORS:
        kept.append(describe_floors(earlier.floors))
    share = keep("--share", choices.share, None if earlier.share == "full" else earlier.share)
    base = keep("--base", choices.base, earlier.base)
    subset = keep("--subset", choices.subset, rows.subset)
    split = keep("--split", choices.split, None if rows.split == usual_split else rows.split)
    delimiter = keep("--delimiter", choices.delimiter, rows.delimiter)
    encoding = keep("--encoding", choices.encoding, rows.encoding)
    if named is None and rows.is_format_given and rows.format is not None:
        named = rows.format
        kept.append(f"--format {format_name(named)}")
    select = earlier.select if choices.select is None else read_select(choices.select)
    if choices.select is None and select is not None:
        kept.append(f"--select {describe_select(select)}")
    if choices.shares_scores is None and earlier.shares_scores:
        kept.append("--share-scores")
    try:
        reading = SourceEntry(source=choices.data, delimiter=delimiter, encoding=encoding)
    except ValidationError as error:
        fault = error.errors()[0]
        problem = fault["msg"].removeprefix("Value error, ")
        raise UsageError(f"--{fault['loc'][0]}: {problem}", hint="See `fedcli client join --help`.") from error
    chosen = {
        "format": named,
        "is_format_given": named is not None,
        "subset": subset,
        "split": choose_split(choices.data, split),
        "delimiter": reading.delimiter,
        "encoding": reading.encoding,
        "base": None if base is None else absolute_path(base),
        "share": share or "full",
        "floors": floors,
        "select": select,
        "shares_scores": earlier.shares_scores if choices.shares_scores is None else choices.shares_scores,
    }
    return usual.model_copy(update=chosen), tuple(kept)


def refresh_registration(
    federation: FederationState, client: int, home: Path | None, *, observer: Observer
) -> tuple[int, int] | None:
    """Register a party's rows anew where there are more or fewer than it registered, with all that it chose before.

    Returns how many there were and are; None where nothing has changed. Raises UsageError where the client has not
    joined from here.
    """
    found = find_home(federation, client, home)
    record, registration = read_party(found), read_registration(federation.workspace, client)
    if record is None or registration is None or record.client != client:
        raise UsageError(
            f"client {client} has not joined from {found.folder}", hint="--refresh is for parties that have joined."
        )
    if record.region is not None:
        raise UsageError(
            f"client {client} is the region {record.region.child}, whose parties hold the rows",
            hint="`fedcli relay` registers as many as they have registered.",
        )
    choices = JoinChoices(
        record.source,
        split=record.split,
        trust_remote_code=record.trust_remote_code,
        allow_code_execution=record.allow_code_execution,
    )
    joining = prepare_join(federation, client, choices, home=home, observer=observer)
    before = registration.data.num_rows if record.num_rows is None else record.num_rows
    after = joining.record.num_rows if joining.card.num_rows is None else joining.card.num_rows
    if joining.card != registration.data:
        joining.commit()
    elif before != after:
        with hold(found.lock, f"client {client}"):  # the workspace is not told, nor that anything has changed
            save_party(found, joining.record)
    else:
        return None
    return before or 0, after or 0


def _own_base(federation: FederationState, record: PartyRecord) -> Path:
    try:
        base = record.base or federation.config.model.base
        return find_same_base(federation, base, trust_remote_code=record.trust_remote_code).folder
    except FedError as error:
        if record.base is None:
            error.hint += " Or name your own copy with --base DIR."
        else:
            error.hint = "Let --base name a copy of the very model that round 0 was opened with."
        raise


def check_free(workspace: Workspace, client: int, home: Home, workspace_id: str) -> None:
    """Nobody else may have this id, and the home no other client."""
    if has_rows(workspace, client):
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


def _minimal_card(reader: RowReader, source: Source, observer: Observer) -> DataCard:
    for count, _ in enumerate(reader.read(source.rows()), 1):
        if count % 1000 == 0:
            observer.rows_read("reading rows", count)
    reader.require_rows(source.location)
    return DataCard(num_rows=reader.num_usable)


def _full_card(
    federation: FederationState, record: PartyRecord, reader: RowReader, source: Source, observer: Observer
) -> "tuple[DataCard, EncodedRows]":
    import numpy as np

    from fedcli.data.encoding import Encoder, encode_source
    from fedcli.model.loading import load_tokenizer

    folder = _own_base(federation, record)
    num_read = 0

    def count(more: int) -> None:
        nonlocal num_read
        num_read += more
        observer.rows_read("reading rows", num_read)

    tokenizer = load_tokenizer(folder, trust_remote_code=record.trust_remote_code)
    train = federation.start.manifest.train
    encoder = Encoder(tokenizer, train.template, date=train.date)
    rows = encode_source(encoder, reader, source, NO_LIMIT, count)
    quantiles = np.quantile(rows.lengths(), QUANTILES, method="nearest")
    card = DataCard(
        num_rows=reader.num_usable,
        format=None if record.format is None else format_name(record.format),
        left_out=dict(rows.left_out),
        token_quantiles={f"{share:g}": int(value) for share, value in zip(QUANTILES, quantiles, strict=True)},
    )
    return card, rows
