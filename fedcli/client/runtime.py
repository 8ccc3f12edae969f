"""A base model that is loaded once, and trains one client's adapter after another."""

import functools
import gc
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pkgutil import resolve_name
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from fedcli.algos import Array, Arrays, ClientRule
from fedcli.client.answering import check_able, check_rows, scorer
from fedcli.client.canaries import plant
from fedcli.client.row_tokens import read_encoded
from fedcli.config import TemplateChoice
from fedcli.config.adapter_config import parse_adapter_config
from fedcli.data.order import draw
from fedcli.errors import ConfigError, RequirementError
from fedcli.model.bitsandbytes import require_bitsandbytes, without_bitsandbytes
from fedcli.model.loading import has_bfloat16, short_memory
from fedcli.observer import Observer
from fedcli.parties.party import Party, find_party, find_same_base, trusts_code
from fedcli.randomness import stream_seed
from fedcli.tasks import TASKS
from fedcli.training.reports import StepReport, TrainSettings
from fedcli.training.work import Answering, RoundWork
from fedcli.workspace.caches import read_reference, reference_key, save_reference
from fedcli.workspace.canaries import Planted, read_canaries
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.history import Round
from fedcli.workspace.layout import ADAPTER_CONFIG_NAME, Home
from fedcli.workspace.publish import PRIVATE_FOLDER_MODE, make_folder, temporary_folder
from fedcli.workspace.train_records import TrainRecord

if TYPE_CHECKING:
    from fedcli.client.private_round import PrivateSteps
    from fedcli.client.runtimes import KeptModel
    from fedcli.client.selection import Selection
    from fedcli.data.encoded import EncodedRow, EncodedRows
    from fedcli.data.encoding import Encoder
    from fedcli.training.limits import TimeLimit
    from fedcli.training.moments import Moments

LOSS_ROWS = 256
"""Rows on which adapters are compared, at most: fewer tell little."""


