"""The baseline of step.py and gpu.py: the same optimiser steps as one would write them for this work alone.

Each batch is sorted by length and cut into micro-batches of 4; each of these is padded to its longest row; logits are
made at supervised positions only; the loss is the mean over the batch's supervised tokens.
"""

import torch

from fedcli.data.encoded import EncodedRow
from fedcli.model.lora import AdaptedModel

MICRO_BATCH_SIZE = 4


def train_by_hand(adapted: AdaptedModel, examples: list[EncodedRow], *, batch_size: int, learning_rate: float) -> None:
    """Train an adapter of a Llama in place; on a GPU in bfloat16."""
    model, device = adapted.base, adapted.base.device
    parameters = list(adapted.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    torch.manual_seed(0)
    adapted.model.train()
    for start in range(0, len(examples), batch_size):
        batch = sorted((row.sides[0] for row in examples[start : start + batch_size]), key=lambda row: len(row.ids))
        num_tokens = sum(int(row.supervised.sum()) for row in batch)
        for at in range(0, batch_size, MICRO_BATCH_SIZE):
            rows = batch[at : at + MICRO_BATCH_SIZE]
            length = len(rows[-1].ids)
            ids = torch.zeros((len(rows), length), dtype=torch.long)
            mask = torch.zeros((len(rows), length), dtype=torch.long)
            supervised = torch.zeros((len(rows), length), dtype=torch.bool)
            for number, row in enumerate(rows):
                ids[number, : len(row.ids)] = torch.from_numpy(row.ids)
                mask[number, : len(row.ids)] = 1
                supervised[number, : len(row.ids)] = torch.from_numpy(row.supervised)
            ids, mask, supervised = ids.to(device), mask.to(device), supervised.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                logits = model.lm_head(hidden[:, :-1][supervised[:, 1:]]).float()
                loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:][supervised[:, 1:]], reduction="sum")
            (loss / num_tokens).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def train_by_fedcli(
    adapted: AdaptedModel, examples: list[EncodedRow], *, batch_size: int, learning_rate: float
) -> None:
    """Train in place as `client train` does."""
    from fedcli.tasks import SFT
    from fedcli.training.reports import TrainSettings
    from fedcli.training.trainer import fit

    settings = TrainSettings(
        batch_size=batch_size,
        micro_batch_size=None,
        learning_rate=learning_rate,
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        seed=0,
    )
    fit(adapted, examples, SFT, settings, on_step=lambda report: None)
