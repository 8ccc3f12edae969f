"""Which of a party's rows a round trains on: scores of the model that the party starts from, which stay in its home."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from fedcli.algos import Arrays
from fedcli.config import SelectConfig
from fedcli.config.select import selection_fault
from fedcli.data.encoded import EncodedExample, EncodedRow, EncodedRows
from fedcli.data.row_report import RowReport
from fedcli.data.selection import MISALIGNED, Losses, histogram, in_order, kept, score_of
from fedcli.errors import ConfigError
from fedcli.parties.party import Party
from fedcli.tasks import Task
from fedcli.workspace.caches import read_losses, save_losses
from fedcli.workspace.layout import Home
from fedcli.workspace.records import Manifest, RowScores
from fedcli.workspace.train_records import TrainRecord

if TYPE_CHECKING:
    from fedcli.model.lora import AdaptedModel

MOST_SHOWN = 60
"""Characters of a response that is shown as an example."""


@dataclass(frozen=True)
class Selection:
    """The rows that a round trains on, by their places; an audit's canaries are never dropped."""

    select: SelectConfig
    places: "list[int]"
    scores: list[float]
    """Of all rows."""
    num_own: int
    """The rows that are kept, canaries aside."""
    report: RowReport
    """What is dropped, with the first case."""
    table: RowScores
    """How many rows have which score."""

    def in_order(self, places: Sequence[int]) -> list[int]:
        """Return a round's rows in the order in which they are trained on."""
        return in_order(self.select.order, places, self.scores)


def wanted_selection(party: Party | None, train: TrainRecord, task: Task, manifest: Manifest) -> SelectConfig | None:
    """Return how a party's rows are selected: its own choice, else as the round asks; None: all are trained on.

    Raises ConfigError where the round's task or privacy excludes it.
    """
    own = None if party is None else party.select
    if own == "off" or (own is None and train.select is None):
        return None
    select = own or train.select
    assert select is not None
    unit = None if manifest.privacy is None else manifest.privacy.unit
    where = "data.select" if own is None else "your --select"
    if fault := selection_fault(select, task, unit, where):
        raise ConfigError(fault, hint="Join again with --select off, which trains on all your rows.")
    return select


def select_rows(rows: EncodedRows, select: SelectConfig, losses: Sequence[Losses], decode: "Decoder") -> Selection:
    """Return the rows that are kept; raise ConfigError where none is."""
    scores = [score_of(select.score, each) for each in losses]
    own = scores[: rows.num_own]
    places = kept(select, own).tolist()
    report, standing = RowReport(), {*places}
    dropped = sorted((place for place in range(len(own)) if place not in standing), key=own.__getitem__)
    told = ""
    if places and select.keep < 1:
        least = min(own[place] for place in places)
        first = ", of equal ones the first rows" if dropped and own[dropped[-1]] == least else ""
        told = f", and {least:.4g} or more is kept{first}"
    for place in dropped:
        is_misaligned = select.score == "ifd" and own[place] >= MISALIGNED
        reason = f"ifd of {MISALIGNED:g} or more" if is_misaligned else f"{select.score} too low"
        shown = "" if reason in report.left_out else f"{decode(rows[place])!r} has {own[place]:.4g}{told}"
        report.leave_out(reason, shown, "")
    if not places:
        raise ConfigError(
            f"data.select keeps none of {len(own)} rows: under the model that the round starts from no prompt makes "
            "its response likelier (ifd is 1 or more)",
            hint="Set data.select.score to ira, which keeps the best share in any case; or check data.template.",
        )
    table = RowScores.of(select.score, histogram(select.score, own))
    planted = range(rows.num_own, len(rows))
    return Selection(select, [*places, *planted], scores, len(places), report, table)


class Decoder:
    """Writes a row's response as the beginning of a text."""

    def __init__(self, adapted: "AdaptedModel") -> None:
        self._tokenizer = adapted.tokenizer

    def __call__(self, row: EncodedRow) -> str:
        side = row.sides[0]
        text = str(self._tokenizer.decode(side.ids[side.supervised].tolist(), skip_special_tokens=True)).strip()
        return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def losses_of(
    rows: EncodedRows,
    select: SelectConfig,
    adapted: "AdaptedModel",
    adapter: Arrays,
    home: Home,
    model: str,
    beside: Mapping[str, Arrays] = MappingProxyType({}),
) -> list[Losses]:
    """Return the losses of each row's response, a pair's chosen one, of the model with an adapter.

    `beside` are frozen adapters that the model uses, too. The losses of one adapter are kept in the home, and take the
    place of another's. `model` tells base models apart. A length needs no model. Raises ConfigError for a row
    without a prompt.
    """
    if select.score == "length":
        return [Losses(0.0, 0.0, _num_learnt(row.sides[0])) for row in rows]
    start = _start_id(adapted)
    digest = " ".join(map(_digest, (adapter, *beside.values())))
    key = hashlib.sha256(f"{model} {digest} {start}".encode()).hexdigest()[:32]
    known = read_losses(home, key)
    by_row = {row.key: row for row in rows}
    if missing := {name: row for name, row in by_row.items() if name not in known}:
        from fedcli.model.likelihood import reference_log_probs

        adapted.load(adapter, beside)
        asked = [_both(row, start) for row in missing.values()]
        known |= zip(missing, reference_log_probs(adapted, asked), strict=True)
        save_losses(home, key, {name: known[name] for name in by_row})
    return list(_means(rows, known))


def _means(rows: EncodedRows, known: dict[bytes, tuple[float, ...]]) -> Iterator[Losses]:
    for row in rows:
        count = _num_learnt(row.sides[0])
        given, alone = (-log_prob / count for log_prob in known[row.key])
        yield Losses(given, alone, count)


def _both(row: EncodedRow, start: int) -> EncodedRow:
    """Return a row's response with its prompt, and behind nothing but a start token, as two sides of a row."""
    side = row.sides[0]
    if side.supervised[0] or side.prompt_length < 2:
        raise ConfigError(
            "data.select: a row is a text without a prompt, and ira and ifd compare a response with and without one",
            hint="Set data.select.score to length, or data.select to null.",
        )
    ids = np.concatenate([np.array([start], np.int32), side.ids[side.supervised]])
    alone = EncodedExample(ids, np.arange(len(ids)) > 0)
    return EncodedRow((side, alone))


def _start_id(adapted: "AdaptedModel") -> int:
    """Return the token that a response is read behind where it has no prompt: the start token, else the end token."""
    tokenizer = adapted.tokenizer
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id):
        if isinstance(token, int):
            return token
    return adapted.pad_id


def _num_learnt(side: EncodedExample) -> int:
    return int(side.supervised[1:].sum())


def _digest(adapter: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(adapter):
        digest.update(f"{name} {adapter[name].dtype} {adapter[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(adapter[name]).data)
    return digest.hexdigest()
