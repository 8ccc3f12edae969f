"""A causal language model's logits at some positions only, made by its output head or, where that misleads, by all."""

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fedcli.errors import RequirementError

_IS_SELECTABLE: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()
"""Of the models that were probed: whether their head, given some positions only, makes these positions' logits."""
_HINT = "Choose a base model that gives logits of every position, of which none depends on a later token."


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the module that a model names as its output embeddings, if any; its own code may name a wrong one."""
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]  # Module.__getattr__
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


def logits_at(model: nn.Module, positions: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Return a model's logits at some positions, (batch, length) booleans: (True ones, words).

    The head sees these positions only; what the model does with logits behind it (scaling, soft-capping) stays in
    force. A model whose head does not lend itself to that makes all logits, of which these are taken.
    """
    if model not in _IS_SELECTABLE:
        probe(model)
    return _of_head(model, positions, inputs) if _IS_SELECTABLE[model] else _of_all(model, inputs)[positions]


def probe(model: nn.Module) -> None:
    """Find out on a few tokens, once a model, how its logits are to be had; its parts keep their modes.

    Raises RequirementError where its logits are not one row for each token, or depend on later tokens.
    """
    device = next(model.parameters()).device
    config: Any = model.config
    num_words = config.get_text_config().vocab_size
    input_ids = (torch.arange(14, device=device) * 7 + 3).view(2, 7) % num_words
    input_ids[1, :3] = input_ids[0, :3]
    positions = torch.zeros_like(input_ids, dtype=torch.bool)
    positions[0, 1] = positions[1, 2] = positions[1, 5] = True
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            everything = _of_all(model, {"input_ids": input_ids})
            scale = float(everything.abs().max())
            is_exact = everything.dtype == torch.float32 and not hasattr(model, "quantization_method")
            before = float((everything[0, :3].log_softmax(-1) - everything[1, :3].log_softmax(-1)).abs().max())
            if before > (1e-5 if is_exact else 0.1) * max(scale, 1.0):
                raise RequirementError(
                    "the base model is no causal language model: a token's logits depend on later tokens", hint=_HINT
                )
            _IS_SELECTABLE[model] = _agrees(model, positions, input_ids, everything[positions], scale)
    finally:
        for module in in_training:
            module.training = True


def _agrees(
    model: nn.Module, positions: torch.Tensor, input_ids: torch.Tensor, wanted: torch.Tensor, scale: float
) -> bool:
    """Return whether the head makes the wanted logits when it sees some positions only."""
    try:
        found = _of_head(model, positions, {"input_ids": input_ids})
    except Exception:  # a model's own code raises whatever it raises
        return False
    tolerance = max(1e-5, 4 * torch.finfo(wanted.dtype).eps) * scale
    return found.shape == wanted.shape and float((found - wanted).abs().max()) <= tolerance


def _of_head(model: nn.Module, positions: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    head = output_head(model)
    if head is None:
        raise TypeError("the model names no output head")

    def select(_head: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (given[0][positions], *given[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        logits: torch.Tensor = model(**{"use_cache": False, **inputs}).logits
    finally:
        handle.remove()
    return logits


def _of_all(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Return the logits of all positions, (batch, length, words), in whatever form the model's own code returns them.

    Raises RequirementError where there are none.
    """
    shape = inputs["input_ids"].shape
    known = inspect.signature(model.forward).parameters
    offered = {"use_cache": False, "logits_to_keep": shape[1], "num_logits_to_keep": shape[1]} | inputs
    output = model(**{name: value for name, value in offered.items() if name in known})
    logits = output["logits"] if isinstance(output, dict) else getattr(output, "logits", None)
    if logits is None:
        logits = output[0] if isinstance(output, tuple) else output
    if not isinstance(logits, torch.Tensor) or logits.shape[:-1] not in (shape, (shape.numel(),)):
        found = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise RequirementError(
            f"the base model's own code returns logits of shape {found} for tokens of shape {list(shape)}", hint=_HINT
        )
    return logits.view(*shape, -1)
