"""Tiny random bases of many architectures, with the layers that LoRA usually adapts in them."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fedcli.model.library_logging import quiet_libraries
from support.models import TINY

SIZES: dict[str, Any] = {
    "vocab_size": 900, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT: dict[str, Any] = {
    "vocab_size": 900, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS = GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
STATES = {
    "vocab_size": 900, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
QV, QKV = ["q_proj", "v_proj"], ["query_key_value"]

KINDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama": (GROUPED, QV),
    "qwen2": (GROUPED | {"attention_dropout": 0.1}, QV),
    "qwen3": (GROUPED | {"head_dim": 8}, QV),
    "qwen3_moe": (EXPERTS | {"head_dim": 8}, QV),
    "mistral": (GROUPED | {"sliding_window": 8}, QV),
    "mixtral": (GROUPED | {"num_local_experts": 4, "router_jitter_noise": 0.3}, QV),
    "gemma": (GROUPED | {"head_dim": 8}, QV),
    "gemma2": (GROUPED | {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 0.05}, QV),
    "gemma3_text": (GROUPED | {"head_dim": 8, "sliding_window": 8}, QV),
    "phi": (SIZES | {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.1}, ["fc1", "fc2", *QV]),
    "phi3": (GROUPED | {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.1}, ["qkv_proj"]),
    "gpt2": (GPT, ["c_attn"]),
    "gptj": (GPT | {"rotary_dim": 4, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}, QV),
    "gpt_neo": (
        SIZES | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8,
                 "attention_dropout": 0.1, "resid_dropout": 0.1, "embed_dropout": 0.1}, QV,
    ),
    "gpt_neox": (SIZES | {"hidden_dropout": 0.1, "attention_dropout": 0.1}, QKV),
    "gpt_bigcode": (GPT, ["c_attn"]),
    "codegen": (GPT | {"rotary_dim": 4, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}, ["qkv_proj"]),
    "opt": (
        SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.3, "activation_dropout": 0.1,
                 "attention_dropout": 0.1}, QV,
    ),
    "bloom": (SIZES | {"n_layer": 2, "n_head": 4, "hidden_dropout": 0.1, "attention_dropout": 0.1}, QKV),
    "falcon": (SIZES | {"hidden_dropout": 0.1, "attention_dropout": 0.1}, QKV),
    "mpt": (
        {"vocab_size": 900, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, "emb_pdrop": 0.1,
         "resid_pdrop": 0.1}, ["Wqkv"],
    ),
    "starcoder2": (GROUPED | {"residual_dropout": 0.1, "embedding_dropout": 0.1, "attention_dropout": 0.1}, QV),
    "stablelm": (GROUPED | {"hidden_dropout": 0.1, "attention_dropout": 0.1}, QV),
    "cohere": (GROUPED | {"logit_scale": 0.1}, QV),
    "cohere2": (GROUPED | {"sliding_window": 8}, QV),
    "granite": (GROUPED | {"logits_scaling": 3.0, "attention_dropout": 0.1}, QV),
    "granitemoe": (GROUPED | {"num_local_experts": 4}, QV),
    "olmo": (GROUPED, QV),
    "olmo2": (GROUPED, QV),
    "olmoe": (EXPERTS | {"attention_dropout": 0.1}, QV),
    "smollm3": (GROUPED, QV),
    "glm": (GROUPED | {"head_dim": 8, "attention_dropout": 0.1}, QV),
    "glm4": (GROUPED | {"head_dim": 8}, QV),
    "glm4_moe": (
        GROUPED | {"head_dim": 8, "n_routed_experts": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
                   "num_experts_per_tok": 2}, QV,
    ),
    "nemotron": (GROUPED | {"hidden_dropout": 0.1}, QV),
    "deepseek_v3": (
        SIZES | LATENT | {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
                 "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16},
        ["kv_a_proj_with_mqa", "kv_b_proj", "q_a_proj", "q_b_proj"],
    ),
    "persimmon": (SIZES | {"hidden_dropout": 0.1, "attention_dropout": 0.1}, QKV),
    "gpt_oss": (GROUPED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
                "attention_dropout": 0.1}, QV),
    "ernie4_5": (GROUPED, QV),
    "exaone4": (GROUPED | {"sliding_window": 8, "sliding_window_pattern": 2}, QV),
    "jamba": (GROUPED | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4,
              "use_mamba_kernels": False}, QV),
    "lfm2": (GROUPED | {"layer_types": ["conv", "full_attention"]}, QV),
    "mamba": (STATES, ["in_proj"]),
    "mamba2": (STATES | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}, ["in_proj"]),
    "rwkv": (
        {"vocab_size": 900, "hidden_size": 32, "num_hidden_layers": 3, "rescale_every": 1, "context_length": 128,
         "bos_token_id": 1, "eos_token_id": 2}, ["key", "output", "receptance", "value"],
    ),
}  # fmt: skip


def make(folder: Path, kind: str, **changes: Any) -> Path:
    """Save a random tiny base with the built-in tokenizer; its weights are large enough that dropout would show."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**KINDS[kind][0] | changes)
    with quiet_libraries():
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "conv" not in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder / name)
    return folder
