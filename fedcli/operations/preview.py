"""What `fedcli data preview` shows: rows as they are trained on, token lengths, and every client's share."""

from collections import Counter
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedcli.data.encoded import EncodedExample, EncodedRows
from fedcli.data.encoding import Encoder, cut, require_encoded
from fedcli.data.file_rows import Row
from fedcli.data.formats import RowReader
from fedcli.errors import NotReadyError, UsageError, require_packages
from fedcli.model.base import find_base
from fedcli.model.inspection import inspect
from fedcli.model.loading import load_tokenizer
from fedcli.observer import Observer
from fedcli.parties.join import NO_LIMIT
from fedcli.parties.party import Party, find_party, find_same_base, trusts_code
from fedcli.parties.simulate import DataSummary, read_summary
from fedcli.report.rows_picture import Bar, draw
from fedcli.tasks.conversation import Item
from fedcli.tasks.format import TOO_LONG
from fedcli.workspace.federation_state import Experiment, FederationState, train_record
from fedcli.workspace.history import read_round
from fedcli.workspace.layout import Workspace
from fedcli.workspace.publish import publish_file
from fedcli.workspace.row_files import has_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_BINS = 12
NUM_SAMPLED = 2000
"""Rows of a client, the first of its file, whose tokens are counted."""


@dataclass(frozen=True)
class Piece:
    """A stretch of decoded tokens that are supervised, or not."""

    text: str
    is_supervised: bool


@dataclass(frozen=True)
class ShownRow:
    """A row: its columns, and what is made of it; a preference has two texts, chosen and rejected."""

    where: str
    fields: dict[str, Any]
    texts: list[list[Piece]]
    left_out: str | None = None
    """Why it is not used, as it is not."""


@dataclass(frozen=True)
class ClientShare:
    """What one client holds; token lengths are of rows as templated, before they are cut, of up to NUM_SAMPLED rows.

    What the template and train.max_length leave out is counted of these rows, what the format does of all.
    """

    client: int
    num_rows: int
    left_out: dict[str, int]
    num_cut: int
    """Rows that are longer than train.max_length."""
    num_truncated: int
    """Of these, the rows whose response is cut to fit."""
    num_too_long: int
    """Of these, the rows that are left out: their prompt leaves no room for a response."""
    num_tokens: list[int]
    groups: list[int]
    first_cases: dict[str, str]
    """The first row left out for each reason."""
    notes: dict[str, int]
    """Rows of which not all is used, by what is not."""
    unused: dict[str, int]
    """Rows that have a column, or a key inside one, which is not used."""
    guess: str | None
    """What was guessed of its rows, where they were written by hand."""


@dataclass(frozen=True)
class Preview:
    """All that is shown; `histogram` has the counts between consecutive `edges` of tokens a row."""

    rows: list[ShownRow]
    clients: list[ClientShare]
    groups: list[str]
    partition: Any
    max_length: int
    edges: list[int]
    histogram: list[int]
    num_sampled: int
    """Rows that were tokenised: the first NUM_SAMPLED of each client."""
    picture: Path | None
    """None where none was asked for and the package that draws is not installed."""


def preview(
    workspace: Workspace,
    *,
    client: int | None = None,
    home: Path | None = None,
    by: str | None = None,
    num_rows: int = 2,
    output: Path | None = None,
    observer: Observer,
) -> Preview:
    """Look at the rows of one client, or of every simulated one, and draw them into a PNG.

    `by` names a column whose values are counted for each client, instead of what the rows were split by.
    The picture of a joined party lies in its home, unless `output` names another place. Raises NotReadyError where
    there are no rows yet.
    """
    can_draw = find_spec("matplotlib") is not None
    if output is not None:
        require_packages(["matplotlib"])
    experiment: Experiment
    if read_round(workspace, 0) is None:
        experiment = Experiment.read(workspace)
        train = train_record(experiment.config, 0, experiment.config.federation.rounds)
    else:
        experiment = FederationState.open(workspace)
        train = experiment.head.manifest.train
    parties = _parties(experiment, client, home)
    tokenizer = _tokenizer(experiment, parties[0])
    encoder = Encoder(tokenizer, train.template, date=train.date)
    is_simulated = parties[0].num_rows is None
    summary = read_summary(workspace) if is_simulated else None
    max_length = train.max_length
    looking = _Looking(experiment.config.federation.seed, encoder, max_length, by, summary)
    shown: list[ShownRow] = []
    for party in parties:
        observer.client_started(party.client)
        items = looking.look_at(party)
        shown += [looking.show(tokenizer, row, item) for row, item in items[: max(0, num_rows - len(shown))]]
    shares, groups = looking.by_group()
    if not any(share.num_tokens for share in shares):
        require_encoded(looking.unusable, parties[0].source.location, looking.num_read, max_length)
    all_lengths = [length for share in shares for length in share.num_tokens]
    counts_, edges = np.histogram(all_lengths, bins=min(NUM_BINS, len(set(all_lengths))))
    folder = workspace.data if is_simulated else parties[0].home.folder
    picture = output or folder / ("preview.png" if client is None else f"preview-{client}.png")
    bars = [Bar(share.client, share.num_rows, share.groups) for share in shares]
    if can_draw:
        publish_file(picture, draw(bars, groups, all_lengths, max_length))
    return Preview(
        rows=shown,
        clients=shares,
        groups=groups,
        partition=summary.partition if summary else None,
        max_length=max_length,
        edges=[*(int(edge) for edge in np.ceil(edges[:-1])), int(edges[-1])],
        histogram=[int(count) for count in counts_],
        num_sampled=len(all_lengths),
        picture=picture if can_draw else None,
    )


