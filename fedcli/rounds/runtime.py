"""A base model that is loaded once, and trains one client's adapter after another."""

import gc
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedcli.algos import Array, Arrays, ClientRule
from fedcli.config import Config
from fedcli.data.order import draw
from fedcli.data.rows import alpaca_example, preference, read_rows
from fedcli.errors import ConfigError, RequirementError
from fedcli.model.base import comes_quantized, find_base, fingerprint, has_bfloat16, require_bitsandbytes
from fedcli.model.quiet import without_bitsandbytes
from fedcli.randomness import stream_seed
from fedcli.training.reports import StepReport, TrainSettings
from fedcli.workspace.history import Round, read_start
from fedcli.workspace.layout import ADAPTER_CONFIG_NAME, Workspace
from fedcli.workspace.records import TrainRecord
from fedcli.workspace.reference import read_reference, reference_key, save_reference

if TYPE_CHECKING:
    from fedcli.data.encoding import EncodedPair, EncodedRows
    from fedcli.training.dpo import ReferredPair


class Runtime:
    """The loaded model of a workspace; one process makes one and trains any client of any round with it.

    Loading costs seconds (torch, transformers, the weights), so the cheap checks of a command come before it. Raises
    RequirementError where the base model is missing, ConfigError where it is not the federation's.
    """

    def __init__(self, workspace: Workspace, config: Config, any_round: Round, *, threads: int | None = None) -> None:
        self._workspace = workspace
        self._num_clients = config.federation.clients
        self.task = any_round.manifest.task
        folder = _find_same_base(workspace, config, any_round)
        quantization = any_round.manifest.model.quantization
        require_bitsandbytes(quantization)
        with without_bitsandbytes(quantization == "none" and not comes_quantized(folder)):
            _import_stack(threads)
            from fedcli.data.encoding import Encoder
            from fedcli.model.lora import AdaptedModel

            self.adapted = AdaptedModel(
                folder,
                json.loads(any_round.read(ADAPTER_CONFIG_NAME)),
                trust_remote_code=config.model.trust_remote_code,
                quantization=quantization,
            )
        self.encoder = Encoder(self.adapted.tokenizer)
        self._rows: dict[tuple[int | None, int], EncodedRows[Any]] = {}
        self._start: Round | None = None

    def rows(self, client: int | None, train: TrainRecord) -> "EncodedRows[Any]":
        """Return a client's rows, or all clients' for None, as token ids: examples for sft, pairs for dpo.

        Raises ConfigError where there is no usable row.
        """
        key = (client, train.max_length)
        if key not in self._rows:
            clients = range(self._num_clients) if client is None else [client]
            paths = [require_rows(self._workspace, number) for number in clients]
            rows = [row for path in paths for row in read_rows(path)]
            encoded: EncodedRows[Any]
            if self.task == "dpo":
                encoded = self.encoder.pairs([preference(row) for row in rows], train.max_length)
            else:
                encoded = self.encoder.rows([alpaca_example(row) for row in rows], train.max_length)
            if not encoded.examples:
                raise ConfigError(
                    f"{paths[0]}: none of its {len(rows)} rows is usable at max_length {train.max_length}",
                    hint="Responses must not be empty (nor alike, in a pair), and prompts must leave room for them: "
                    "raise train.max_length.",
                )
            self._rows[key] = encoded
        return self._rows[key]

    def train(
        self,
        adapter: Arrays,
        train: TrainRecord,
        *,
        client: int | None,
        round_number: int,
        first_draw: int,
        rule: ClientRule | None,
        on_step: Callable[[StepReport], None],
    ) -> tuple[dict[str, Array], list[float]]:
        """Train an adapter on a client's rows (all clients' for None) for one round; return values and steps' losses.

        `first_draw` is the number of rows that the client drew in its earlier rounds. Raises ConfigError where the
        training diverged, RequirementError where the GPU's memory is too small.
        """
        examples = self.rows(client, train).examples
        stream_client = self._num_clients if client is None else client
        count = train.steps * train.batch_size
        order = draw(len(examples), seed=train.seed, client=stream_client, first=first_draw, count=count)
        settings = TrainSettings(
            batch_size=train.batch_size,
            micro_batch_size=train.micro_batch_size,
            learning_rate=train.learning_rate,
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm,
            gradient_checkpointing=train.gradient_checkpointing,
            seed=stream_seed(train.seed, "training", round_number=round_number, client=stream_client) % 2**32,
        )
        drawn = [examples[index] for index in order]
        with _enough_memory():
            losses = self._train(adapter, drawn, client, train, settings, rule, on_step)
        values = self.adapted.values()
        if not all(map(math.isfinite, losses)) or not all(np.isfinite(array).all() for array in values.values()):
            who = "all rows" if client is None else f"client {client}"
            raise ConfigError(
                f"{who}: the training of round {round_number} diverged, its last loss is {losses[-1]}",
                hint="Lower train.learning_rate in fedcli.yaml; it takes effect with the next round that is opened.",
            )
        return values, losses

    def _train(
        self,
        adapter: Arrays,
        drawn: Sequence[Any],
        client: int | None,
        train: TrainRecord,
        settings: TrainSettings,
        rule: ClientRule | None,
        on_step: Callable[[StepReport], None],
    ) -> list[float]:
        """Train in place; return the losses of the steps."""
        if self.task == "sft":
            from fedcli.training.sft import train_sft

            self.adapted.load(adapter)
            return train_sft(self.adapted, drawn, settings, on_step, rule)
        from fedcli.training.dpo import train_dpo

        assert train.beta is not None
        referred = self._refer(drawn, client)
        self.adapted.load(adapter)
        return train_dpo(self.adapted, referred, train.beta, settings, on_step, rule)

    def _refer(self, pairs: "Sequence[EncodedPair]", client: int | None) -> "list[ReferredPair]":
        """Return pairs with the log-probabilities of the reference model, round 0's, each computed once a client."""
        from fedcli.model.likelihood import pair_log_probs
        from fedcli.training.dpo import ReferredPair

        if self._start is None:
            self._start = read_start(self._workspace)
        key = reference_key(self._start.manifest, "bfloat16" if has_bfloat16() else "float32")
        known = read_reference(self._workspace, client, key)
        missing = {pair.key: pair for pair in pairs if pair.key not in known}
        if missing:
            self.adapted.load(self._start.adapter())
            known |= zip(missing, pair_log_probs(self.adapted, list(missing.values())), strict=True)
            save_reference(self._workspace, client, key, known)
        return [ReferredPair(pair, *known[pair.key]) for pair in pairs]


