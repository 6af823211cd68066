"""The loss that is trained on: cross-entropy and the loss terms of methods."""
from torch import nn

from models.base import WithAuxiliary
from utils.eval import cross_entropy


class Criterion:
    """(outputs, targets) -> scalar: the weighted cross-entropy, plus the terms times their strength.

    strength: from 0 to 1, as the newest `before_step` said. At 0 the terms are not computed; where their strength is
    not 1, the weight of the cross-entropy is between 1 and its own.
    """

    def __init__(self, terms, cross_entropy_weight, label_smoothing):
        """terms: pairs of a loss term and its `Activations`, or None if it looks at no layer."""
        self.terms, self.label_smoothing, self.strength = terms, label_smoothing, 1.0
        self.weight_of_cross_entropy = cross_entropy_weight

    def before_step(self, behind, strength):
        self.strength = strength
        for term, activations in self.terms:
            if activations:
                activations.active = strength > 0
            if hasattr(term, 'before_step') and not isinstance(term, nn.Module):  # modules are told with the network
                term.before_step(behind, strength)

    def __call__(self, outputs, targets):
        auxiliary, weight = 0, self.weight_of_cross_entropy
        if isinstance(outputs, WithAuxiliary):
            losses = (cross_entropy(logits, targets, self.label_smoothing) for logits in outputs.auxiliary)
            auxiliary, outputs = outputs.weight * sum(losses), outputs.outputs
        if self.strength < 1:
            weight = 1 + self.strength * (weight - 1)
        loss = weight * cross_entropy(outputs, targets, self.label_smoothing) if weight else 0
        return loss + self._terms(outputs, targets) + auxiliary

    def _terms(self, outputs, targets):
        if self.strength == 0:
            # Gradients of 0, as DistributedDataParallel waits for those of all parameters.
            return sum(0 * p.sum() for term, _ in self.terms if isinstance(term, nn.Module) for p in term.parameters())
        terms = sum(term(outputs, targets, activations.read() if activations else [])
                    for term, activations in self.terms)
        return terms if self.strength == 1 else self.strength * terms
