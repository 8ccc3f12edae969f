"""transformers' Trainer for one client's round: its loss, its client rule and its reports are given to it.

Why not trl's trainers: SFTTrainer computes entropy and token accuracy over full logits on every step, which doubles the
cost of a step, DPOTrainer takes the adapter it is given for its reference, and both wrap the model's forward anew in
every constructor, which breaks a process that trains a thousand clients. They are the oracles of the tests.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeVar

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from fedcli.algos import ClientRule
from fedcli.model.base import has_bfloat16
from fedcli.model.lora import AdaptedModel
from fedcli.model.quiet import quiet_libraries
from fedcli.training.reports import StepReport, TrainSettings

Batch = dict[str, torch.Tensor]
Loss = Callable[[Any, Any, Batch, "torch.Tensor | int"], torch.Tensor]
"""Of the model as Trainer wraps it, the transformers model in it, a micro-batch, and the number of supervised tokens in
the whole batch: the micro-batch's share of the batch's loss."""


class Item(Protocol):
    """What the trainer must know of one row."""

    @property
    def num_tokens(self) -> int:
        """The tokens that a forward pass over it sees."""


ItemT = TypeVar("ItemT", bound=Item)


def fit(
    adapted: AdaptedModel,
    items: Sequence[ItemT],
    settings: TrainSettings,
    *,
    collate: Callable[[Sequence[ItemT]], Batch],
    loss: Loss,
    rule: ClientRule | None,
    on_step: Callable[[StepReport], None],
) -> list[float]:
    """Train the adapter in place, one optimiser step for every `batch_size` items; return the losses of the steps."""
    steps = len(items) // settings.batch_size
    observer = _Observer([item.num_tokens for item in items], settings.batch_size, on_step)
    callbacks: list[TrainerCallback] = [observer]
    if rule is not None:
        callbacks.append(_RuleCallback(rule, adapted, settings.learning_rate))
    with TemporaryDirectory() as scratch:
        trainer = _LossTrainer(
            loss,
            model=adapted.model,
            args=_arguments(scratch, steps, settings),
            train_dataset=_sorted_batches(items, settings.batch_size),
            data_collator=collate,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        with quiet_libraries(), _checkpointing(adapted.model, settings.gradient_checkpointing):
            trainer.train()
        # Under bf16 Trainer wraps the model's forward; unwrapped, scoring does not depend on what was trained before.
        trainer.accelerator.unwrap_model(adapted.model, keep_fp32_wrapper=False)
    return observer.losses


@contextmanager
def _checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    """Keep only layers' inputs for the backward pass inside the block, and compute the rest again."""
    if not wanted:
        yield
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


class _LossTrainer(Trainer):
    """Trainer with a loss of ours, which divides by the whole batch however that is cut into micro-batches."""

    def __init__(self, loss: Loss, **options: Any) -> None:
        super().__init__(**options)
        self.model_accepts_loss_kwargs = True  # the loss divides by the whole batch: Trainer must not divide again
        self._loss = loss

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return a micro-batch's share of the batch's loss."""
        assert num_items_in_batch is not None
        return self._loss(model, self.accelerator.unwrap_model(model).get_base_model(), inputs, num_items_in_batch)


class _RuleCallback(TrainerCallback):
    """Applies a client rule: to gradients after they were clipped, to weights after the optimiser's step."""

    def __init__(self, rule: ClientRule, adapted: AdaptedModel, learning_rate: float) -> None:
        self._rule = rule
        self._learning_rate = learning_rate
        device = adapted.model.device
        self._pairs = [
            (parameter, torch.tensor(rule.arrays[name], device=device))
            for name, parameter in adapted.parameters.items()
        ]

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        for parameter, own in self._pairs:
            term = self._rule.gradient_term(parameter, own)
            if term is not None and parameter.grad is not None:
                parameter.grad.add_(term)

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        for parameter, own in self._pairs:
            term = self._rule.weight_term(own, self._learning_rate)
            if term is not None:
                parameter.add_(term)


class _Observer(TrainerCallback):
    """Keeps every step's loss and reports it."""

    def __init__(self, lengths: Sequence[int], batch_size: int, on_step: Callable[[StepReport], None]) -> None:
        self.losses: list[float] = []
        self._lengths = lengths
        self._batch_size = batch_size
        self._on_step = on_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        self.losses.append(float(logs["loss"]))
        start = (len(self.losses) - 1) * self._batch_size
        num_tokens = sum(self._lengths[start : start + self._batch_size])
        self._on_step(StepReport(len(self.losses), self.losses[-1], num_tokens))


def _sorted_batches(items: Sequence[ItemT], batch_size: int) -> list[ItemT]:
    """Return the same batches, each sorted by length: less padding in micro-batches, the same gradient."""
    return [
        item
        for start in range(0, len(items), batch_size)
        for item in sorted(items[start : start + batch_size], key=lambda item: item.num_tokens)
    ]


def _arguments(scratch: str, steps: int, settings: TrainSettings) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=scratch,
        max_steps=steps,
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.batch_size // settings.micro_batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch",
        seed=settings.seed,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        bf16=has_bfloat16(),
        use_cpu=not torch.cuda.is_available(),  # where load_base puts the model
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one client trains on one GPU: DataParallel would multiply its batch
    return arguments
