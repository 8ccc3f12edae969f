"""Losses on SmolLM2, fedcli's and own ones, of a few rows in its template."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import log_softmax

from fedcli.algos import Array
from fedcli.model.lora import AdaptedModel, lora_config, start_adapter
from fedcli.tasks import Task
from fedcli.training.reports import TrainSettings
from fedcli.training.trainer import fit

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
ROWS = (
    ("Name the capital of France.", "The capital of France is Paris."),
    ("What is two plus two?\nAnswer with a number.", "4"),
    ("Say which of these is a fruit: apple, stone, 1234.", "The apple 🍏 is a fruit; stones and 1,234 are not."),
)
CONFIG = lora_config(rank=4, alpha=8, dropout=0.0, target_modules=["q_proj", "v_proj"], base=None)


def asked(question: str, system: str = SYSTEM) -> str:
    """Return a question as SmolLM2's template writes it, with the system turn that it puts before a chat by itself."""
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def log_probs(model: Any, tokenizer: Any, before: str, learnt: str) -> torch.Tensor:
    """Return the log-probability of each learnt token, from the logits of the whole text."""
    start = tokenizer(before, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([start + tokenizer(learnt, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        found = log_softmax(model(input_ids=ids).logits.float(), -1)
    return found[0, len(start) - 1 : -1].gather(-1, ids[0, len(start) :, None])[:, 0]


def first_loss(adapted: AdaptedModel, task: Task, rows: Sequence[Any], start: dict[str, Array], **more: float) -> float:
    """Return the loss of one step over one batch of all rows."""
    options = {"learning_rate": 1e-4, "weight_decay": 0.0, "max_grad_norm": 1.0, "gradient_checkpointing": False}
    batch = {"batch_size": len(rows), "micro_batch_size": len(rows), "seed": 0, "hyperparameters": more}
    adapted.load(start)
    (loss,) = fit(adapted, list(rows), task, TrainSettings(**options, **batch), on_step=lambda _: None)
    return loss


def noisy(folder: Path) -> dict[str, Array]:
    """Return an adapter that changes what the model says."""
    arrays, _ = start_adapter(folder, CONFIG, seed=1, trust_remote_code=False)
    draw = np.random.default_rng(1)
    return {
        name: draw.normal(0, 0.02, array.shape).astype(np.float32) if ".lora_B." in name else array
        for name, array in sorted(arrays.items())
    }


def loss_in_training(model: Any, tokenizer: Any) -> float:
    """Return the mean loss of all learnt tokens of ROWS in one batch, padded on the right, from all logits.

    In training, and as one batch: bitsandbytes' int8 computes otherwise in eval mode, and takes for outliers the
    columns of large values anywhere in a batch, padding with it.
    """
    pairs = [
        [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked(question), f"{answer}<|im_end|>")]
        for question, answer in ROWS
    ]
    ids = torch.full((len(pairs), max(len(before) + len(learnt) for before, learnt in pairs)), tokenizer.pad_token_id)
    is_learnt = torch.zeros_like(ids, dtype=torch.bool)
    for number, (before, learnt) in enumerate(pairs):
        ids[number, : len(before) + len(learnt)] = torch.tensor(before + learnt)
        is_learnt[number, len(before) : len(before) + len(learnt)] = True
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model.train()(inputs_embeds=embedded).logits[:, :-1].float()
    found = log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
    return -float(found[is_learnt[:, 1:]].mean())