@dataclass
class _Looking:
    """What has been seen of the parties' rows so far."""

    seed: int
    encoder: Encoder
    max_length: int
    by: str | None
    summary: DataSummary | None
    """How simulated clients' rows were split."""
    shares: list[ClientShare] = field(default_factory=list)
    values: list[Counter[str]] = field(default_factory=list)
    """How many rows of each client have each value of the column `by`."""
    unusable: EncodedRows = field(default_factory=EncodedRows)
    num_read: int = 0

    def look_at(self, party: Party) -> list[tuple[Row, Item]]:
        """Count a party's rows; return the first usable ones."""
        reader = RowReader(party.format, self.seed)
        items, values = _sample(reader, party, self.by)
        places = (row.where for row, _ in items)
        whole = self.encoder.encode((item for _, item in items), NO_LIMIT, places=places)
        used = cut(whole, self.max_length)
        used.include(reader)
        if self.summary is not None:  # what the split went by is used
            used.unused = Counter({name: used.unused[name] for name in used.unused if name in self.summary.unused})
        lengths = whole.lengths()
        self.num_read += reader.num_rows
        if not whole:
            self.unusable.extend(whole)
        self.values.append(values)
        self.shares.append(
            ClientShare(
                client=party.client,
                num_rows=reader.num_rows - used.left_out.total(),
                num_cut=int((lengths > self.max_length).sum()),
                num_truncated=used.num_truncated,
                num_too_long=used.left_out[TOO_LONG],
                num_tokens=lengths.tolist(),
                groups=self.summary.group_counts[party.client] if self.summary else [],
                guess=party.guess,
                **used.counts(),
            )
        )
        return items

    def show(self, tokenizer: "PreTrainedTokenizerBase", row: Row, item: Item) -> ShownRow:
        """Return a row, and what is made of it."""
        encoded = self.encoder.encode([item], self.max_length)
        texts = [_pieces(tokenizer, side) for used_row in encoded for side in used_row.sides]
        why = next((f"{reason}: {detail}" for reason, detail in encoded.first_cases.items()), None)
        return ShownRow(row.where, dict(row.fields), texts, why)

    def by_group(self) -> tuple[list[ClientShare], list[str]]:
        """Return the clients' shares and the groups that they count: those of the split, or of the column `by`."""
        if self.by is None:
            return self.shares, self.summary.groups if self.summary else []
        groups = sorted(set().union(*self.values))
        counted = zip(self.shares, self.values, strict=True)
        return [replace(share, groups=[values[name] for name in groups]) for share, values in counted], groups


def _parties(experiment: Experiment, client: int | None, home: Path | None) -> list[Party]:
    workspace, config = experiment.workspace, experiment.config
    if client is not None:
        experiment.check_clients([client])
        return [find_party(experiment, client, home)]
    clients = [client for client in range(config.federation.clients) if has_rows(workspace, client)]
    if not clients:
        raise NotReadyError(
            f"there are no rows to look at: {workspace.data} holds none",
            hint="Split data.source with `fedcli data partition`; a joined party names itself: --id N.",
        )
    return [find_party(experiment, client) for client in clients]


def _tokenizer(experiment: Experiment, party: Party) -> "PreTrainedTokenizerBase":
    config, root = experiment.config, experiment.workspace.root
    base = party.base_of(config)
    trusts = trusts_code(experiment, party)
    if isinstance(experiment, FederationState):
        folder = find_same_base(experiment, base, trust_remote_code=trusts).folder
    else:
        folder = find_base(base, revision=config.model.revision, root=root)
        inspect(folder, trust_remote_code=trusts).require()
    return load_tokenizer(folder, trust_remote_code=trusts)


def _sample(reader: RowReader, party: Party, by: str | None) -> tuple[list[tuple[Row, Item]], Counter[str]]:
    """Return a party's first usable rows, and how many of all have each value of a column."""
    items: list[tuple[Row, Item]] = []
    values: Counter[str] = Counter()
    for row, item in reader.read(party.source.rows()):
        if len(items) < NUM_SAMPLED:
            items.append((row, item))
        if by is not None:
            if by not in row.fields:
                columns = ", ".join(map(str, row.fields))
                raise UsageError(f"{row.where} has no column {by!r}; it has {columns}", hint="Correct --by.")
            values[str(row.fields[by])] += 1
    reader.require_rows(party.source.location)
    return items, values


def _pieces(tokenizer: "PreTrainedTokenizerBase", example: EncodedExample) -> list[Piece]:
    """Decode stretches of tokens that are supervised or not; spaces between stretches stay where they are."""
    turns = [0, *(np.flatnonzero(np.diff(example.supervised)) + 1), len(example.ids)]
    pieces = []
    before = ""
    for start, end in pairwise(map(int, turns)):
        text = str(tokenizer.decode(example.ids[:end].tolist()))
        pieces.append(Piece(text[len(before) :], bool(example.supervised[start])))
        before = text
    return pieces