@contextmanager
def _enough_memory() -> Iterator[None]:
    """Turn a GPU that is too small into a RequirementError with the cure."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RequirementError(
            f"the GPU's memory is too small for this training: {str(error).partition('.')[0]}",
            hint="In fedcli.yaml lower train.micro_batch_size or train.max_length, or set gradient_checkpointing; "
            "`fedcli doctor` estimates what is needed.",
        ) from error


def _import_stack(threads: int | None) -> None:
    """Import what training needs, without the garbage collector, which would go through it again and again."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads of several clients starve each other
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        import torch

        import_module("fedcli.training.trainer")  # by name: it is used by others, and a linter would drop the import
    finally:
        if was_enabled:
            gc.enable()
    gc.freeze()
    if threads is not None:
        torch.set_num_threads(threads)


def require_rows(workspace: Workspace, client: int) -> Path:
    """Return the file of a client's rows; raise ConfigError where it is missing."""
    path = workspace.client_rows(client)
    if not path.is_file():
        raise ConfigError(
            f"client {client} has no rows: {path} is missing",
            hint="Put its rows there, one JSON object a line, or set data.source before `fedcli init`.",
        )
    return path


def _find_same_base(workspace: Workspace, config: Config, any_round: Round) -> Path:
    """Return the folder of the base model, which must be the one that round 0 was opened with."""
    expected = any_round.manifest.model
    folder = find_base(config.model.base, revision=expected.revision, root=workspace.root)
    if fingerprint(folder) != expected.fingerprint:
        raise ConfigError(
            f"model.base: {folder} is not the base model of this federation ({expected.base}): its fingerprint differs",
            hint="Point model.base in fedcli.yaml to a copy of the very model that round 0 was opened with.",
        )
    return folder
