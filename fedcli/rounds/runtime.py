"""A base model that is loaded once, and trains one client's adapter after another."""

import gc
import json
import math
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedcli.algos import Array, Arrays
from fedcli.config import Config
from fedcli.data.order import draw
from fedcli.data.rows import alpaca_example, read_rows
from fedcli.errors import ConfigError
from fedcli.model.base import find_base, fingerprint
from fedcli.randomness import stream_seed
from fedcli.training.reports import StepReport, TrainSettings
from fedcli.workspace.history import Round
from fedcli.workspace.layout import ADAPTER_CONFIG_NAME, Workspace
from fedcli.workspace.records import TrainRecord

if TYPE_CHECKING:
    from fedcli.data.encoding import EncodedRows


class Runtime:
    """The loaded model of a workspace; one process makes one and trains any client of any round with it.

    Loading costs seconds (torch, transformers, the weights), so the cheap checks of a command come before it. Raises
    RequirementError where the base model is missing, ConfigError where it is not the federation's.
    """

    def __init__(self, workspace: Workspace, config: Config, any_round: Round, *, threads: int | None = None) -> None:
        self._workspace = workspace
        folder = _find_same_base(workspace, config, any_round)
        _import_stack(threads)
        from fedcli.data.encoding import Encoder
        from fedcli.model.lora import AdaptedModel

        adapter_config = json.loads(any_round.read(ADAPTER_CONFIG_NAME))
        self.adapted = AdaptedModel(folder, adapter_config, trust_remote_code=config.model.trust_remote_code)
        self.encoder = Encoder(self.adapted.tokenizer)
        self._rows: dict[tuple[int, int], EncodedRows] = {}

    def rows(self, client: int, train: TrainRecord) -> "EncodedRows":
        """Return a client's rows as token ids; raise ConfigError where it has no usable row."""
        key = (client, train.max_length)
        if key not in self._rows:
            path = require_rows(self._workspace, client)
            examples = [alpaca_example(row) for row in read_rows(path)]
            encoded = self.encoder.rows(examples, train.max_length)
            if not encoded.examples:
                raise ConfigError(
                    f"{path}: none of its {len(examples)} rows is usable at max_length {train.max_length}",
                    hint="Responses must not be empty, and prompts must leave room for them: raise train.max_length.",
                )
            self._rows[key] = encoded
        return self._rows[key]

    def train(
        self,
        adapter: Arrays,
        train: TrainRecord,
        *,
        client: int,
        round_number: int,
        first_draw: int,
        on_step: Callable[[StepReport], None],
    ) -> tuple[dict[str, Array], list[float]]:
        """Train an adapter on a client's rows for one round; return its values and the losses of the steps.

        `first_draw` is the number of rows that the client drew in its earlier rounds. Raises ConfigError where the
        training diverged.
        """
        from fedcli.training.sft import train_sft

        examples = self.rows(client, train).examples
        order = draw(
            len(examples), seed=train.seed, client=client, first=first_draw, count=train.steps * train.batch_size
        )
        settings = TrainSettings(
            batch_size=train.batch_size,
            micro_batch_size=train.micro_batch_size,
            learning_rate=train.learning_rate,
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm,
            seed=stream_seed(train.seed, "training", round_number=round_number, client=client) % 2**32,
        )
        self.adapted.load(adapter)
        losses = train_sft(self.adapted, [examples[index] for index in order], settings, on_step)
        values = self.adapted.values()
        if not all(map(math.isfinite, losses)) or not all(np.isfinite(array).all() for array in values.values()):
            raise ConfigError(
                f"client {client}: the training of round {round_number} diverged, its last loss is {losses[-1]}",
                hint="Lower train.learning_rate in fedcli.yaml; it takes effect with the next round that is opened.",
            )
        return values, losses


def _import_stack(threads: int | None) -> None:
    """Import what training needs, without the garbage collector, which would go through it again and again."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads of several clients starve each other
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        import torch

        import_module("fedcli.training.sft")  # by name: it is used by others, and a linter would drop the import
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
