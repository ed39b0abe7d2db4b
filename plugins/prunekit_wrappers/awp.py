"""Adversarial weight perturbation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit.contexts import NetworkContext
from prunekit.contracts import Loss
from prunekit.steps import Now
from prunekit_wrappers import AwpOptions


@dataclass(frozen=True)
class Awp:
    """The gradient at w + v, with v = gamma * ||w|| * g / ||g|| for each matrix and kernel w.

    g is the gradient of the step's loss at w (Wu et al., NeurIPS 2020, section 4, one step). Only
    kept weights are measured and moved; under learned scores those are the frozen weights, and the
    gradient goes to the scores.
    """

    options: AwpOptions

    def around(self, go: Callable[[], Loss], now: Now) -> Loss:
        """Two passes, the second at the perturbed weights, which are then restored by copy."""
        if now.clock.epoch < self.options.start:
            return go()
        go()
        return go_nearby(go, self.options.gamma, now.weights, now.gradients(), now.masks)


def go_nearby(
    go: Callable[[], Loss],
    gamma: float,
    values: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
) -> Loss:
    """A pass at v + gamma * ||v|| * g / ||g|| for each value v and its gradient g.

    ||v|| is that of what `masks` keep. Values are then restored by copy.
    """
    before = {name: value.detach().clone() for name, value in values.items()}
    with torch.no_grad():
        for name, gradient in gradients.items():
            value = values[name]
            kept = value * masks[name] if name in masks else value
            value.add_(gradient * (gamma * kept.norm() / (gradient.norm() + 1e-20)))
    try:
        return go()
    finally:
        with torch.no_grad():
            for name, value in values.items():
                value.copy_(before[name])


def build(options: AwpOptions, context: NetworkContext) -> Awp:
    """Build the wrapper `awp`."""
    return Awp(options)
