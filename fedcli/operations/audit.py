"""`fedcli audit measure`: what models know of a client's canaries and rows; at the client, and only numbers leave."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedcli.client.canaries import CODE_LETTERS, LETTERS, code_of, encode_canaries
from fedcli.client.runtimes import Runtimes
from fedcli.data.encoded import EncodedExample, EncodedRow, EncodedRows
from fedcli.data.formats import RowReader
from fedcli.data.source import find_source
from fedcli.errors import NotReadyError, UsageError, require_packages
from fedcli.eval.requests import Likelihood, LogLikelihood
from fedcli.observer import Observer
from fedcli.operations.audit_figures import (
    CanaryReading,
    ModelFigures,
    RowFigures,
    Scores,
    canary_figures,
    less,
    scores_of,
    separations,
)
from fedcli.operations.audit_models import BASE, SEEN_BY, AuditedModel, find_models
from fedcli.parties.party import Party, find_party
from fedcli.privacy.audit_statistics import CONFIDENCE, Estimate, rank_among, share
from fedcli.tasks.conversation import Turn
from fedcli.workspace.canaries import Canary, CanaryKind, Planted, read_canaries, save_measurement
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.layout import round_name

if TYPE_CHECKING:
    from fedcli.client.runtime import Runtime
    from fedcli.model.token_figures import TokenFigures

NUM_FILLINGS = 256
"""|R|: the canary and random fillings of its place; an exposure is log2 of it at most."""
NUM_ROWS = 256
"""Of the client's own rows, and of held-out ones, at most so many are looked at, at random."""
EXTRACTED_TOKENS, PREFIX_TOKENS = 50, 32
"""A row is extracted where greedy decoding writes so many tokens of its response; of a text, behind so many."""


@dataclass(frozen=True)
class Measurement:
    """What an audit found; nothing in it tells a row, a canary or who was in."""

    workspace: str
    client: int
    round: int
    first_round: int
    """The first round that was trained with the canaries."""
    num_canaries: int
    num_included: int
    num_fillings: int
    confidence: float
    models: list[ModelFigures]
    not_measured: dict[str, str] = field(default_factory=dict)
    """Why there are no figures of something."""
    files: list[Path] = field(default_factory=list)


def measure(
    federation: FederationState,
    client: int,
    *,
    home: Path | None,
    number: int | None,
    held_out: Path | None,
    num_fillings: int = NUM_FILLINGS,
    num_rows: int = NUM_ROWS,
    has_picture: bool = True,
    runtimes: Runtimes,
    observer: Observer,
) -> Measurement:
    """Measure what the models of a federation know of a client's canaries and rows, and keep that in its home.

    Raises NotReadyError where nothing is planted, or nothing was trained since, UsageError for counts that will not do.
    """
    if has_picture:
        require_packages(["matplotlib"])
    if num_fillings < 2 or num_rows < 1:
        raise UsageError("--fillings must be 2 or more, --rows 1 or more", hint="Leave them out for the usual ones.")
    federation.check_clients([client])
    party = find_party(federation, client, home)
    planted = read_canaries(party.home)
    if planted is None:
        raise NotReadyError(
            f"client {client} has no canaries: nothing is planted in {party.home.folder}",
            hint=f"`fedcli audit plant --id {client}`, then train a round.",
        )
    models, not_measured = find_models(federation, client, planted, number)
    runtime = runtimes.load(party, observer)
    audit = _Audit(federation, party, planted, runtime, num_fillings, observer)
    audit.choose_rows(held_out, num_rows)
    if held_out is None:
        not_measured["rows"] = "membership of rows: name rows that were never trained on with --held-out FILE"
    figures: list[ModelFigures] = []
    base: list[Scores] | None = None
    for model in models:
        readings = audit.read(model)
        figures.append(audit.figures(model, readings, base))
        base = base or readings.scores
    measured = Measurement(
        workspace=federation.identity.id,
        client=client,
        round=federation.head.number if number is None else number,
        first_round=planted.first_round,
        num_canaries=len(planted.canaries),
        num_included=len(planted.included),
        num_fillings=num_fillings,
        confidence=CONFIDENCE,
        models=figures,
        not_measured=not_measured,
    )
    document = json.dumps({**asdict(measured), "files": []}, indent=1, sort_keys=True).encode() + b"\n"
    picture = _draw(measured) if has_picture else None
    measured.files.extend(save_measurement(party.home, f"round-{round_name(measured.round)}", document, picture))
    return measured