class Runtime:
    """The loaded model of a workspace; one process makes one and trains any client of any round with it.

    Loading costs seconds (torch, transformers, the weights), so the cheap checks of a command come before it. A joined
    `party` may have its own copy of the base model, and trusts remote code or not by itself. Raises RequirementError
    where the base model is missing, ConfigError where it is not the federation's.
    """

    def __init__(
        self,
        federation: FederationState,
        *,
        threads: int | None = None,
        party: Party | None = None,
        kept: "KeptModel | None" = None,
    ) -> None:
        config, manifest = federation.config, federation.head.manifest
        self._federation = federation
        self.observer = Observer()
        self._task = TASKS[manifest.task]
        self._fingerprint = manifest.model.fingerprint
        base = party.base_of(config) if party else config.model.base
        trusts = trusts_code(federation, party)
        self._base = find_same_base(federation, base, trust_remote_code=trusts)
        folder = self._base.folder
        quantization = manifest.model.quantization
        require_bitsandbytes(quantization)
        contents = federation.head.read(ADAPTER_CONFIG_NAME)
        adapter_config = parse_adapter_config(contents, federation.head.folder / ADAPTER_CONFIG_NAME)
        with without_bitsandbytes(quantization == "none" and self._base.quantization is None):
            _import_stack()
            if threads is not None:
                import torch

                torch.set_num_threads(threads)
            from fedcli.model.lora import AdaptedModel

            def load() -> AdaptedModel:
                return AdaptedModel(folder, adapter_config, trust_remote_code=trusts, quantization=quantization)

            key = (self._fingerprint, folder, contents, trusts, quantization)
            self.adapted = load() if kept is None else kept.get(key, load)
        self._encoders: dict[TemplateChoice, Encoder] = {}
        self._rows: dict[tuple[object, ...], EncodedRows] = {}
        self._checked: set[tuple[int, str, int]] = set()
        self._start: Round | None = None
        self._selected: tuple[Arrays | None, object, Selection | None] = (None, None, None)

    def encoder(self, template: TemplateChoice) -> "Encoder":
        """Return the encoder of a template with the base model's tokenizer."""
        from fedcli.data.encoding import Encoder

        if template not in self._encoders:
            date = self._federation.head.manifest.train.date
            self._encoders[template] = Encoder(self.adapted.tokenizer, template, date=date)
        return self._encoders[template]

    def rows(self, party: Party | None, train: TrainRecord, *, group_by: str | None = None) -> "EncodedRows":
        """Return a party's rows, or all simulated clients' for None, as token ids, with groups by a column.

        An audit's canaries are the last of them. Raises ConfigError where there is no usable row, or one without a
        group, or where a joined party has not as many as it registered.
        """
        workspace, clients = self._federation.workspace, range(self._federation.config.federation.clients)
        homes = [workspace.private(client) for client in clients] if party is None else [party.home]
        planted = tuple(map(read_canaries, homes))  # at every call: they come and go while a process goes on
        key = (party.client if party else None, train.max_length, train.template, group_by, planted)
        if key not in self._rows:
            parties = [find_party(self._federation, client) for client in clients] if party is None else [party]
            found = [self._read(each, train, group_by, own) for each, own in zip(parties, planted, strict=True)]
            rows, *others = found
            for other in others:
                rows.extend(other)
            self._rows[key] = rows
        return self._rows[key]

    def _read(self, party: Party, train: TrainRecord, group_by: str | None, planted: Planted | None) -> "EncodedRows":
        num_read = 0

        def count(more: int) -> None:
            nonlocal num_read
            num_read += more
            self.observer.rows_read("reading rows", num_read)

        rows, num_usable = read_encoded(
            party,
            self.encoder(train.template),
            self._task.name,
            train,
            fingerprint=self._fingerprint,
            group_by=group_by,
            on_rows=count,
        )
        if planted is not None:
            plant(planted, rows, self.encoder(train.template), train.max_length)
        limit = self._base.position_limit
        if limit is not None and (longest := int(rows.lengths().max(initial=0))) > limit:
            raise ConfigError(
                f"client {party.client}: a row has {longest} tokens, the base has {limit} positions",
                hint=f"Set train.max_length to {limit} or less; it takes effect with the next round that is opened.",
            )
        if party.num_rows not in (None, num_usable):
            raise ConfigError(
                f"client {party.client} joined with {party.num_rows} rows, and now has {num_usable}",
                hint=f"Run `fedcli client train --id {party.client} --refresh`, which registers them anew as "
                "you joined: the others rely on what the card says.",
            )
        return rows

    def select(
        self,
        party: Party | None,
        train: TrainRecord,
        adapter: Arrays,
        beside: Mapping[str, Arrays] = MappingProxyType({}),
    ) -> "Selection | None":
        """Return which of a party's rows are trained on from an adapter, whose scores of the rows decide; None: all.

        `beside` are frozen adapters by name that the model uses, too.

        Raises ConfigError where none is left, or where the task or the privacy of the round excludes it.
        """
        from fedcli.client.selection import Decoder, losses_of, select_rows, wanted_selection

        manifest = self._federation.head.manifest
        wanted = wanted_selection(party, train, self._task, manifest)
        if wanted is None:
            return None
        rows = self.rows(party, train)
        key = (id(rows), len(rows), wanted)
        if self._selected[0] is not adapter or self._selected[1] != key:
            home = self._federation.workspace.pooled_home if party is None else party.home
            precision = "bfloat16" if has_bfloat16() else "float32"
            model = f"{self._fingerprint} {manifest.model.quantization} {precision}"
            with _enough_memory():
                losses = losses_of(rows, wanted, self.adapted, adapter, home, model, beside)
            self._selected = (adapter, key, select_rows(rows, wanted, losses, Decoder(self.adapted)))
        return self._selected[2]

    def train(
        self,
        adapter: Arrays,
        train: TrainRecord,
        *,
        party: Party | None,
        round_number: int,
        first_draw: int,
        rule: ClientRule | None,
        on_step: Callable[[StepReport], None],
        private: "PrivateSteps | None" = None,
        beside: Mapping[str, Arrays] = MappingProxyType({}),
        weight: float = 1.0,
        limit: "TimeLimit | None" = None,
        moments: "Moments | None" = None,
        selection: "Selection | None" = None,
    ) -> tuple[dict[str, Array], list[float]]:
        """Train an adapter on a party's rows (all clients' for None) for one round; return values and steps' losses.

        `beside` are frozen adapters by name that the model uses, too, and `weight` is the trained one's among them.

        `first_draw` is the number of rows that the client drew in its earlier rounds; `private` draws
        otherwise, and protects its units; batches without rows have no loss then. `limit` and `moments` are as
        `fit` has them, `selection` are the rows that are trained on, all for None. Raises ConfigError where the
        training diverged, RequirementError where memory is too small.
        """
        from fedcli.model.finite import check_weights

        stream_client = self._federation.config.federation.clients if party is None else party.client
        settings = TrainSettings.of(
            train,
            hyperparameters={name: getattr(train, name) for name in self._task.hyperparameters},
            seed=stream_seed(train.seed, "training", round_number=round_number, client=stream_client) % 2**32,
        )

        def stepped(report: StepReport) -> None:
            if report.step == 1 and report.loss is not None and not math.isfinite(report.loss):
                check_weights(self.adapted.base)
            on_step(report)

        put_in = partial(self.adapted.load, adapter, beside, weight=weight)
        with _enough_memory():
            if private is None:
                usable = self._told_rows(party, train)
                places = range(len(usable)) if selection is None else selection.places
                count = train.num_drawn
                order = draw(len(places), seed=train.seed, client=stream_client, first=first_draw, count=count)
                chosen = [places[index] for index in order]
                with self._answering(usable, train, party) as answering:
                    drawn = [usable[place] for place in (chosen if selection is None else selection.in_order(chosen))]
                    work = RoundWork(
                        self.adapted,
                        drawn,
                        self._task,
                        settings,
                        rule,
                        stepped,
                        answering=answering,
                        limit=limit,
                        moments=moments,
                    )
                    losses = self._fit(put_in, work, train.max_length, party)
            else:
                assert party is not None
                losses = self._fit_privately(put_in, train, settings, private, party, rule, stepped, moments)
        values = self.adapted.values()
        if not all(map(math.isfinite, losses)) or not all(np.isfinite(array).all() for array in values.values()):
            check_weights(self.adapted.base)
            who = "all rows" if party is None else f"client {party.client}"
            is_told = losses and not self._federation.head.manifest.withholds
            raise ConfigError(
                f"{who}: the training of round {round_number} diverged"
                + (f", its last loss is {losses[-1]}" if is_told else ""),
                hint="Lower train.learning_rate in fedcli.yaml; it takes effect with the next round that is opened.",
            )
        return values, losses

    def mean_loss(self, adapter: Arrays, train: TrainRecord, *, party: Party) -> float:
        """Return the task's mean loss of an adapter over a party's rows, LOSS_ROWS at most, which are always the same.

        Raises RequirementError where memory is too small.
        """
        from fedcli.training.trainer import mean_loss

        usable = self.rows(party, train)
        count = min(LOSS_ROWS, len(usable))
        rows = [
            usable[index] for index in draw(len(usable), seed=train.seed, client=party.client, first=0, count=count)
        ]
        settings = TrainSettings.of(
            train, hyperparameters={name: getattr(train, name) for name in self._task.hyperparameters}, seed=0
        )
        with _enough_memory():
            if self._task.uses_reference:
                rows = self._with_reference(rows, party.home)
            self.adapted.load(adapter)
            return mean_loss(self.adapted, rows, self._task, settings)

    def _told_rows(self, party: Party | None, train: TrainRecord, group_by: str | None = None) -> "EncodedRows":
        """Return rows to train on, and tell of canaries among them."""
        rows = self.rows(party, train, group_by=group_by)
        if rows.num_planted:
            who = "all rows" if party is None else f"client {party.client}"
            self.observer.noted(
                f"{who}: {rows.num_planted} of {len(rows)} rows are canaries, made up for `fedcli audit`, and the "
                "adapters learn them; `fedcli audit plant --remove` takes them out"
            )
        return rows

    def _fit(self, put_in: Callable[[], None], work: RoundWork, max_length: int, party: Party | None) -> list[float]:
        """Train a round as the task does; `work` has the drawn rows, without references and what is made of batches."""
        rows, size = [*work.rows], work.settings.batch_size
        count = len(rows)
        if self._task.batch_rows is not None:
            for start in range(0, count, size):
                rows += [made.cut(max_length) for made in self._task.batch_rows(rows[start : start + size])]
        if self._task.uses_reference:
            rows = self._with_reference(rows, self._federation.workspace.pooled_home if party is None else party.home)
        put_in()
        trainer: Callable[[RoundWork], list[float]] = resolve_name(self._task.trainer)
        return trainer(replace(work, rows=rows[:count], batch_rows=rows[count:]))

    @contextmanager
    def _answering(self, rows: "EncodedRows", train: TrainRecord, party: Party | None) -> "Iterator[Answering | None]":
        """Yield what a task with a reward function needs, for others None."""
        reward = check_able(self._federation, party, train)
        if reward is None:
            yield None
            return
        who = "all rows" if party is None else f"client {party.client}"
        room = train.max_new_tokens or 0
        if (kept := (id(rows), reward.name, room)) not in self._checked:  # rows are kept as long as this is
            check_rows(rows, reward, who, positions=self._base.position_limit, max_new_tokens=room)
            self._checked.add(kept)
        home = self._federation.workspace.pooled_home if party is None else party.home
        make_folder(home.folder, PRIVATE_FOLDER_MODE)
        with temporary_folder(home.folder) as folder:
            yield Answering(self.encoder(train.template).end_id, scorer(reward), folder)

    def _fit_privately(
        self,
        put_in: Callable[[], None],
        train: TrainRecord,
        settings: TrainSettings,
        private: "PrivateSteps",
        party: Party,
        rule: ClientRule | None,
        on_step: Callable[[StepReport], None],
        moments: "Moments | None",
    ) -> list[float]:
        from fedcli.training.dp_sgd import draw_units, fit_privately

        usable = self._told_rows(party, train, private.group_by)
        units = private.units(usable)
        drawn = [[units[number] for number in draw_units(len(units), private.q)] for _ in range(train.steps)]
        places = sorted({place for batch in drawn for unit in batch for place in unit})
        found = [usable[place] for place in places]
        if self._task.uses_reference:
            found = self._with_reference(found, party.home)
        rows = dict(zip(places, found, strict=True))
        batches = ([[rows[place] for place in unit] for unit in batch] for batch in drawn)
        put_in()
        protection = private.protection
        return fit_privately(
            self.adapted, batches, self._task, settings, protection, rule=rule, moments=moments, on_step=on_step
        )

    def _with_reference(self, rows: "list[EncodedRow]", home: Home) -> "list[EncodedRow]":
        """Return rows with the reference's log-probabilities, round 0's model's; a row's are computed once a client."""
        from fedcli.model.likelihood import reference_log_probs

        if self._start is None:
            self._start = self._federation.start
        key = reference_key(self._start.manifest, "bfloat16" if has_bfloat16() else "float32")
        known = read_reference(home, key)
        missing = {row.key: row for row in rows if row.key not in known}
        if missing:
            self.adapted.load(self._start.adapter())
            known |= zip(missing, reference_log_probs(self.adapted, list(missing.values())), strict=True)
            save_reference(home, key, known)
        return [replace(row, reference=known[row.key]) for row in rows]


@contextmanager
def _enough_memory() -> Iterator[None]:
    """Turn a GPU or a machine that is too small into a RequirementError with the cure."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if (where := short_memory(error)) is None:
            raise
        raise RequirementError(
            f"{where} is too small for this training: {str(error).partition('.')[0] or 'out of memory'}",
            hint="In fedcli.yaml lower train.micro_batch_size or train.max_length, or set gradient_checkpointing; "
            "`fedcli doctor` estimates what is needed.",
        ) from error


@functools.cache
def _import_stack() -> None:
    """Import what training needs, without the garbage collector, which would go through it again and again.

    Once a process: what is frozen is never collected, and a model that was loaded since must be, when it is dropped.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads of several clients starve each other
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        import_module("fedcli.training.trainer")  # by name: it is used by others, and a linter would drop the import
    finally:
        if was_enabled:
            gc.enable()
    gc.collect()  # errors that imports caught hold the frames up to here, and so the Runtime that asked for them
    gc.freeze()
