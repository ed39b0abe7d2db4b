"""What a training changes: weights (removed ones stay zero), or scores of frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import nn

from prunekit.contracts import Scores
from prunekit.masks import (
    ChannelGate,
    ScoredWeight,
    assert_masked,
    attach,
    attach_gates,
    detach,
    effective_weights,
)
from prunekit.selection import Masks, Selection, check_layers, select

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
    unless `bn` is "freeze". Channels are closed at the output of the last of a weight's
    `followers` (`budgets.find_followers`), single weights where they are.
    """

    def __init__(
        self,
        model: nn.Module,
        start: Scores,
        selection: Selection,
        alive: Masks,
        bn: str,
        followers: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.model, self.start, self.alive = model, start, alive
        self.selection = selection
        model.requires_grad_(False)
        model.train()
        for module in model.modules():
            if isinstance(module, NORMS):
                module.train(bn != "freeze")
                module.requires_grad_(bn != "freeze")
        self.parts: dict[str, ScoredWeight] | dict[str, ChannelGate]
        self._undo: list[Callable[[], None]]
        if selection.structure == "channel":
            gates = {n: ChannelGate(v, last=v.dim() == 2) for n, v in start.values.items()}
            self._undo = attach_gates(model, gates, followers or {})
            self.parts = gates
        else:
            scored = {name: ScoredWeight(value) for name, value in start.values.items()}
            attach(model, scored)
            self._undo = [partial(detach, model)]
            self.parts = scored
        self.check()

    def scores(self) -> Scores:
        """Importance: |score|."""
        values = {name: part.score.detach().abs() for name, part in self.parts.items()}
        return Scores(values, self.start.layerwise)

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the masks of the present scores."""
        masks = select(self.scores(), self.selection, self.alive)
        for name, part in self.parts.items():
            part.mask.copy_(masks[name])

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
        check_layers({n: part.mask for n, part in self.parts.items()}, self.selection.sparsity)

    def detach(self) -> None:
        """Give the model its plain weights back."""
        for undo in self._undo:
            undo()
