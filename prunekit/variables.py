"""What a training changes: weights (removed ones stay zero), or scores of frozen weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from prunekit.contracts import Scores
from prunekit.masks import (
    Masks,
    assert_masked,
    attach_scores,
    check_layers,
    detach_scores,
    effective_weights,
    select,
)

# _NormBase: batch and instance normalisation.
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


class Variables(Protocol):
    """What `fit` trains. Everything lives in the model, so its state dict is all there is."""

    model: nn.Module

    def parameters(self) -> list[nn.Parameter]: ...

    def step(self) -> AbstractContextManager[None]:
        """Around one forward and one backward (or around a validation)."""
        ...

    def after_backward(self) -> None:
        """Between the backward and the clipping of gradients."""
        ...

    def check(self) -> None:
        """Once an epoch: raise `RunError` where a promise is broken."""
        ...


@dataclass
class Weights:
    """Trains the weights; those that a mask removed stay exactly zero."""

    model: nn.Module
    masks: Masks

    def __post_init__(self) -> None:
        self.model.requires_grad_(True)
        self.model.train()
        named = dict(self.model.named_parameters())
        self._masked = [(named[name], ~mask) for name, mask in self.masks.items()]

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def step(self) -> AbstractContextManager[None]:
        return nullcontext()

    def after_backward(self) -> None:
        for weight, removed in self._masked:
            if weight.grad is not None:
                # Filled, not multiplied: inf * 0 is NaN, and w * 0 may be -0.
                weight.grad.masked_fill_(removed, 0)

    def check(self) -> None:
        assert_masked(self.model, self.masks)


class LearnedScores:
    """Trains scores of frozen weights; masks follow the scores, once an optimiser step.

    Biases are frozen too. Normalisation layers train, affine parameters and running statistics,
    unless `bn` is "freeze".
    """

    def __init__(
        self,
        model: nn.Module,
        start: Scores,
        sparsity: float,
        budget: str,
        alive: Masks,
        bn: str,
    ) -> None:
        self.model, self.start, self.alive = model, start, alive
        self.sparsity, self.budget = sparsity, budget
        model.requires_grad_(False)
        model.train()
        for module in model.modules():
            if isinstance(module, NORMS):
                module.train(bn == "train")
                module.requires_grad_(bn == "train")
        self.parts = attach_scores(model, start.values)
        self.check()

    def scores(self) -> Scores:
        """Importance: |score|."""
        values = {name: part.score.detach().abs() for name, part in self.parts.items()}
        return Scores(values, self.start.layerwise)

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the masks of the present scores."""
        for name, mask in select(self.scores(), self.sparsity, self.budget, self.alive).items():
            self.parts[name].mask.copy_(mask)

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @contextmanager
    def step(self) -> Iterator[None]:
        self.refresh()
        with effective_weights(self.model):
            yield

    def after_backward(self) -> None:
        pass

    def check(self) -> None:
        self.refresh()
        check_layers({name: part.mask for name, part in self.parts.items()}, self.sparsity)

    def detach(self) -> None:
        """Give the model its plain weights back."""
        detach_scores(self.model)
