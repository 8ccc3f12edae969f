"""Tiny models as .gguf files, written with llama.cpp's own package, and the same models as transformers has them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""The format's names for a Llama's layers."""


def make_llama(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> LlamaForCausalLM:
    """Return a random Llama whose head is its embeddings."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
    ).eval()


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    architecture: str = "llama",
    without: tuple[str, ...] = (),
    **values: Any,
) -> LlamaForCausalLM:
    """Write a model as llama.cpp would, matrices in `kind`; put what it then stands for into `model`, and return it.

    `without` names tensors to leave out, `values` are further metadata: numbers, or float32 arrays as tensors.
    """
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in _merges(tokenizer)])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(CHAT)
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name.replace("__", "."), value)
        else:
            writer.add_uint16(name.replace("__", "."), value)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            named = _named(name)
            array = parameter.numpy()
            used = kind if array.ndim == 2 else GGMLQuantizationType.F32
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            if (part := named.removesuffix(".weight").rpartition(".")[2]) in heads:
                array = _permuted(array, heads[part])
            packed = quants.quantize(array, used)
            if named not in without:
                writer.add_tensor(named, packed, raw_dtype=used)
            unpacked = quants.dequantize(packed, used)
            if part in heads:
                unpacked = _restored(unpacked, heads[part])
            parameter.copy_(torch.tensor(unpacked))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _merges(tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]


def _named(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
    return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]


def _permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """Return a projection's rows in llama.cpp's order: pairs of a rotation side by side."""
    rows, columns = array.shape
    return np.ascontiguousarray(
        array.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def _restored(array: np.ndarray, heads: int) -> np.ndarray:
    rows, columns = array.shape
    return np.ascontiguousarray(
        array.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )
