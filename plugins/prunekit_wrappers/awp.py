"""Adversarial weight perturbation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

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
        before = {name: weight.clone() for name, weight in now.weights.items()}
        with torch.no_grad():
            for name, gradient in now.gradients().items():
                weight = now.weights[name]
                kept = weight * now.masks[name] if name in now.masks else weight
                length = self.options.gamma * kept.norm() / (gradient.norm() + 1e-20)
                weight.add_(gradient * length)
        try:
            return go()
        finally:
            with torch.no_grad():
                for name, weight in now.weights.items():
                    weight.copy_(before[name])


def build(options: AwpOptions, context: NetworkContext) -> Awp:
    """Build the wrapper `awp`."""
    return Awp(options)