@dataclass(frozen=True)
class _Readings:
    """What a model says: scores of canaries, members and others, in this order; and of canaries that were in more."""

    scores: list[Scores]
    ranks: dict[int, int]
    written: set[int]
    extracted: Estimate | None


class _Audit:
    """What models are asked, the same of each."""

    def __init__(
        self,
        federation: FederationState,
        party: Party,
        planted: Planted,
        runtime: "Runtime",
        num_fillings: int,
        observer: Observer,
    ) -> None:
        self._federation, self._party, self._planted, self._runtime = federation, party, planted, runtime
        self._train = federation.head.manifest.train
        self._encoder = runtime.encoder(self._train.template)
        self._observer = observer
        self._num_fillings = num_fillings
        self._rows: list[EncodedRow] = [
            *encode_canaries(planted.kind, planted.canaries, self._encoder, self._train.max_length)
        ]
        self._members, self._others, self._num_shared, self._has_others = range(0), range(0), 0, False
        self._fillings = {
            place: _fillings(planted, place, num_fillings)
            for place, canary in enumerate(planted.canaries)
            if canary.is_included
        }

    def choose_rows(self, held_out: Path | None, most: int) -> None:
        """Choose which of the client's own rows are looked at, and which of those in a file that was held out."""
        own = self._runtime.rows(self._party, self._train)
        generator = np.random.default_rng([*bytes.fromhex(self._planted.seed), 1])
        chosen = np.sort(generator.permutation(own.num_own)[:most])
        self._members = self._add(own[int(place)] for place in chosen)
        if held_out is None:
            return
        from fedcli.data.encoding import encode_source

        source = find_source(str(held_out), Path.cwd())
        reader = RowReader(self._party.format, self._train.seed)
        rows: EncodedRows = encode_source(self._encoder, reader, source, self._train.max_length)
        known = {own[place].key for place in range(own.num_own)}
        fresh = [row for row in rows if row.key not in known]
        self._has_others, self._num_shared = True, len(rows) - len(fresh)
        if not fresh:
            raise UsageError(
                f"--held-out {held_out}: all of its {len(rows)} rows are among the client's own",
                hint="Name rows that were never trained on, of the same kind and time.",
            )
        self._others = self._add(fresh[int(place)] for place in np.sort(generator.permutation(len(fresh))[:most]))

    def _add(self, rows: Iterable[EncodedRow]) -> range:
        start = len(self._rows)
        self._rows.extend(rows)
        return range(start, len(self._rows))

    def read(self, model: AuditedModel) -> _Readings:
        """Ask a model of all rows, and of fillings of the canaries that were in."""
        from fedcli.model.finite import check_answers
        from fedcli.model.token_figures import token_figures

        adapted: Any = self._runtime.adapted
        adapted.load(model.arrays)
        check_answers(adapted.model)
        sides: list[EncodedExample] = [side for row in self._rows for side in row.sides]
        width = len(self._rows[0].sides)
        self._observer.target_started(model.name, "rows and canaries")
        found: dict[int, TokenFigures] = {}
        for place, figures in token_figures(adapted, sides):
            found[place] = figures
            self._observer.answered(len(found), len(sides))
        by_row = [[found[start + side] for side in range(width)] for start in range(0, len(sides), width)]
        ranks, written = self._ask_fillings(model.name)
        return _Readings(
            [*map(scores_of, by_row)], ranks, written, self._extracted([by_row[each][0] for each in self._members])
        )

    def _ask_fillings(self, name: str) -> tuple[dict[int, int], set[int]]:
        """Return the rank of each canary that was in, and those whose secret greedy decoding writes."""
        from fedcli.eval.local_model import LocalModel

        adapted = self._runtime.adapted
        engine = LocalModel(adapted.model, adapted.tokenizer, self._encoder)
        asked = [
            (place, _request(self._planted.kind, self._planted.canaries[place], code))
            for place, fillings in self._fillings.items()
            for code in (self._planted.canaries[place].response, *fillings)
        ]
        answers: dict[int, tuple[float, bool]] = {}
        self._observer.target_started(name, "exposure")

        def keep(index: int, answer: LogLikelihood) -> None:
            answers[index] = (answer.log_prob, answer.is_greedy)
            self._observer.answered(len(answers), len(asked))

        engine.log_likelihoods([request for _, request in asked], keep)
        ranks, written = {}, set()
        for number, place in enumerate(self._fillings):
            first = number * self._num_fillings
            ranks[place] = rank_among(
                answers[first][0], [answers[first + more][0] for more in range(1, self._num_fillings)]
            )
            if answers[first][1]:
                written.add(place)
        return ranks, written

    def _extracted(self, members: "Sequence[TokenFigures]") -> Estimate | None:
        """Return the share of the client's own rows that greedy decoding writes; None where none is long enough."""
        first = PREFIX_TOKENS if self._planted.kind == "text" else 0
        long = [each.is_likeliest[first:] for each in members if len(each.is_likeliest) >= first + EXTRACTED_TOKENS]
        return share(sum(bool(each[:EXTRACTED_TOKENS].all()) for each in long), len(long)) if long else None

    def figures(self, model: AuditedModel, readings: _Readings, base: list[Scores] | None) -> ModelFigures:
        """Return a model's figures; `base` is what the base says, None for itself."""
        canaries = self._planted.canaries
        read = [
            CanaryReading(readings.scores[place], readings.ranks.get(place), place in readings.written)
            for place in range(len(canaries))
        ]
        of_base = None if base is None else dict(enumerate(base))
        separation = None
        if base is not None and self._has_others:
            members, others = (
                [less(readings.scores[place], base[place]) for place in places]
                for places in (self._members, self._others)
            )
            separation = separations(members, others)
        return ModelFigures(
            name=model.name,
            what=model.what,
            seen_by=SEEN_BY[model.name],
            promise=model.promise,
            canaries=canary_figures(canaries, read, of_base, model.promise, self._num_fillings),
            rows=RowFigures(len(self._members), separation, readings.extracted, self._num_shared),
        )


