"""Bases whose weights hold NaN or infinite numbers: nothing that such a model says means anything."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedcli.errors import ConfigError, RequirementError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def check_answers(model: "PreTrainedModel") -> None:
    """Raise as `check_weights` where a model's logits or embeddings are not finite; it costs one token's pass."""
    import torch

    try:
        embedding: list[torch.nn.Parameter] = list(model.get_input_embeddings().parameters())
    except (AttributeError, NotImplementedError):  # a base's own code need not name it
        embedding = list(model.parameters())
    with torch.no_grad():
        outputs = model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device))
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    if not (_is_finite(logits) and all(map(_is_finite, embedding))):
        check_weights(model)
        check_weights(model, of_adapter=True)


def check_weights(model: "torch.nn.Module", *, of_adapter: bool = False) -> None:
    """Raise RequirementError for the first weight of the base that is not finite, ConfigError for its adapter's."""
    for name, parameter in model.named_parameters():
        if (".lora_" in name) == of_adapter and parameter.is_floating_point() and not _is_finite(parameter):
            num_odd = int((~parameter.isfinite()).sum())
            whole_name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            raise (ConfigError if of_adapter else RequirementError)(
                f"the {'adapter' if of_adapter else 'base model'} holds weights that are not finite: {num_odd} of "
                f"{parameter.numel():,} numbers of {whole_name} are NaN or infinite",
                hint="Fetch it again, or choose another: no learning rate mends that.",
            )


def _is_finite(tensor: "torch.Tensor") -> bool:
    """Return whether all numbers are finite; a sum tells it ten times faster, unless it overflows."""
    numbers = tensor.detach()
    return bool(numbers.sum().isfinite()) or bool(numbers.isfinite().all())
