"""A client rule's terms, on an adapter's parameters: of gradients before an optimiser's step, of weights after it."""

import torch

from fedcli.algos import ClientRule
from fedcli.model.lora import AdaptedModel


class RuleTerms:
    """Adds a client rule's terms to an adapter that is trained; without a rule it does nothing."""

    def __init__(self, adapted: AdaptedModel, rule: ClientRule | None) -> None:
        self._rule = rule
        device, parameters = adapted.base.device, adapted.parameters
        self._pairs = (
            []
            if rule is None
            else [(parameter, torch.tensor(rule.arrays[name], device=device)) for name, parameter in parameters.items()]
        )

    @torch.no_grad()
    def add_to_gradients(self) -> None:
        """Add the terms of gradients, which are clipped already."""
        for parameter, own in self._pairs:
            assert self._rule is not None
            term = self._rule.gradient_term(parameter, own)
            if term is not None and parameter.grad is not None:
                parameter.grad.add_(term)

    @torch.no_grad()
    def add_to_weights(self, learning_rate: float) -> None:
        """Add the terms of weights, after the optimiser's step."""
        for parameter, own in self._pairs:
            assert self._rule is not None
            term = self._rule.weight_term(own, learning_rate)
            if term is not None and parameter.requires_grad:
                parameter.add_(term)
