"""A round of task grpo, by trl's GRPOTrainer: it computes advantages and loss, and makes the steps.

fedcli gives it the prompts' tokens as every other task sees them, the answers (sampled here at temperature 1), their
rewards, the optimiser and, by a callback before and after each step, the client rule. trl imports for seconds, so that
this module is loaded by a round of grpo alone. What trl changes of the model is put back: it serves others.
"""

import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fedcli.errors import ConfigError, missing_package
from fedcli.model.bitsandbytes import without_bitsandbytes
from fedcli.model.library_logging import quiet_libraries
from fedcli.model.loading import has_bfloat16
from fedcli.model.lora import AdaptedModel
from fedcli.tasks.rewards import Answer
from fedcli.training.batches import LARGEST
from fedcli.training.reports import StepReport
from fedcli.training.rule_terms import RuleTerms
from fedcli.training.work import Answering, RoundWork

with quiet_libraries(), without_bitsandbytes(), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
        from datasets import Dataset
        from transformers import PrinterCallback, ProgressCallback, TrainerCallback
        from trl.trainer.grpo_config import GRPOConfig
        from trl.trainer.grpo_trainer import GRPOTrainer
    except ModuleNotFoundError as error:
        raise (missing_package("trl") if error.name == "trl" else error) from error

REFERENCE = "ref"
"""trl's name for the copy of the adapter that kl is measured from."""
MOST_ANSWERS = 64
"""Answers that are generated at once."""


def train_round(work: RoundWork) -> list[float]:
    """Train the adapter in place; return each step's share of the reward that was missed, 1 - its answers' mean.

    The loss itself says nothing: a group's advantages add up to zero.
    """
    assert work.answering is not None, f"task {work.task.name} has no reward function"
    adapted, settings = work.adapted, work.settings
    round_ = _Round(work, work.answering)
    with quiet_libraries(), warnings.catch_warnings(), _borrowed(adapted), _kept_random_states():
        warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
        parameters = adapted.parameters.values()
        optimizer = torch.optim.AdamW(
            parameters,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=adapted.base.device.type == "cuda",
        )
        dataset = Dataset.from_dict(
            {
                "prompt": [row.sides[0].ids[: row.sides[0].prompt_length].tolist() for row in work.rows],
                "check": [row.check for row in work.rows],
            }
        )
        try:
            trainer = GRPOTrainer(
                model=adapted.model,
                reward_funcs=round_.reward,
                args=_arguments(work, work.answering),
                train_dataset=dataset,
                processing_class=adapted.tokenizer,
                optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
                callbacks=[round_.callback],
                rollout_func=round_.answer,
            )
        except ValueError as error:  # an adapter on the output head
            raise ConfigError(
                f"task {work.task.name}: trl refuses this adapter: {' '.join(str(error).split())}",
                hint="Leave the output head out of adapter.target_modules.",
            ) from error
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        for parameter in parameters:
            parameter.data = parameter.data.float()  # of a quantised base trl makes them bfloat16
        round_.freeze()
        torch.manual_seed(settings.seed)
        trainer.train()
    return round_.losses


