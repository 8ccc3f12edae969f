"""Supervised fine-tuning: transformers' Trainer, with the loss on the response's tokens only.

Why not trl's SFTTrainer: it computes entropy and token accuracy over full logits on every step, which doubles the cost
of a step, and wraps the model's forward anew in every constructor, which breaks a process that trains a thousand
clients. Its loss and gradients are the oracle of tests/test_training.py.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from fedcli.data.encoding import EncodedExample
from fedcli.model.base import has_bfloat16
from fedcli.model.lora import AdaptedModel
from fedcli.model.quiet import quiet_libraries
from fedcli.training.reports import StepReport, TrainSettings

IGNORED = -100
"""The label of a token that is not supervised."""


def train_sft(
    adapted: AdaptedModel,
    examples: Sequence[EncodedExample],
    settings: TrainSettings,
    on_step: Callable[[StepReport], None],
) -> list[float]:
    """Train the adapter in place, one optimiser step for every `batch_size` examples; return the losses of the steps.

    A step's loss is the mean over the supervised tokens of its batch, however the batch is cut into micro-batches.
    """
    steps = len(examples) // settings.batch_size
    observer = _Observer(examples, settings.batch_size, on_step)
    with TemporaryDirectory() as scratch:
        trainer = _ResponseTrainer(
            model=adapted.model,
            args=_arguments(scratch, steps, settings),
            train_dataset=_sorted_batches(examples, settings.batch_size),
            data_collator=_Collator(adapted.tokenizer.pad_token_id or 0),
            callbacks=[observer],
        )
        trainer.remove_callback(PrinterCallback)
        with quiet_libraries():
            trainer.train()
        # Under bf16 Trainer wraps the model's forward; unwrapped, scoring does not depend on what was trained before.
        trainer.accelerator.unwrap_model(adapted.model, keep_fp32_wrapper=False)
    return observer.losses


@contextmanager
def supervised_logits(model: torch.nn.Module, labels: torch.Tensor) -> Iterator[torch.Tensor]:
    """Make the model's output head see only the positions that predict a supervised token; yield their labels.

    labels: (batch, length), IGNORED where not supervised. Inside the block the model's logits have the shape
    (supervised tokens, vocabulary), in the order of the yielded labels. What the model does with logits behind its
    head (scaling, soft-capping) stays in force.
    """
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != IGNORED
    head: torch.nn.Module = model.get_output_embeddings()  # type: ignore[operator]  # Module.__getattr__

    def select(_head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0][predicts], *inputs[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield labels[:, 1:][predicts[:, :-1]]
    finally:
        handle.remove()


class _ResponseTrainer(Trainer):
    """Trainer whose loss touches the logits of supervised tokens only."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the summed cross-entropy over the number of supervised tokens of the whole batch."""
        assert num_items_in_batch is not None
        labels = inputs.pop("labels")
        base = self.accelerator.unwrap_model(model).get_base_model()
        with supervised_logits(base, labels) as targets:
            logits = model(**inputs, use_cache=False).logits
        return cross_entropy(logits.float(), targets, reduction="sum") / num_items_in_batch


class _Collator:
    """Pads a micro-batch on the right to its longest row."""

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, examples: Sequence[EncodedExample]) -> dict[str, torch.Tensor]:
        shape = (len(examples), max(len(example.ids) for example in examples))
        input_ids = torch.full(shape, self._pad_id)
        labels = torch.full(shape, IGNORED)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for row, example in enumerate(examples):
            ids = torch.from_numpy(example.ids)
            input_ids[row, : len(ids)] = ids
            labels[row, example.prompt_length : len(ids)] = ids[example.prompt_length :]
            attention_mask[row, : len(ids)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class _Observer(TrainerCallback):
    """Keeps every step's loss and reports it."""

    def __init__(
        self, examples: Sequence[EncodedExample], batch_size: int, on_step: Callable[[StepReport], None]
    ) -> None:
        self.losses: list[float] = []
        self._lengths = [len(example.ids) for example in examples]
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


def _sorted_batches(examples: Sequence[EncodedExample], batch_size: int) -> list[EncodedExample]:
    """Return the same batches, each sorted by length: less padding in micro-batches, the same gradient."""
    return [
        example
        for start in range(0, len(examples), batch_size)
        for example in sorted(examples[start : start + batch_size], key=lambda example: len(example.ids))
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
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one client trains on one GPU: DataParallel would multiply its batch
    return arguments
