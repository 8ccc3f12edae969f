"""The work that the speed benchmarks share: a 6-million-parameter Llama and rows as long as Alpaca's.

20 clients, 2 a round, 10 steps of 16 rows of up to 512 tokens, LoRA 32/64 on q_proj and v_proj, float32. The model is
random, its tokenizer the built-in model's; the lengths of the responses are lognormal with the median of Alpaca's under
that tokenizer (82 tokens) and a like tail.
"""

import json
import random
from pathlib import Path

NUM_CLIENTS = 20
NUM_ROWS = 1600
MAX_LENGTH = 512
WORDS = ("fund", "bank", "harvest", "patient", "river", "engine", "court", "letter", "garden", "market", "winter")
TOKENS_PER_WORD = 2.3
"""Of these words under the built-in tokenizer, about."""
SETTINGS = (
    f"federation.clients={NUM_CLIENTS}",
    "federation.per_round=2",
    "federation.rounds=200",
    "train.steps=10",
    "train.batch_size=16",
    f"train.max_length={MAX_LENGTH}",
    "adapter.rank=32",
    "adapter.alpha=64",
)


def make_base(folder: Path) -> Path:
    """Save the random Llama with the built-in tokenizer; return its folder."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from fedcli.model.base import find_base

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(find_base("builtin:tiny", revision=None, root=folder)).save_pretrained(folder)
    return folder


def make_rows(path: Path, num_rows: int = NUM_ROWS) -> Path:
    """Write instructions of about 25 tokens with responses of very different lengths; return the path."""
    draws = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            num_words = max(1, min(200, round(draws.lognormvariate(4.4, 1.1) / TOKENS_PER_WORD)))
            instruction = f"Tell story {number} of the " + " ".join(draws.choices(WORDS, k=6)) + "."
            row = {"instruction": instruction, "output": " ".join(draws.choices(WORDS, k=num_words)) + "."}
            file.write(json.dumps(row) + "\n")
    return path
