"""What a training changes: the weights, of which removed ones stay zero."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from prunekit.contracts import Masks
from prunekit.pruning.masks import assert_masked


class Variables(Protocol):
    """What `fit` trains. All its state is in the model, hence in the model's state dict."""

    model: nn.Module

    def parameters(self) -> list[nn.Parameter]: ...

    def effective(self) -> AbstractContextManager[None]:
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
    """Trains the weights; those removed by a mask stay exactly zero."""

    model: nn.Module
    masks: Masks

    def __post_init__(self) -> None:
        self.model.requires_grad_(True)
        self.model.train()
        named = dict(self.model.named_parameters())
        self._masked = [(named[name], ~mask) for name, mask in self.masks.items()]

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def effective(self) -> AbstractContextManager[None]:
        return nullcontext()

    def after_backward(self) -> None:
        for weight, removed in self._masked:
            if weight.grad is not None:
                # Filled, not multiplied: inf * 0 is NaN, and w * 0 may be -0.
                weight.grad.masked_fill_(removed, 0)

    def check(self) -> None:
        assert_masked(self.model, self.masks)
