"""Gradients of single rows of LoRA's factors, their norms and clipped sums, from one forward and one backward pass.

The gradient of a linear layer's weight is, for one row, g^T a: of its inputs a and its outputs' gradients g, a line
for each token. LoRA's factors are thin, so that this product is mostly smaller than a and g, and is kept. Where it is
larger (short rows, large ranks) a and g are kept, and the norm comes of two Gram matrices: |g^T a|^2 =
<a a^T, g g^T> ("ghost norm": Li et al. 2021, 2110.05679). Behind a row's last token g is zero: padding counts nothing.

Not built on Opacus' hooks: over PEFT they train adapters that cannot be used (meta-pytorch/opacus#820).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from fedcli.model.lora import AdaptedModel
from fedcli.model.output_head import logits_at


@dataclass(frozen=True)
class _Whole:
    """Gradients of units one by one, (units, outputs, inputs)."""

    gradients: torch.Tensor

    def squared_norms(self) -> torch.Tensor:
        return self.gradients.flatten(1).square().sum(1)

    def summed(self, factors: torch.Tensor) -> torch.Tensor:
        return torch.einsum("u,uoi->oi", factors, self.gradients)


@dataclass(frozen=True)
class _Ghost:
    """What the gradients of units are products of: inputs (units, tokens, inputs), and gradients of the outputs."""

    inputs: torch.Tensor
    outputs: torch.Tensor

    def squared_norms(self) -> torch.Tensor:
        grams = (self.inputs @ self.inputs.mT) * (self.outputs @ self.outputs.mT)
        return grams.flatten(1).sum(1).clamp(min=0)

    def summed(self, factors: torch.Tensor) -> torch.Tensor:
        return (self.outputs * factors[:, None, None]).flatten(0, 1).T @ self.inputs.flatten(0, 1)


@dataclass
class Recorder:
    """Gathers the gradients of units while the backward pass goes through LoRA's layers.

    A unit is a row, or all rows of a group. Before a forward pass `begin` says what its sequences are.
    """

    _scale: torch.Tensor = field(default_factory=lambda: torch.ones(0))
    _num_units: int = 0
    _is_together: bool = False
    _found: dict[str, _Whole | _Ghost] = field(default_factory=dict)

    def begin(self, scale: torch.Tensor, *, num_sides: int, is_together: bool) -> None:
        """Say what the next forward pass is of: all first sides of rows, then all second ones.

        The gradient of a row is multiplied by its number of `scale`. With `is_together` all rows are of one unit, as
        are those of the forward passes before it since `clear`; else each is a unit, and the pass the first one.
        """
        self._scale = scale.repeat(num_sides)
        self._num_units = 1 if is_together else len(scale)
        self._is_together = is_together

    def clear(self) -> None:
        """Forget the units so far."""
        self._found.clear()

    @torch.no_grad()
    def record(self, name: str, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Take in a layer's inputs (sequences, tokens, inputs) and the gradients of its outputs."""
        inputs, outputs = inputs.float(), outputs.float() * self._scale[:, None, None]
        if self._is_together:
            gradient = (outputs.flatten(0, 1).T @ inputs.flatten(0, 1))[None]
            before = self._found.get(name)
            self._found[name] = _Whole(before.gradients + gradient if isinstance(before, _Whole) else gradient)
            return
        inputs, outputs = self._by_unit(inputs), self._by_unit(outputs)
        num_tokens, num_in, num_out = inputs.shape[1], inputs.shape[2], outputs.shape[2]
        if num_tokens * (num_in + num_out) < num_in * num_out:
            self._found[name] = _Ghost(inputs, outputs)
        else:
            self._found[name] = _Whole(outputs.mT @ inputs)

    def _by_unit(self, values: torch.Tensor) -> torch.Tensor:
        """Return a unit's sequences, its sides, behind one another: (units, tokens of all sides, numbers)."""
        by_side = values.view(-1, self._num_units, *values.shape[1:])
        return by_side.transpose(0, 1).flatten(1, 2)

    @torch.no_grad()
    def add_clipped(self, clip: float, total: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Add the units' gradients, each scaled to a norm of at most `clip`, to `total`; return the norms before.

        The norm is one of all parameters together. A gradient that is not finite adds nothing.
        """
        if not self._found:
            return torch.zeros(0)
        norms = torch.stack([found.squared_norms().double() for found in self._found.values()]).sum(0).sqrt()
        is_finite = norms.isfinite()
        factors = torch.where(is_finite, (clip / norms).clamp(max=1.0), 0.0).float()
        for name, found in self._found.items():
            total[name].add_(_finite(found, bool(is_finite.all())).summed(factors))
        self.clear()
        return norms


def _finite(found: _Whole | _Ghost, is_finite: bool) -> _Whole | _Ghost:
    """Return gradients with zeros where a number is not finite: zero times infinity is no zero."""
    if is_finite:
        return found
    numbers = partial(torch.nan_to_num, nan=0.0, posinf=0.0, neginf=0.0)
    if isinstance(found, _Whole):
        return _Whole(numbers(found.gradients))
    return _Ghost(numbers(found.inputs), numbers(found.outputs))


class _Linear(torch.autograd.Function):
    """A linear layer without a bias, whose weight's gradient goes to a recorder, row by row."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, recorder: Recorder, name: str) -> torch.Tensor:
        outputs = linear(inputs, weight)
        ctx.save_for_backward(inputs.to(outputs.dtype), weight)
        ctx.recorder, ctx.name, ctx.dtype = recorder, name, inputs.dtype
        return outputs

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        inputs, weight = ctx.saved_tensors
        (outputs,) = outer
        ctx.recorder.record(ctx.name, inputs, outputs)
        further = (outputs @ weight.to(outputs.dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return further, None, None, None


@contextmanager
def recording(adapted: AdaptedModel) -> Iterator[Recorder]:
    """Let the gradients of the adapter's parameters go to a recorder inside the block, and nowhere else."""
    recorder = Recorder()
    factors = _factors(adapted)

    def make(name: str, layer: nn.Linear) -> Any:
        def forward(inputs: torch.Tensor) -> torch.Tensor:
            if not (layer.weight.requires_grad and torch.is_grad_enabled()):
                return linear(inputs, layer.weight)
            outputs: torch.Tensor = _Linear.apply(inputs, layer.weight, recorder, name)  # type: ignore[no-untyped-call]  # torch's annotations
            return outputs

        return forward

    for name, layer in factors.items():
        layer.__dict__["forward"] = make(name, layer)
    try:
        yield recorder
    finally:
        for layer in factors.values():
            del layer.__dict__["forward"]


def _factors(adapted: AdaptedModel) -> dict[str, nn.Linear]:
    """Return the linear layers without a bias whose weights are the adapter's, by the names of these."""
    names = {id(parameter): name for name, parameter in adapted.parameters.items()}
    found: dict[str, nn.Linear] = {}
    for module in adapted.model.modules():
        if isinstance(module, nn.Linear) and module.bias is None and id(module.weight) in names:
            found[names[id(module.weight)]] = module
    return found


@torch.no_grad()
def sees_rows(adapted: AdaptedModel) -> bool:
    """Return whether every trained parameter is a linear factor that sees a batch's sequences one by one.

    It is not so for LoRA of embeddings, in experts that see the tokens of a batch mixed, or in layers that a batch may
    pass by.
    """
    factors = _factors(adapted)
    trained = {name for name, parameter in adapted.parameters.items() if parameter.requires_grad}
    if not trained <= factors.keys():
        return False
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        shapes[name] = tuple(inputs[0].shape[:-1]) if name not in shapes else ()

    handles = [factors[name].register_forward_pre_hook(partial(note, name)) for name in trained]
    config: Any = adapted.base.config
    words = torch.arange(6, device=adapted.base.device).view(2, 3) % config.get_text_config().vocab_size
    try:
        logits_at(adapted.base, words == words[:, :1], input_ids=words)  # as in training the head sees some positions
    finally:
        for handle in handles:
            handle.remove()
    return all(shapes.get(name) == (2, 3) for name in trained)


def mixes_rows(adapted: AdaptedModel) -> bool:
    """Return whether rows of a batch change each other's outputs: LLM.int8 looks for outliers in a whole batch."""
    return any(type(module).__name__ == "Linear8bitLt" for module in adapted.base.modules())