def _arguments(work: RoundWork, answering: Answering) -> Any:
    """Return trl's settings: its loss "grpo" with one step for each batch of answers, and nothing that is reported."""
    settings, asked = work.settings, work.settings.hyperparameters
    device = work.adapted.base.device.type
    longest = max(row.sides[0].prompt_length for row in work.rows) + asked["max_new_tokens"]
    size = settings.micro_batch_size or _part(settings.batch_size, LARGEST[device] // longest)
    arguments = GRPOConfig(
        output_dir=str(answering.folder),
        max_steps=len(work.rows) * asked["generations"] // settings.batch_size,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=settings.batch_size // size,
        num_generations=asked["generations"],
        max_completion_length=asked["max_new_tokens"],
        beta=asked["kl"],
        use_bias_correction_kl=False,
        loss_type="grpo",
        scale_rewards="group",
        epsilon=0.2,
        temperature=1.0,
        disable_dropout=True,
        shuffle_dataset=False,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type="constant",
        seed=settings.seed,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=has_bfloat16(),
        use_cpu=device == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # the model lies where it was loaded; trl refuses to spread it
    return arguments


def _part(batch_size: int, most: int) -> int:
    """Return the largest divisor of a batch's size that is not above `most`, and 1 at least."""
    return next(size for size in range(min(batch_size, max(1, most)), 0, -1) if batch_size % size == 0)


class _Round:
    """What fedcli does in trl's loop, and what it hears there."""

    def __init__(self, work: RoundWork, answering: Answering) -> None:
        self._work = work
        self._answering = answering
        self._terms = RuleTerms(work.adapted, work.rule)
        self._num_tokens = 0
        self._missed = 0.0
        self.losses: list[float] = []
        self.callback = _callback(self._before_step, self._after_step, self._step_done)

    def freeze(self) -> None:
        """Let training change what the client rule says; to compute the reference's log-probabilities undoes it."""
        for name, parameter in self._work.adapted.parameters.items():
            parameter.requires_grad_(self._work.rule is None or self._work.rule.trains(name))

    def answer(self, prompts: list[list[int]], _: Any) -> dict[str, Any]:
        """Return the model's answers to prompts, which come once for each answer, as token ids."""
        answers: list[list[int]] = []
        for start in range(0, len(prompts), MOST_ANSWERS):
            answers += self._sampled(prompts[start : start + MOST_ANSWERS])
        self._num_tokens += sum(map(len, prompts)) + sum(map(len, answers))
        return {"prompt_ids": prompts, "completion_ids": answers, "logprobs": None}

    @torch.no_grad()
    def _sampled(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        adapted, end_id = self._work.adapted, self._answering.end_id
        width = max(map(len, prompts))
        ids = torch.tensor([[adapted.pad_id] * (width - len(each)) + list(each) for each in prompts])
        mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in prompts])
        adapted.model.eval()
        found = adapted.model.generate(
            input_ids=ids.to(adapted.base.device),
            attention_mask=mask.to(adapted.base.device),
            max_new_tokens=self._work.settings.hyperparameters["max_new_tokens"],
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            repetition_penalty=1.0,
            pad_token_id=adapted.pad_id,
            eos_token_id=end_id,
        )
        adapted.model.train()
        answers: list[list[int]] = found[:, width:].tolist()
        return [ids[: ids.index(end_id) + 1] if end_id in ids else ids for ids in answers]

    def reward(self, *, completions: list[str], check: list[str], **_: Any) -> list[float]:
        """Return the answers' rewards."""
        rewards = list(self._answering.score([Answer(*each) for each in zip(completions, check, strict=True)]))
        self._missed = 1 - float(np.mean(rewards))
        self.freeze()
        return rewards

    def _before_step(self) -> None:
        self._terms.add_to_gradients()

    def _after_step(self) -> None:
        self._terms.add_to_weights(self._work.settings.learning_rate)

    def _step_done(self) -> None:
        self.losses.append(self._missed)
        self._work.on_step(StepReport(len(self.losses), self._missed, self._num_tokens))
        self._num_tokens = 0


def _callback(before_step: Callable[[], None], after_step: Callable[[], None], done: Callable[[], None]) -> Any:
    """Return what transformers calls around an optimiser's step."""

    class Callback(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            before_step()

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            after_step()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            done()

    return Callback()


@contextmanager
def _borrowed(adapted: AdaptedModel) -> Iterator[None]:
    """Put back inside a model, at the end of the block, what trl and accelerate change of it and of this process."""
    import huggingface_hub.constants as hub

    names = ("forward", "_original_forward")
    forwards = [(module, {name: vars(module).get(name) for name in names}) for module in (adapted.model, adapted.base)]
    dropouts = [(module, module.p) for module in adapted.model.modules() if isinstance(module, torch.nn.Dropout)]
    text_config, generation = adapted.base.config.get_text_config(), adapted.base.generation_config
    pads = [(holder, holder.pad_token_id) for holder in (text_config, generation) if holder is not None]
    pad_token, telemetry = adapted.tokenizer.pad_token, hub.HF_HUB_DISABLE_TELEMETRY
    environment = dict(os.environ)
    hub.HF_HUB_DISABLE_TELEMETRY = True
    try:
        yield
    finally:
        hub.HF_HUB_DISABLE_TELEMETRY = telemetry
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        for module, own in forwards:
            for name, value in own.items():
                if value is not None:
                    setattr(module, name, value)
                elif name in vars(module):
                    delattr(module, name)
        for dropout, rate in dropouts:
            dropout.p = rate
        for holder, pad_id in pads:
            holder.pad_token_id = pad_id
        adapted.tokenizer.pad_token = pad_token
        adapted.base.disable_input_require_grads()
        adapted.base.gradient_checkpointing_disable()
        if REFERENCE in adapted.model.peft_config:
            adapted.model.delete_adapter(REFERENCE)
            adapted.model.set_adapter("default")


@contextmanager
def _kept_random_states() -> Iterator[None]:
    """Put the generators of Python and numpy, which trl seeds, back at the end of the block."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
