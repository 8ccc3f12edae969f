"""How much memory training needs: an estimate from the base model's shapes, before a weight is loaded."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedcli.config import Quantization

if TYPE_CHECKING:
    import torch

_BYTES_PER_WEIGHT: dict[Quantization, float] = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / 64 / 256}
"""Of linear layers: nf4 has a scale of one byte for 64 weights, and another of four for 256 of those."""


def weights_memory(num_linear: int, num_other: int) -> dict[str, int]:
    """Return the bytes of a base's weights by type and quantisation, which takes its linear layers alone."""
    num_all = num_linear + num_other
    quantized: dict[str, int] = {
        name: int(num_linear * size) + num_other * 4 for name, size in _BYTES_PER_WEIGHT.items()
    }
    return {"float32": num_all * 4, "bfloat16": num_all * 2, **quantized}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what needs them."""

    weights: int
    adapter: int
    optimizer: int
    """AdamW's two moments, and the gradients."""
    activations: int

    @property
    def total(self) -> int:
        """The sum of all four."""
        return self.weights + self.adapter + self.optimizer + self.activations


def estimate_memory(
    model: "torch.nn.Module",
    *,
    quantization: Quantization,
    rank: int,
    target_modules: Collection[str],
    rows: int,
    length: int,
    has_checkpointing: bool,
    compute_bytes: int,
) -> MemoryEstimate:
    """Estimate what a training step needs, of a model that may lie on the meta device.

    `rows` sequences of `length` tokens go through it at once, `compute_bytes` is 2 for bfloat16, 4 for float32. Per
    token a decoder layer of width h and feed-forward width f keeps about 16 h bytes of float32 norms and residuals, and
    12 h + 6 f numbers; one layer more holds gradients. With checkpointing only one layer keeps them, and the others
    their input. Four copies of the logits are counted, as if every token were supervised. Exact for weights, adapter
    and optimiser; activations of a small Llama on a CPU were 0.9 to 1.1 of this, but with int8 there 1.7.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    from fedcli.model.output_head import output_head

    model_config: Any = model.config
    config = model_config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    feed_forward = getattr(config, "intermediate_size", None) or 4 * hidden
    head = output_head(model)
    layers_by_name = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }
    linear = sum(module.weight.numel() for module in layers_by_name.values())
    ends = tuple(f".{target}" for target in target_modules)
    targets = [module for name, module in layers_by_name.items() if f".{name}".endswith(ends)]
    adapter_parameters = rank * sum(sum(module.weight.shape) for module in targets)
    other = sum(parameter.numel() for parameter in model.parameters()) - linear
    by_type = weights_memory(linear, other)
    weights = by_type[quantization if quantization != "none" else "bfloat16" if compute_bytes == 2 else "float32"]
    tokens = rows * length
    layer = tokens * (16 * hidden + compute_bytes * (12 * hidden + 6 * feed_forward))
    kept = layer + layers * tokens * hidden * 4 if has_checkpointing else layers * layer
    return MemoryEstimate(
        weights=weights,
        adapter=4 * adapter_parameters,
        optimizer=12 * adapter_parameters,
        activations=kept + layer + 4 * tokens * config.vocab_size * 4,
    )
