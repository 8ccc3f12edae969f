"""The baseline of client_cold.py: ten LoRA steps on the built-in Llama, written for nothing else."""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers.models.llama.modeling_llama import LlamaForCausalLM

BASE = Path(__file__).parent.parent / "fedcli" / "model" / "builtin" / "tiny"
RANK, ALPHA, BATCH_SIZE, MICRO_BATCH_SIZE = 32, 64, 16, 4


class Lora(torch.nn.Module):
    """A frozen linear layer and its low-rank correction."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = torch.nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5)
        self.b = torch.nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return W x + (alpha / r) B A x."""
        correction = torch.nn.functional.dropout(x, 0.05, self.training) @ self.a.T @ self.b.T
        return self.base(x) + ALPHA / RANK * correction


def main() -> None:
    """Train."""
    model = LlamaForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, Lora(getattr(layer.self_attn, name)))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-5, weight_decay=0.0)
    data = np.load(sys.argv[1])
    cuts = np.cumsum(data["lengths"])[:-1]
    rows = list(zip(np.split(data["ids"], cuts), np.split(data["supervised"], cuts), strict=True))
    model.train()
    for start in range(0, len(rows), BATCH_SIZE):
        batch = sorted(rows[start : start + BATCH_SIZE], key=lambda row: len(row[0]))
        num_tokens = sum(int(supervised.sum()) for _, supervised in batch)
        for at in range(0, BATCH_SIZE, MICRO_BATCH_SIZE):
            part = batch[at : at + MICRO_BATCH_SIZE]
            ids = torch.zeros((len(part), len(part[-1][0])), dtype=torch.long)
            supervised = torch.zeros_like(ids, dtype=torch.bool)
            for number, (tokens, marks) in enumerate(part):
                ids[number, : len(tokens)] = torch.from_numpy(tokens)
                supervised[number, : len(tokens)] = torch.from_numpy(marks)
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[:, :-1][supervised[:, 1:]])
            loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:][supervised[:, 1:]], reduction="sum")
            (loss / num_tokens).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