def _fillings(planted: Planted, place: int, num_fillings: int) -> list[str]:
    """Return random secrets that could stand in a canary's place: one less than |R|, none of them its own."""
    secret = planted.canaries[place].response
    generator = np.random.default_rng([*bytes.fromhex(planted.seed), 2, place])
    found: dict[str, None] = {}
    while len(found) < num_fillings - 1:
        code = code_of(generator.integers(len(LETTERS), size=CODE_LETTERS).tolist())
        if code != secret:
            found[code] = None
    return list(found)


def _request(kind: CanaryKind, canary: Canary, code: str) -> Likelihood:
    if kind == "text":
        return Likelihood(canary.prompt, f" {code}")
    return Likelihood((Turn("user", canary.prompt),), code)


def _draw(measured: Measurement) -> bytes:
    from fedcli.report.audit_picture import Panel, draw_audit

    panels = []
    for model in measured.models:
        apart = [each for each in model.canaries if each.repeat is not None]
        panels.append(
            Panel(
                name=model.name if model.name == BASE else f"{model.name}: {model.what}",
                repeats=[each.repeat or 0 for each in apart],
                medians=[each.median_exposure for each in apart],
                highest=[each.highest_exposure for each in apart],
                bounds=[None if each.bound is None else each.bound.epsilon for each in apart],
                promised=[None if each.promised is None else each.promised[0] for each in apart],
            )
        )
    return draw_audit(panels, measured.num_fillings)
